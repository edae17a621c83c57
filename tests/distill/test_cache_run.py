"""`distill cache` and training from what it wrote: curves, resume after SIGKILL, refusals by name."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill import cache_run
from distill.cache import open_cached
from distill.cache_build import CacheOptions
from distill.cache_codec import Compression
from distill.cache_command import main
from distill.cache_run import build
from distill.cache_store import INFO, Missing, Reader
from distill.cache_verify import verify
from distill.config import Align, TrainConfig
from distill.methods import LavitOptions
from distill.report import read_metrics
from distill.train import train
from tests.distill import data_sets
from vlm.errors import GateFailed, UserError
from vlm.load import open_checkpoint

ROOT = Path(__file__).parent.parent.parent
SIZES = {"hidden": 64, "head_dim": 16, "intermediate": 96, "spread": 2.0}
SAMPLES = 24
# flat random models are the worst case for compression: keep many tokens
CLOSE = Compression(300, 60, 0.0)


@pytest.fixture(scope="module", autouse=True)
def _few_samples_measured() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_run, "PROBE", 16)
        yield


def tiny(models: Path, out: Path, **changes: Any) -> TrainConfig:
    base = TrainConfig(
        preset="digits",
        teacher=str(models / "teacher"),
        student=str(models / "student"),
        out=out,
        objective="kd+iva",
        steps=5,
        batch_size=4,
        lr=1e-3,
        samples=SAMPLES,
        eval_samples=8,
        eval_every=3,
        log_every=1,
        visual_every=0,
        threads=1,
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def caches(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, cache_run.Built]:
    folder = tmp_path_factory.mktemp("caches")
    options = {
        "whole": CacheOptions(all_logits=True, candidates=3),
        "short": CacheOptions(CLOSE, CLOSE),
        "default": CacheOptions(),
        "blind": CacheOptions(visual_share=0),
    }
    return {name: build(tiny(models, folder / name), made, (0, 1), False) for name, made in options.items()}


def curve(config: TrainConfig) -> list[dict[str, float]]:
    train(config)
    return read_metrics(config.out / "metrics.jsonl")


def test_a_run_from_all_logits_is_the_live_run(
    models: Path, caches: dict[str, cache_run.Built], tmp_path: Path
) -> None:
    live = curve(tiny(models, tmp_path / "live"))
    whole = curve(tiny(models, tmp_path / "whole", teacher_cache=caches["whole"].out))
    terms = [name for name in ("kd", "iva", "eval_kd", "eval_iva") for line in live if name in line]
    assert len(terms) > 10
    for name in dict.fromkeys(terms):
        steps = [(a[name], b[name]) for a, b in zip(live, whole, strict=True) if name in a]
        assert all(b == pytest.approx(a, rel=2e-5) for a, b in steps)
    found = verify(tiny(models, tmp_path / "unused"), caches["whole"].out, 3)
    assert all(item.within == item.steps == 3 for item in found.terms.values())


STEPS = 20


@pytest.mark.parametrize("cache", ["short", "default"])
def test_losses_from_a_cache_stay_within_their_bound_at_every_step_of_a_live_run(
    models: Path, caches: dict[str, cache_run.Built], tmp_path: Path, cache: str
) -> None:
    # the bound of a mean over a few rows is wider: every visual row, so that it is the cache's alone
    config = tiny(models, tmp_path / "unused", lr=3e-3, align=Align(iva_rows=0))
    found = verify(config, caches[cache].out, STEPS)
    assert set(found.terms) == {"kd", "iva"}
    for item in found.terms.values():
        assert item.within == item.steps == STEPS
        assert item.bound is not None
        # neither empty nor so wide that it says nothing; the default keeps few tokens of such flat rows
        assert item.error < item.bound < {"short": 0.1, "default": 2.0}[cache]
    found.refuse_misses()


def test_a_run_from_a_cache_logs_its_own_bound(
    models: Path, caches: dict[str, cache_run.Built], tmp_path: Path
) -> None:
    lines = curve(tiny(models, tmp_path / "run", teacher_cache=caches["short"].out))
    for name in ("kd", "iva", "eval_kd", "eval_iva"):
        found = [line[f"{name}_bound"] for line in lines if name in line]
        assert found
        assert all(bound > 0 for bound in found)
    student = json.loads((tmp_path / "run" / "student" / "vlm.json").read_text())
    assert student["teacher"]["sha256"] == open_checkpoint(models / "teacher").weights_sha256()


def test_a_share_of_the_visual_rows_has_no_bound(models: Path, tmp_path: Path) -> None:
    made = build(tiny(models, tmp_path / "cache"), CacheOptions(visual_share=0.5), (0, 1), False)
    found = verify(tiny(models, tmp_path / "unused"), made.out, 2)
    assert found.terms["kd"].within == 2
    assert found.terms["iva"].within is None
    assert "iva: " in found.text
    found.refuse_misses()


def test_a_cache_of_every_objective_is_verified_without_what_it_cannot_follow(
    models: Path, caches: dict[str, cache_run.Built], tmp_path: Path
) -> None:
    """Neither tpa nor settings of latents keep a cache of kd and iva from being held against the live teacher."""
    found = verify(tiny(models, tmp_path / "unused", objective="align-ti"), caches["short"].out, 2)
    assert {name: (item.within, item.steps) for name, item in found.terms.items()} == {"kd": (2, 2), "iva": (2, 2)}
    watching = tiny(models, tmp_path / "gaze", objective="kd+lavit", lavit=LavitOptions(latents=8))
    made = build(watching, CacheOptions(CLOSE, CLOSE, looks=8, look_layers=8), (0, 1), False)
    found = verify(dataclasses.replace(watching, out=tmp_path / "again"), made.out, 2)
    assert found.terms["kd"].within == 2


def test_offline_tpa_trains_on_the_stored_candidates(
    models: Path, caches: dict[str, cache_run.Built], tmp_path: Path
) -> None:
    align = Align(candidates=3)
    steps = curve(
        tiny(models, tmp_path / "run", teacher_cache=caches["whole"].out, objective="align-ti", align=align, steps=2)
    )
    assert all(line["tpa"] > 0 for line in steps if "tpa" in line)
    assert any("tpa" in line for line in steps)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("short", {"align": Align(temperature=2.0)}, r"run: temperature \(cache 1.0, now 2.0; set --align.temp"),
        ("short", {"align": Align(iva_layer=5)}, r"run: IVA layer \(cache \d, now 5"),
        ("short", {"align": Align(direction="reverse")}, "--all_logits, or use forward"),
        ("short", {"objective": "align-ti"}, r"--candidates 4 .*live teacher, or --objective kd\+iva"),
        ("whole", {"objective": "align-ti"}, r"--candidates 4 "),
        ("blind", {"objective": "kd+iva"}, "--visual_share 1"),
    ],
)
def test_what_a_cache_cannot_serve_is_refused_by_name(
    models: Path, caches: dict[str, cache_run.Built], name: str, changes: dict[str, Any], reason: str
) -> None:
    config = tiny(models, Path("unused"), teacher_cache=caches[name].out, **changes)
    with pytest.raises(UserError, match=reason):
        open_cached(config, open_checkpoint(models / "student"), None, "cpu")


def edited(source: Path, target: Path, file: str, old: str, new: str) -> Path:
    shutil.copytree(source, target)
    text = (target / file).read_text()
    assert old in text
    (target / file).write_text(text.replace(old, new, 1))
    return target


def test_a_student_that_sees_something_else_is_refused_by_name(
    models: Path, caches: dict[str, cache_run.Built], tmp_path: Path
) -> None:
    config = tiny(models, Path("unused"), teacher_cache=caches["short"].out)
    student = models / "student"
    swapped = tmp_path / "a"
    shutil.copytree(student, swapped)
    tokenizer = json.loads((swapped / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    one, two = list(words)[-2:]
    words[one], words[two] = words[two], words[one]
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer))
    other = {
        "tokenizer": swapped,
        "chat template": edited(student, tmp_path / "b", "chat_template.jinja", "{", " {"),
        "image processor": edited(student, tmp_path / "c", "processor_config.json", "0.5", "0.25"),
    }
    for part, folder in other.items():
        with pytest.raises(UserError, match=f"does not fit this run: {part} .*make a new cache"):
            open_cached(config, open_checkpoint(folder), None, "cpu")
    with pytest.raises(UserError, match="does not fit this run: teacher weights"):
        open_cached(config, open_checkpoint(student), open_checkpoint(student), "cpu")


def test_another_teacher_or_other_options_do_not_go_into_the_same_cache(
    models: Path, caches: dict[str, cache_run.Built]
) -> None:
    out = caches["short"].out
    with pytest.raises(UserError, match=r"run: options of storage .*top_k: 300.*top_k: 64"):
        build(tiny(models, out), CacheOptions(), (0, 1), False)
    with pytest.raises(UserError, match="does not fit this run: teacher weights"):
        build(tiny(models, out, teacher=str(models / "student")), CacheOptions(CLOSE, CLOSE), (0, 1), False)
    with pytest.raises(UserError, match=r"run: teacher dtype .cache float32, now bfloat16"):
        build(tiny(models, out, teacher_dtype="bfloat16"), CacheOptions(CLOSE, CLOSE), (0, 1), False)


def test_a_sample_that_is_not_there_is_named(models: Path, caches: dict[str, cache_run.Built], tmp_path: Path) -> None:
    config = tiny(models, tmp_path / "run", teacher_cache=caches["short"].out, samples=SAMPLES + 40)
    with pytest.raises(Missing, match=r"holds nothing for sample [0-9a-f]{16} \(record \d+\); run `python -m distill"):
        train(config)


def test_a_cache_of_a_stream_holds_what_training_asks_for(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = data_sets.WRITERS["messages parquet shards"](tmp_path / "rows", data_sets.samples(20))
    stream: dict[str, Any] = {"data": rows, "streaming": True, "eval_every": 0, "steps": 2, "align": Align(iva_layer=1)}
    made = build(tiny(models, tmp_path / "made", **stream, accumulate=2), CacheOptions(), (0, 1), False)
    assert made.samples == 2 * 4 * 2
    train(tiny(models, tmp_path / "run", **stream, accumulate=2, teacher_cache=made.out))


def test_estimate_and_full_disk(models: Path, caches: dict[str, cache_run.Built], tmp_path: Path) -> None:
    out = tmp_path / "cache"
    dry = build(tiny(models, out), CacheOptions(CLOSE, CLOSE), (0, 1), True)
    assert not out.exists()
    assert dry.estimate_bytes == pytest.approx(caches["short"].bytes, rel=0.25)
    assert "nothing was written" in dry.text
    with pytest.MonkeyPatch.context() as patch:
        usage = namedtuple("usage", "free")
        patch.setattr("distill.cache_run.shutil.disk_usage", lambda _: usage(cache_run.LEFT_FREE + 100))
        with pytest.raises(UserError, match="free space, choose another --out, or store less"):
            build(tiny(models, out), CacheOptions(CLOSE, CLOSE), (0, 1), False)


RUN = """
import sys
from pathlib import Path
from distill import cache_store
from distill.cache_command import main
flush = cache_store.Writer.flush
def watched(self):
    flush(self)
    if self._number == 2 and sys.argv[2] == "kill":
        import os
        os.kill(os.getpid(), 9)
