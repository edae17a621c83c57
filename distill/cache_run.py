"""One pass of the teacher over the data of a configuration: estimate, then store, then report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill import access, irs, presets
from distill.access import Head
from distill.batch import Batch, Normaliser
from distill.cache import CachedTeacher, Memory
from distill.cache_build import Builder, CacheOptions, check, fingerprint
from distill.cache_codec import QUANTISATION
from distill.cache_key import sample_key
from distill.cache_store import FORMAT, HEAD, INFO, Entry, Reader, Writer, read_info
from distill.config import LossWeights, TrainConfig
from distill.data import Collator, Examples, at_hand, to_batch
from distill.methods import LavitOptions
from distill.objective import Objective
from distill.pair import shared_vocabulary
from distill.placement import Placed, place
from distill.run import Run, load_run
from vlm.console import Progress, note
from vlm.errors import UserError
from vlm.files import sha256_file, write_atomic
from vlm.load import Checkpoint, open_checkpoint
from vlm.score import bootstrap_interval

# samples looked at before anything is written: they say how large the cache will be and how exact
PROBE = 48
# as many held-out samples as training scores the loss terms on
HELD_OUT = 200
LEFT_FREE = 256 << 20


@dataclass(frozen=True)
class Errors:
    """|loss from the cache - live loss| / live loss of one term over samples: mean and its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Measured:
    """What the probe says.

    Attributes:
        sample_bytes: mean bytes a sample.
        response_bytes, visual_bytes: mean bytes a row; candidates count as response rows.
        full_bytes: a row of all logits in float16.
        errors: by term, for this student.
    """

    samples: int
    sample_bytes: float
    response_bytes: float
    visual_bytes: float | None
    full_bytes: int
    errors: dict[str, Errors]


