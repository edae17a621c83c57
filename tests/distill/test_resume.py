"""A run that is killed, interrupted or out of disk goes on from its last whole checkpoint to the same bits."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import checkpoint
from distill.config import TrainConfig
from distill.train import train
from distill.trainer import DistillTrainer
from tests.distill import killing
from vlm.errors import UserError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    torch.set_num_threads(1)
    return dataclasses.replace(killing.recipe(tmp_path_factory.mktemp("models")), eval_every=0, final="last")


def test_runs_killed_at_random_calls_end_with_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every second kill falls inside saving; the long version is scripts/kill-resume."""
    told: list[str] = []
    found = killing.kill_and_compare(tmp_path, kills=4, seed=1, tell=told.append)
    assert not found
    assert sum(line.startswith("kill ") for line in told) == 4


def test_a_killer_that_changes_nothing_would_be_noticed(config: TrainConfig, tmp_path: Path) -> None:
    """The comparison itself: another seed is another run."""
    one, other = (dataclasses.replace(config, out=tmp_path / str(s), seed=s, steps=2) for s in (0, 1))
    train(one)
    train(other)
    assert killing.differences(one.out, other.out)


def save_failing_at(monkeypatch: pytest.MonkeyPatch, step: int, where: str) -> None:
    """From `step` on, writing a checkpoint fails as on a full disk."""
    owner, name = {"weights": (checkpoint, "save_student"), "publishing": (checkpoint, "fsync_path")}[where]
    original = getattr(owner, name)
    now: list[int] = []
    begin = DistillTrainer._save_checkpoint

    def save(self: DistillTrainer, *rest: Any) -> None:
        now[:] = [self.state.global_step]
        begin(self, *rest)

    def fail(*arguments: Any, **named: Any) -> Any:
        if now and now[0] >= step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **named)

    monkeypatch.setattr(DistillTrainer, "_save_checkpoint", save)
    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("where", ["weights", "publishing"])
