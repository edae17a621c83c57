"""Several processes (gloo, DDP and FSDP2) train as one does with the same global batch, all four terms, unequal lengths."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from distill import processes
from distill.config import Align, TrainConfig
from distill.report import read_metrics
from distill.run import load_run
from distill.stages import read_plan
from distill.stored import config_to_json
from distill.train import train
from tests.tiny import make_student
from vlm import digits
from vlm.errors import UserError

ROOT = Path(__file__).parent.parent.parent
STEPS = 20
SIZES = {"hidden": 64, "head_dim": 16, "intermediate": 96, "spread": 3.0}
CHILD = """
import json, sys
from pathlib import Path
from distill import processes
from distill.stored import config_from_json
from distill.train import train
for path in sys.argv[1:]:
    train(config_from_json(json.loads(Path(path).read_text())))
processes.leave()
"""


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, student with a tied head, and a data set in which samples with and without an image alternate."""
    folder = tmp_path_factory.mktemp("pieces")
    make_student(folder / "teacher", seed=1, layers=2, **SIZES)
    make_student(folder / "student", seed=2, layers=2, tied=True, **SIZES)
    records = []
    for index in range(40):
        sample = digits.sample("train", index)
        sample.image.save(folder / f"{index}.png")
        answer = " ".join([sample.answer] * (1 + index % 5))
        turns = [{"from": "human", "value": f"<image>\n{sample.question}"}, {"from": "gpt", "value": answer}]
        records.append({"image": f"{index}.png", "conversations": turns})
        if index % 2:
            turns = [{"from": "human", "value": "What is 1 + 2?"}, {"from": "gpt", "value": "1 + 2 = 3"}]
            records.append({"conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def recipe(pieces: Path, out: Path, **changes: Any) -> TrainConfig:
    base = TrainConfig(
        teacher=str(pieces / "teacher"),
        student=str(pieces / "student"),
        data=pieces / "data.json",
        out=out,
        steps=STEPS,
        batch_size=2,
        accumulate=2,
        lr=1e-3,
        save_every=100,
        log_every=1,
        threads=1,
        report_to="none",
        visual_every=10,
        visual_samples=8,
        # few positions get candidates, so that a micro-batch of one process may have none at all
        align=Align(iva_layer=0, tpa_share=0.2, candidates=2),
        group_by_length=False,
    )
    return dataclasses.replace(base, **changes)


def launch(folder: Path, configs: list[TrainConfig]) -> subprocess.CompletedProcess[str]:
    """Run configurations one after another in two processes that a launcher starts."""
    paths = []
    for number, config in enumerate(configs):
        paths.append(folder / f"config-{number}.json")
        paths[-1].write_text(json.dumps(config_to_json(config)))
    (folder / "child.py").write_text(CHILD)
    return torchrun(str(folder / "child.py"), *map(str, paths))


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


NUMBERS = ("loss", "sft", "kd", "iva", "tpa", "grad_norm", "visual_gain", "visual_gain_teacher")


def assert_same_curve(one: Path, other: Path) -> None:
    ours, theirs = (read_metrics(run / "metrics.jsonl") for run in (one, other))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    compared = 0
    for a, b in zip(ours, theirs, strict=True):
        for name in NUMBERS:
            assert (name in a) == (name in b)
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), (name, a["step"])
                compared += 1
    assert compared == 6 * STEPS + 2 * 2
    first, second = (load_file(run / "student" / "model.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert float((second[name] - value).abs().max()) < 2e-4, name


def test_two_processes_give_the_curve_of_one(pieces: Path, tmp_path: Path) -> None:
    whole = recipe(pieces, tmp_path / "one", batch_size=4)
    train(whole)
    copied = recipe(pieces, tmp_path / "ddp")
    sharded = recipe(pieces, tmp_path / "fsdp", fsdp=True)
    # one launch for both: starting Python twice in two processes takes longer than the training
    done = launch(tmp_path, [copied, sharded])
    assert done.returncode == 0, done.stderr
    assert "2 processes, each with a copy of the student" in done.stderr
    assert "2 processes, the student sharded over them" in done.stderr
    assert_same_curve(whole.out, copied.out)
    assert_same_curve(whole.out, sharded.out)


def test_stages_run_in_several_processes(pieces: Path, tmp_path: Path) -> None:
    """The plan is written once, whoever comes first, and every stage starts when the one before is whole."""
    names = ("student", "data", "batch_size", "lr", "threads", "report_to")
    shared = {name: str(getattr(recipe(pieces, tmp_path), name)) for name in names}
    lines = [f"{name}: {value}" for name, value in shared.items()]
    lines += ["steps: 2", "visual_every: 0", "objective: sft", "group_by_length: false", "stages:"]
    lines += ["  - name: first", "  - name: second"]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    out = tmp_path / "run"
    done = torchrun("-m", "distill", "train", "--config", str(tmp_path / "recipe.yaml"), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert [stage.name for stage in read_plan(out)] == ["first", "second"]
    whole, last, first = (
        load_file(out / folder / "model.safetensors")
        for folder in ("student", "stage-2-second/student", "stage-1-first/student")
    )
    assert all((value == last[name]).all() for name, value in whole.items())
    assert any((value != first[name]).any() for name, value in whole.items())


def test_every_process_needs_a_batch(pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 samples fill one batch of 40, not one in each of two processes."""
    config = recipe(pieces, tmp_path / "run", objective="sft", batch_size=40)
    assert len(load_run(config).data.train) == 60
    monkeypatch.setattr(processes, "world", lambda: 2)
    with pytest.raises(UserError, match="60 training samples do not fill one batch of 40 in each of 2 processes"):
        load_run(config)