@dataclass(frozen=True)
class Built:
    """What a run of the command ends with."""

    out: Path
    samples: int
    added: int
    bytes: int
    estimate_bytes: int
    seconds: float
    measured: Measured
    layer: int | str
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "out": str(self.out)}

    @property
    def text(self) -> str:
        m = self.measured
        visual = "" if m.visual_bytes is None else f", {m.visual_bytes:.0f} a visual row"
        shorter = m.full_bytes / max(m.response_bytes, 1e-9)
        lines = [
            f"bytes: {m.response_bytes:.0f} a response token{visual}; all logits in float16 {m.full_bytes} "
            f"({shorter:.1f} times as much); measured on {m.samples} samples"
        ]
        for term, e in m.errors.items():
            lines.append(
                f"{term}: mean |cached - live| / live of a sample's loss {_share(e.mean)} "
                f"(95 % {_share(e.low)} to {_share(e.high)}, n = {e.n}), with this student (larger with a trained one)"
            )
        if self.dry_run:
            lines.append(f"the cache will take about {_size(self.estimate_bytes)}; nothing was written")
        else:
            lines.append(
                f"cache: {self.out} with {self.samples} samples ({self.added} new), {_size(self.bytes)}, "
                f"IVA layer {self.layer}"
            )
            lines.append(f"next: python -m distill train ... --teacher_cache {self.out}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Work:
    """Everything a cache is made with."""

    config: TrainConfig
    options: CacheOptions
    run: Run
    placed: Placed
    layer: int
    scores: irs.LayerScores | None
    vocabulary: int
    teacher: Checkpoint

    @property
    def collate(self) -> Collator:
        return Collator(self.run.student_source.tokenizer.spec.pad_token_id, keys=True)

    def builder(self) -> Builder:
        options = self.options
        looks = LavitOptions(keep=options.looks, layers=options.look_layers) if options.looks else None
        live = self.placed.teacher(self.config.align, self.layer, looks)
        token = access.image_token(self.placed.model)
        return Builder(live, self.options, self.config.align.temperature, self.vocabulary, token)

    def batch(self, examples: Sequence[Any]) -> Batch:
        device = self.placed.head.weight_VD.device
        return to_batch({name: value.to(device) for name, value in self.collate(examples).items()})

    def fingerprint(self) -> dict[str, Any]:
        config = self.config
        return fingerprint(
            self.teacher,
            config.teacher_dtype,
            config.teacher_load,
            config.align.temperature,
            self.layer,
            self.vocabulary,
            self.options,
        )


def build(config: TrainConfig, options: CacheOptions, shard: tuple[int, int], dry_run: bool) -> Built:
    """Store what is missing of the configuration's data.

    Args:
        shard: (index, count): which samples.

    Raises:
        UserError: the folder holds a cache made with something else, or the disk is short.
    """
    started = time.monotonic()
    if config.threads:
        torch.set_num_threads(config.threads)
    if (config.out / INFO).is_file():  # refuse a mismatch that shows before the teacher is loaded
        check(config.out, read_info(config.out)["fingerprint"], {"options": options.to_json()})
    work = _load(config, options)
    print_ = work.fingerprint()
    builder = work.builder()
    measured = _probe(work, builder)
    sets = _sets(work.run)
    todo = {name: [*range(shard[0], min(len(data), limit), shard[1])] for name, data, limit in sets}
    estimate = round(measured.sample_bytes * sum(map(len, todo.values()))) + _head_bytes(work)
    if dry_run:
        seconds = time.monotonic() - started
        return Built(config.out, 0, 0, 0, estimate, seconds, measured, print_["layer"], True)
    _open(work, print_, measured)
    added = 0
    for name, data, _ in sets:
        added += _fill(work, builder, shard, name, data, todo[name], measured)
    reader = Reader(config.out)
    seconds = round(time.monotonic() - started, 1)
    return Built(config.out, len(reader), added, reader.size(), estimate, seconds, measured, print_["layer"], False)


def _load(config: TrainConfig, options: CacheOptions) -> Work:
    # sft: the run loads student and data and leaves the teacher to us; few samples need not fill a batch, but how long
    # a stream is depends on the batch
    size = config.batch_size if config.streaming else 1
    run = load_run(
        dataclasses.replace(config, objective="sft", batch_size=size, weights=LossWeights(), lavit=LavitOptions())
    )
    teacher = run.teacher_source or open_checkpoint(presets.digits_teacher())
    vocabulary = shared_vocabulary(teacher, run.student_source)
    if options.candidates >= vocabulary:
        raise UserError(f"candidates {options.candidates}: the vocabulary has only {vocabulary} tokens")
    placed = place(teacher, config)
    layer, scores = _layer(config, options, run, placed.model)
    return Work(config, options, run, placed, layer, scores, vocabulary, teacher)


def _layer(
    config: TrainConfig, options: CacheOptions, run: Run, model: nn.Module
) -> tuple[int, irs.LayerScores | None]:
    """The layer that weights the visual tokens, chosen as in training, or by a cache that is there already."""
    layers = len(access.decoder(model).layers)
    if config.align.iva_layer >= layers:
        raise UserError(f"align.iva_layer {config.align.iva_layer}: the teacher has layers 0 to {layers - 1}")
    if config.align.iva_layer >= 0 or not options.visual_share:
        return max(config.align.iva_layer, 0), None
    if (config.out / INFO).is_file() and isinstance(read_info(config.out)["fingerprint"]["layer"], int):
        return int(read_info(config.out)["fingerprint"]["layer"]), None
    collate = Collator(run.student_source.tokenizer.spec.pad_token_id)
    scores = irs.layer_scores(model, run.data.train, config.align.irs_pairs, collate)
    note(f"IRS over {scores.pairs} pairs: layer {scores.best} of {layers} weights the visual tokens")
    return scores.best, scores


def _sets(run: Run) -> list[tuple[str, Examples, int]]:
    """(name, samples, how many) of what training asks the teacher about."""
    source = json.dumps(run.data.description, sort_keys=True, default=str) + str(run.config.seed)
    name = hashlib.sha256(source.encode()).hexdigest()[:16]
    found = [(f"train-{name}", run.data.train, len(run.data.train))]
    if run.data.validation is not None:
        found.append((f"validation-{name}", run.data.validation, min(run.config.eval_samples, HELD_OUT)))
    return found


def _fill(
    work: Work,
    builder: Builder,
    shard: tuple[int, int],
    name: str,
    data: Examples,
    todo: Sequence[int],
    measured: Measured,
) -> int:
    """Store the samples that are not there yet; returns how many."""
    out = work.config.out
    writer = Writer(out, *shard, data=name)
    try:
        there = Reader(out)
        stored = there.records(name)
        missing = [i for i in todo if i not in stored]
        _refuse_full_disk(out, round(measured.sample_bytes * len(missing)))
        # data may have changed under the same name and numbers: what is there is told by content
        present = 0
        progress = Progress(len(todo), f"cache {name.split('-')[0]}", every_s=10)
        done: set[bytes] = set()
        added = 0
        size = work.config.batch_size
        for start in range(0, len(todo), size):
            records = todo[start : start + size]
            new = [(i, data[i]) for i in records]
            keyed = [(i, example, sample_key(example)) for i, example in new]
            fresh: dict[bytes, tuple[int, Any]] = {}
            for i, example, key in keyed:
                present += key in there
                if key not in there and key not in done:
                    fresh.setdefault(key, (i, example))
            if fresh:
                batch = work.batch([example for _, example in fresh.values()])
                for entry in builder.entries(batch, list(fresh), [i for i, _ in fresh.values()]):
                    writer.add(entry)
            done |= set(fresh)
            added += len(fresh)
            progress.advance(len(records), f"{_size(writer.written)} written")
        if present:
            note(f"{present} of {len(todo)} samples were there already")
        return added
    finally:
        writer.flush()
        writer.close()


def _open(work: Work, made_with: dict[str, Any], measured: Measured) -> None:
    """Write what the cache is made with, or compare it with what is there."""
    out = work.config.out
    head = work.placed.head
    if (out / INFO).is_file():
        check(out, read_info(out)["fingerprint"], made_with)
        return
    _refuse_full_disk(out, _head_bytes(work))
    info: dict[str, Any] = {
        "format": FORMAT,
        "fingerprint": made_with,
        "teacher": work.teacher.directory.name,
        "teacher_hidden": access.width(work.placed.model),
        "soft_cap": head.soft_cap,
        "irs": None if work.scores is None else work.scores.to_json(),
        "measured": dataclasses.asdict(measured),
        "quantisation": None if work.options.all_logits else QUANTISATION,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        if work.options.all_logits:
            from safetensors.torch import save

            write_atomic(out / HEAD, save({"weight": head.weight_VD.detach().cpu().contiguous()}))
            info["head_sha256"] = sha256_file(out / HEAD)
        write_atomic(out / INFO, json.dumps(info, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}); choose another --out") from None


def _head_bytes(work: Work) -> int:
    weight = work.placed.head.weight_VD
    return weight.numel() * weight.element_size() if work.options.all_logits else 0


def _refuse_full_disk(out: Path, needed: int) -> None:
    folder = next(path for path in (out, *out.resolve().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed + LEFT_FREE > free:
        raise UserError(
            f"the cache will take about {_size(needed)} more and {folder} has {_size(free)} free; free space, choose "
            "another --out, or store less (--visual_share, --top_k, --visual_top_k)"
        )


def _probe(work: Work, builder: Builder) -> Measured:
    """Size and error on samples spread over the data."""
    data = work.run.data.train
    within = at_hand(data)
    count = min(PROBE, within)
    examples = [data[i * within // count] for i in range(count)]
    student = work.run.student.to(work.placed.head.weight_VD.device).eval()
    head: Head | None = work.placed.head if work.options.all_logits else None
    entries: list[Entry] = []
    ratios: dict[str, list[float]] = {}
    response: list[tuple[int, int]] = []
    visual: list[tuple[int, int]] = []
    for example in examples:
        batch = work.batch([example])
        entry = builder.entries(batch, [sample_key(example)], [0])[0]
        entries.append(entry)
        rows = int(batch.response_places()[0].numel())
        split = entry.row_sizes(rows)
        response.append((split[0] + split[2], rows))
        visual.append((split[1] + 5 * len(entry.weight_J), int(entry.kept_J.sum())))
        for term, ratio in _ratios(work, student, batch, entry, head).items():
            ratios.setdefault(term, []).append(ratio)
    work.run.student.cpu()
    rows_visual = sum(n for _, n in visual)
    return Measured(
        count,
        statistics.fmean(entry.size() + 112 for entry in entries),
        sum(b for b, _ in response) / max(sum(n for _, n in response), 1),
        sum(b for b, _ in visual) / rows_visual if rows_visual else None,
        2 * work.vocabulary,
        {
            term: Errors(statistics.fmean(found), *bootstrap_interval(found), len(found))
            for term, found in ratios.items()
        },
    )


@torch.no_grad()
def _ratios(work: Work, student: nn.Module, batch: Batch, entry: Entry, head: Head | None) -> dict[str, float]:
    """|cached / live - 1| of each term that both can compute."""
    terms = ("kd", "iva") if work.options.visual_share and batch.image_BT.any() else ("kd",)
    cached = CachedTeacher(Memory({entry.key: entry}), head)
    values = []
    for teacher in (work.placed.teacher(work.config.align, work.layer), cached):
        objective = Objective(terms, LossWeights(), work.config.align, teacher, work.vocabulary)
        values.append(objective(student, batch, Normaliser.of(batch))[1])
    live, stored = values
    return {term: abs(float(stored[term]) / float(live[term]) - 1) for term in terms if float(live[term]) > 0}


def _share(value: float) -> str:
    return f"{100 * value:.2g} %"


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
