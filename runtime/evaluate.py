"""`python -m runtime eval`: a benchmark on any artefact, checkpoint or server, through the engine that serves people."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.batch import Batches
from runtime.evaluation import (
    JUDGED,
    SCHEMA,
    Checked,
    Identity,
    Run,
    answer_all,
    answer_in_batches,
    artefact_digest,
    check_items,
    json_line,
)
from runtime.loading import ADDRESSES, load, open_backend
from runtime.options import LoadOptions
from runtime.tasks import read_task
from runtime.tasks.base import Item, Task, TaskOptions
from vlm.console import note, print_json, table
from vlm.errors import UserError
from vlm.files import write_atomic
from vlm.score import share_interval, summary_interval
from vlm.scoring.benchmarks import BENCHMARKS, scored
from vlm.scoring.choice import MODES
from vlm.scoring.summary import Record, Summary

RUNS = Path("runs/eval")
SHOWN = 40  # lines of the breakdown printed to a terminal


@dataclass(frozen=True)
class EvalOptions:
    """How to ask and how to judge.

    Attributes:
        out: run directory; None is runs/eval/TASK-NAME-DIGEST.
        fresh: forget the answers of an earlier run in `out`.
        mode: how replies are read (`strict` or `official`); "" is the benchmark's usual one.
        missing: `refuse` a data set with images missing, or count them as `wrong`.
        concurrency: requests in flight at a server.
        batch: questions answered at once by a backend that can (PyTorch).
        max_new_tokens: longest answer; 0 is the task's own limit.
        judge: address of a server that decides MME-Reasoning's open questions; "" decides them by rule.
    """

    out: Path | None = None
    fresh: bool = False
    mode: str = ""
    missing: str = "refuse"
    concurrency: int = 1
    batch: int = 1
    max_new_tokens: int = 0
    judge: str = ""

    def __post_init__(self) -> None:
        if self.mode not in ("", *MODES):
            raise UserError(f"--mode is {self.mode!r}; known: {', '.join(MODES)}")
        if self.concurrency < 1:
            raise UserError(f"--concurrency is {self.concurrency}; give 1 or more")
        if self.batch < 1:
            raise UserError(f"--batch is {self.batch}; give 1 or more")


def evaluate(
    arguments: argparse.Namespace, loading: LoadOptions, task_options: TaskOptions, options: EvalOptions
) -> int:
    """Run, or go on with, one evaluation; print its table.

    Raises:
        UserError: unknown task, wrong data, images missing, or a run directory of something else.
    """
    task = read_task(arguments.task, task_options)
    if task.note:
        note(f"{task.name}: {task.note}")
    checked = check_items(task.items)
    _refuse_missing(task, checked, options.missing)
    if options.judge and task.name != JUDGED:
        raise UserError(f"--judge is for {JUDGED}; answers of {task.name} are read by rules: leave it out")
    limit = options.max_new_tokens or task.max_new_tokens
    address = str(arguments.artifact) if str(arguments.artifact).startswith(ADDRESSES) else ""
    if options.concurrency > 1 and not address:
        raise UserError("--concurrency is for servers; a local model answers one question at a time: leave it out")
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        model = _opened(arguments, loading, options, stack) if address else None
        identity = _identity(arguments, model.name if model else "", loading, checked, task, limit)
        root = options.out or RUNS / _name(arguments, task, identity)
        if options.fresh or not (root / "run.json").exists():  # a model that does not load should leave no directory
            model = model or _opened(arguments, loading, options, stack)
        with Run(root, identity, task.items, checked.digests, options.fresh) as run:
            before = len(run.answers)
            if before < len(task.items):
                (model or _opened(arguments, loading, options, stack)).answer(run, task, limit)
            answers = dict(run.answers)
    new = len(task.items) - before
    timing = {"seconds": round(time.monotonic() - started, 3), "answered_now": new, "kept": before}
    return _report(arguments, root, task, identity, answers, options, timing)


@dataclass(frozen=True)
class _Model:
    """What answers: a backend that takes batches, or engines."""

    name: str
    answer: Callable[[Run, Task, int], None]


def _opened(
    arguments: argparse.Namespace, loading: LoadOptions, options: EvalOptions, stack: contextlib.ExitStack
) -> _Model:
    batches = _batching(arguments, loading, options.batch)
    if batches is not None:
        stack.callback(batches.close)
        taken = batches
        return _Model(
            taken.info.name, lambda run, task, limit: answer_in_batches(run, task, taken, limit, options.batch)
        )
    loaded = [load(arguments.artifact, arguments.backend, **vars(loading)) for _ in range(options.concurrency)]
    engines = [stack.enter_context(engine) for engine in loaded]
    if engines[0].info.verified is False:
        note(f"warning: {arguments.artifact} did not pass its checks at export")
    return _Model(engines[0].info.name, lambda run, task, limit: answer_all(run, task, engines, limit))


def _batching(arguments: argparse.Namespace, loading: LoadOptions, size: int) -> Batches | None:
    """The backend, if it is to answer in batches and can."""
    if size == 1 or arguments.backend == "fake" or str(arguments.artifact).startswith(ADDRESSES):
        return None
    backend = open_backend(Path(arguments.artifact), arguments.backend, loading)
    if isinstance(backend, Batches):
        return backend
    note(f"backend {backend.info.backend} answers one question at a time; --batch plays no part")
    backend.close()
    return None


def _refuse_missing(task: Task, checked: Checked, missing: str) -> None:
    if not checked.missing:
        return
    text = f"{len(checked.missing)} images of {task.name} are missing, the first is {checked.missing[0]}"
    if missing == "refuse":
        raise UserError(f"{text}; check --data and --images, or add `--missing wrong` to count them as wrong answers")
    note(f"warning: {text}; their questions count as wrong")


def _identity(
    arguments: argparse.Namespace, served: str, loading: LoadOptions, checked: Checked, task: Task, limit: int
) -> Identity:
    if served:
        artefact = f"{served} at {str(arguments.artifact).rstrip('/')}"
    else:
        root = Path(arguments.artifact)
        if not root.is_dir() and arguments.backend != "fake":
            raise UserError(f"{root} is not a directory; name an artefact, a checkpoint directory or a server")
        artefact = artefact_digest(root) if root.is_dir() else str(root)
    settings = {"max_new_tokens": limit, "context": loading.context}  # which questions: the data's digest says that
    if not served:  # what else changes answers, where it is not as usual
        usual = LoadOptions()
        settings |= {
            name: getattr(loading, name)
            for name in ("kv", "provider", "latents")
            if getattr(loading, name) != getattr(usual, name)
        }
    return Identity(
        task.name,
        artefact,
        f"{arguments.backend} {loading.device}",
        checked.whole,
        json.dumps(settings, sort_keys=True),
    )


def _name(arguments: argparse.Namespace, task: Task, identity: Identity) -> str:
    import hashlib

    short = hashlib.sha256(json.dumps(vars(identity), sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "-", str(arguments.artifact).split("://")[-1].rstrip("/").rpartition("/")[2])
    return f"{task.name}-{name}-{short}"


def _report(
    arguments: argparse.Namespace,
    root: Path,
    task: Task,
    identity: Identity,
    answers: dict[str, dict[str, Any]],
    options: EvalOptions,
    timing: dict[str, Any],
) -> int:
    benchmark = BENCHMARKS[task.name]
    mode = (options.mode if benchmark.strict else "") or benchmark.mode
    records = [record_of(item, answers[item.id], mode, task.name) for item in task.items]
    if options.mode and benchmark.strict is None:
        note(f"{task.name}: replies are read in one way only; --mode plays no part")
    if options.judge:
        from runtime.judge import judge

        records = judge(records, options.judge, root)
    write_atomic(root / "samples.jsonl", b"".join(json_line(record) for record in records))
    submission = _submit(root, task, answers)
    if all(record["truth"].get("answer", record["truth"].get("answers")) is None for record in records):
        note(f"{task.name}: this split has no answers; {submission or root / 'samples.jsonl'} holds the replies")
        value = {"task": task.name, "n": len(records), "score": None, "interval": None, "out": str(root)}
    else:
        value = result(task.name, benchmark.summarise(records), records, mode)
        value |= {"artifact": str(arguments.artifact), "out": str(root), "identity": vars(identity)}
        value["judge"] = options.judge or None
        _print(value)
    value |= {"note": task.note, "submission": submission, **timing}
    write_atomic(root / "result.json", json.dumps({"schema": SCHEMA, **value}, indent=1) + "\n")
    note(f"answers and scores: {root / 'samples.jsonl'}")
    if arguments.json:
        print_json(value)
    return 0


def record_of(item: Item, answer: dict[str, Any], mode: str, name: str) -> Record:
    """A line of samples.jsonl: the question, the answer, and what it is worth."""
    record: Record = {"id": item.id, "prompt": item.prompt, "group": item.group, "truth": item.truth}
    record |= {key: answer[key] for key in ("prediction", "finish", "tokens", "ms", "error") if key in answer}
    if answer.get("error"):  # not asked: wrong, whatever an empty reply would count as
        return {**record, "score": 0.0, "parsed": None}
    return scored(BENCHMARKS[name], record, mode)


def result(name: str, summary: Summary, records: Sequence[Record], mode: str) -> dict[str, Any]:
    """What `--json` prints: the score with its interval, and the breakdown."""
    parts: dict[str, Any] = {}
    for part_name, part in summary.parts.items():
        parts[part_name] = {"score": part.score, "n": part.n}
        if part.values:
            parts[part_name]["interval"] = share_interval(part.values)
    return {
        "task": name,
        "n": summary.n,
        "score": summary.score,
        "interval": summary_interval(summary) if summary.units else None,
        "metric": summary.metric,
        "unit": summary.unit,
        "mode": mode,
        "questions": len(records),
        "unread": sum(1 for r in records if r["parsed"] is None and "options" in r["truth"]),
        "not_asked": sum(1 for r in records if r.get("error")),
        "parts": parts,
    }


def _print(value: dict[str, Any]) -> None:
    points = value["unit"] == "points"
    show = (lambda x: f"{x:.1f}") if points else (lambda x: f"{100 * x:.1f} %")
    low, high = value["interval"] or (value["score"], value["score"])
    print(f"{value['task']}: {show(value['score'])} {value['metric']}, n = {value['n']}, 95 % interval", end=" ")
    reading = f" ({value['mode']} reading)" if BENCHMARKS[value["task"]].strict else ""
    print(f"{show(low)} to {show(high)}{reading}")
    rows = []
    for name, part in list(value["parts"].items())[:SHOWN]:
        interval = part.get("interval")
        cell = f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""
        whole = points or part["score"] > 1
        rows.append([name, str(part["n"]), f"{part['score']:.1f}" if whole else f"{100 * part['score']:.1f} %", cell])
    if rows:
        print(table(["part", "n", "score", "95 % interval"], rows))
    if (left := len(value["parts"]) - len(rows)) > 0:
        print(f"... {left} more in result.json")
    if value["not_asked"]:
        print(f"{value['not_asked']} questions could not be asked (see `error` in samples.jsonl) and count as wrong")
    if value["unread"] - value["not_asked"] > 0:
        print(f"{value['unread'] - value['not_asked']} replies name no option and count as wrong")


def _submit(root: Path, task: Task, answers: dict[str, dict[str, Any]]) -> str | None:
    """MMBench's upload file: the first form of each question with the reply."""
    if not task.submission:
        return None
    from runtime.spreadsheet import write_xlsx

    rows = []
    for item, row in zip(task.items, task.submission, strict=True):
        if row["main"]:
            last = [key for key in ("answer", "split") if key in row]
            columns: dict[str, Any] = {key: row[key] for key in row if key not in ("main", *last)}
            columns["prediction"] = answers[item.id]["prediction"]
            columns |= {key: row[key] for key in last}
            rows.append(columns)
    path = root / "submission.xlsx"
    write_xlsx(path, rows)
    return str(path)