cache_store.Writer.flush = watched
cache_store.PART_BYTES = 1
sys.exit(main(sys.argv[3:] + ["--out", sys.argv[1]]))
"""


def test_a_killed_command_goes_on_and_two_shards_are_one_cache(models: Path, tmp_path: Path) -> None:
    options = ["--preset", "digits", "--teacher", str(models / "teacher"), "--student", str(models / "student")]
    options += [
        "--samples",
        "9",
        "--eval_samples",
        "2",
        "--batch_size",
        "1",
        "--align.iva_layer",
        "1",
        "--threads",
        "1",
    ]

    def run(folder: str, kill: str, *more: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", RUN, str(tmp_path / folder), kill, *options, *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert run("one", "kill").returncode == -signal.SIGKILL
    assert len(Reader(tmp_path / "one")) == 2
    again = run("one", "go", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["added"] == 9
    for shard in ("0/2", "1/2"):
        assert main([*options, "--shard", shard, "--out", str(tmp_path / "two")]) == 0
    one, two = Reader(tmp_path / "one"), Reader(tmp_path / "two")
    assert len(one) == 11
    assert set(one) == set(two)
    assert json.loads((tmp_path / "one" / INFO).read_text())["fingerprint"] == two.info["fingerprint"]
    for key in one:
        mine, theirs = one.get(key), two.get(key)
        assert mine.weight_J.tolist() == theirs.weight_J.tolist()
        assert mine.rows.code_M.tolist() == theirs.rows.code_M.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--preset", "digits"], "--out DIR"),
        (["--out", "c"], "--teacher DIR or --preset digits"),
        (["--preset", "digits", "--out", "c", "--shard", "2/2"], "--shard is I/N"),
        (["--preset", "digits", "--out", "c", "--top_k", "0", "--tail", "0"], "at least one token"),
        (["--preset", "digits", "--out", "c", "--visual_share", "2"], "from 0 to 1"),
        (["--preset", "digits", "--out", "c", "--teacher_cache", "d"], "drop --teacher_cache"),
        (["--out", "c", "--resume"], "goes on by itself"),
        (["--preset", "digits", "--out", "c", "--verify", "2", "--dry_run"], "a cache that is written"),
    ],
)
def test_a_wrong_command_line_is_one_line(words: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        main(words)


def test_a_cache_of_another_teacher_leaves_the_bound(
    models: Path, caches: dict[str, cache_run.Built], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(models / "teacher", other)
    weights = load_file(other / "model.safetensors")
    torch.manual_seed(0)
    save_file(
        {name: value * (1 + 0.5 * torch.randn_like(value)) for name, value in weights.items()},
        other / "model.safetensors",
        {"format": "pt"},
    )
    layer = open_cached(
        tiny(models, tmp_path / "x", teacher_cache=caches["default"].out),
        open_checkpoint(models / "student"),
        None,
        "cpu",
    ).layer
    align = Align(iva_layer=layer)
    config = tiny(models, tmp_path / "cache", teacher=str(other), align=align)
    made = build(config, CacheOptions(CLOSE, CLOSE), (0, 1), False)
    info = json.loads((made.out / INFO).read_text())
    info["fingerprint"]["teacher"] = open_checkpoint(models / "teacher").weights_sha256()
    (made.out / INFO).write_text(json.dumps(info))
    found = verify(tiny(models, tmp_path / "unused", align=align), made.out, 4)
    assert all(item.within is not None and item.within < item.steps for item in found.terms.values())
    with pytest.raises(GateFailed, match=r"left its bound \(kd, iva\)"):
        found.refuse_misses()