def test_a_full_disk_keeps_the_last_checkpoint(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    run = dataclasses.replace(config, out=tmp_path / "run", steps=6, keep_checkpoints=1)
    save_failing_at(monkeypatch, 4, where)
    with pytest.raises(UserError, match=r"disk full.*checkpoint-2 is whole.*--resume"):
        train(run)
    monkeypatch.undo()
    assert [path.name for path in checkpoint.complete(run.out)] == ["checkpoint-2"]
    assert not checkpoint.writing(run.out).exists()
    whole = dataclasses.replace(run, out=tmp_path / "whole")
    train(whole)
    train(dataclasses.replace(run, resume=True))
    assert not killing.differences(whole.out, run.out)


def test_old_checkpoints_go_only_after_the_new_one_is_whole(config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for step in (2, 4, 6):
        work = checkpoint.writing(out) / f"checkpoint-{step}"
        work.mkdir(parents=True)
        (work / "weights").write_text("w" * step)
        checkpoint.publish(out, step, 1.5, keep=2)
    assert [path.name for path in checkpoint.complete(out)] == ["checkpoint-4", "checkpoint-6"]
    # half-deleted and half-written ones are neither taken for whole nor left lying about
    (checkpoint.folder(out) / "checkpoint-8").mkdir()
    (checkpoint.writing(out) / "checkpoint-10").mkdir(parents=True)
    last = checkpoint.last(out)
    assert last is not None
    assert last.name == "checkpoint-6"
    assert sorted(path.name for path in checkpoint.folder(out).iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_sigterm_writes_a_checkpoint_as_ctrl_c_does(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dataclasses.replace(config, out=tmp_path / "run", steps=6, save_every=100)
    original = DistillTrainer.training_step

    def terminate(self: DistillTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2 and not sent:
            sent.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    sent: list[signal.Signals] = []
    monkeypatch.setattr(DistillTrainer, "training_step", terminate)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    assert [path.name for path in checkpoint.complete(run.out)] == ["checkpoint-3"]


def test_resuming_with_another_number_of_processes_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    run = dataclasses.replace(config, out=tmp_path / "run", steps=4)
    train(run)
    other = dataclasses.replace(run, out=tmp_path / "other")
    state = checkpoint.folder(other.out) / "checkpoint-2"
    state.mkdir(parents=True)
    (state / checkpoint.COMPLETE).write_text(json.dumps({"seconds": 1.0, "processes": 2}))
    (other.out / "config.json").write_text((run.out / "config.json").read_text())
    with pytest.raises(UserError, match="2 processes"):
        train(dataclasses.replace(other, resume=True))


def test_a_run_goes_on_without_the_folder_its_optimiser_state_came_from(config: TrainConfig, tmp_path: Path) -> None:
    first = dataclasses.replace(config, objective="sft", out=tmp_path / "first", steps=4)
    killing.stop_after(first, 2)
    whole = dataclasses.replace(first, out=tmp_path / "whole", optim_state=checkpoint.complete(first.out)[0])
    train(whole)
    cut, early = (dataclasses.replace(whole, out=tmp_path / name) for name in ("cut", "early"))
    killing.stop_after(cut, 3)
    shutil.copytree(cut.out, early.out, ignore=shutil.ignore_patterns("checkpoint-*"))
    shutil.rmtree(first.out)
    train(dataclasses.replace(cut, resume=True))
    assert not killing.differences(whole.out, cut.out)
    # nothing of its own to go on from: it would silently become another run
    with pytest.raises(UserError, match="no optimiser state"):
        train(dataclasses.replace(early, resume=True))


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (b"", "is damaged"),
        (b"no such file", "is damaged"),
        ({"param_groups": [], "cut": True}, "is damaged"),
        ([1], "holds no state of an optimiser"),
        ({"weight": torch.ones(2)}, "holds no state of an optimiser"),
        ({"state": {}, "param_groups": [1]}, "holds no state of an optimiser"),
        ({"state": {}, "param_groups": [{"params": [0]}]}, "no parameter names"),
    ],
)
def test_a_damaged_optimiser_state_is_refused_before_anything_is_written(
    config: TrainConfig, tmp_path: Path, value: Any, seen: str
) -> None:
    path = tmp_path / "optimizer.pt"
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        torch.save(value, path)
        if "cut" in value:
            path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=seen) as caught:
        train(dataclasses.replace(config, objective="sft", out=tmp_path / "run", optim_state=tmp_path))
    assert "\n" not in caught.value.message
    assert "drop --optim_state" in caught.value.message
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_a_student_to_start_from(config: TrainConfig, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    cut = dataclasses.replace(config, out=tmp_path / "cut", steps=4)
    killing.stop_after(cut, 2)
    (kept,) = checkpoint.complete(cut.out)
    AutoProcessor.from_pretrained(kept)
    model, info = AutoModelForImageTextToText.from_pretrained(kept, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    anew = dataclasses.replace(config, student=str(kept), out=tmp_path / "anew", steps=1, lr=1e-5)
    result = train(anew)
    again = AutoModelForImageTextToText.from_pretrained(result.student)
    assert not torch.equal(again.lm_head.weight, model.lm_head.weight), "a run of one step trains"
    torch.testing.assert_close(again.lm_head.weight, model.lm_head.weight, atol=2e-5, rtol=0)


def test_of_equal_scores_the_later_is_better() -> None:
    for metric in ("exact_match", "loss"):
        assert checkpoint.Score(2, metric, 0.0).beats(checkpoint.Score(1, metric, 0.0))
    assert not checkpoint.Score(2, "exact_match", 0.1).beats(checkpoint.Score(1, "exact_match", 0.2))
    assert not checkpoint.Score(2, "loss", 0.2).beats(checkpoint.Score(1, "loss", 0.1))


def test_the_best_student_is_kept_and_used_when_asked(config: TrainConfig, tmp_path: Path) -> None:
    run = dataclasses.replace(
        config, out=tmp_path / "run", steps=6, warmup=0.2, eval_every=2, lr=0.3, keep_best="loss", final="best"
    )
    train(run)
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    held_out = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min(held_out, key=lambda step: held_out[step])
    assert best != max(held_out), "the rate was meant to be too high to end with the best student"
    last = dataclasses.replace(run, out=tmp_path / "last", steps=6, final="last")
    train(last)
    assert killing.differences(run.out, last.out)
    kept = checkpoint.best(last.out)
    assert kept is not None
    assert (kept.step, kept.metric, kept.value) == (best, "loss", held_out[best])
    from safetensors.torch import load_file

    stored = load_file(last.out / "best" / f"step-{best}" / "model.safetensors")
    used = load_file(run.out / "student" / "model.safetensors")
    assert stored.keys() == used.keys()
    assert all(torch.equal(value, used[name]) for name, value in stored.items())


def test_a_run_killed_after_its_last_step_takes_no_other(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill import train as module

    whole = dataclasses.replace(config, out=tmp_path / "whole", steps=3)
    train(whole)
    cut = dataclasses.replace(whole, out=tmp_path / "cut")

    def die(*_: Any) -> None:
        raise RuntimeError("killed here")

    monkeypatch.setattr(module, "_finish", die)
    with pytest.raises(RuntimeError, match="killed here"):
        train(cut)
    monkeypatch.undo()
    assert [path.name for path in checkpoint.complete(cut.out)] == ["checkpoint-2", "checkpoint-3"]
    train(dataclasses.replace(cut, resume=True))
    assert not killing.differences(whole.out, cut.out)
