"""Runs and commands in bad company: data that changed, disks that fill up, cut files, options in the wrong place."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from distill import checkpoint, cli, report_data, steptime
from distill.__main__ import main
from distill.cache_build import CacheOptions
from distill.cache_command import main as cache
from distill.cache_run import build
from distill.check_steps import disk
from distill.config import Lora, TrainConfig
from distill.run import load_run
from distill.train import DATA, train
from tests.distill import data_sets
from tests.distill.conftest import interrupt_at
from vlm.errors import UserError
from vlm.files import atomic_dir


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "surveys"))


def tiny(models: Path, out: Path, **changes: Any) -> TrainConfig:
    base = TrainConfig(
        student=str(models / "student"),
        out=out,
        objective="sft",
        steps=4,
        batch_size=2,
        save_every=2,
        log_every=1,
        visual_every=0,
        threads=1,
        report_to="none",
    )
    return dataclasses.replace(base, **changes)


def write(folder: Path, order: int) -> Path:
    turns = [
        [{"from": "human", "value": f"What is {i} + {order}?"}, {"from": "gpt", "value": str(i + order)}]
        for i in range(12)
    ]
    return data_sets.json_list(folder / "d.json", [{"conversations": turn} for turn in turns])


def test_a_run_whose_data_changed_does_not_go_on(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained on could be held out now."""
    data = write(tmp_path, 1)
    config = tiny(models, tmp_path / "run", data=data, holdout=3)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    write(tmp_path, 2)
    with pytest.raises(UserError, match=r"the data of .*run has changed since it was begun"):
        train(dataclasses.replace(config, resume=True))
    write(tmp_path, 1)
    assert train(dataclasses.replace(config, resume=True)).student.is_dir()
    assert json.loads((config.out / DATA).read_text())["train"]["content_sha256"]


def test_a_cache_is_completed_by_content(models: Path, tmp_path: Path) -> None:
    """A stream's description is its path: other rows under it are other samples."""
    rows = data_sets.WRITERS["messages parquet shards"](tmp_path / "a", data_sets.samples(8))
    data_sets.WRITERS["messages parquet shards"](tmp_path / "b", data_sets.samples(16)[8:])
    config = tiny(
        models, tmp_path / "cache", data=rows, streaming=True, objective="kd", teacher=str(models / "teacher")
    )
    first = build(config, CacheOptions(), (0, 1), False)
    assert build(config, CacheOptions(), (0, 1), False).added == 0
    for path in (tmp_path / "a").rglob("*.parquet"):
        path.unlink()
    for path in sorted((tmp_path / "b").rglob("*.parquet")):
        shutil.copy(path, tmp_path / "a" / path.relative_to(tmp_path / "b"))
    again = build(config, CacheOptions(), (0, 1), False)
    assert first.added > 0
    assert again.added > 0
    trained = dataclasses.replace(config, out=tmp_path / "run", teacher_cache=config.out, teacher=None)
    assert train(trained).student.is_dir()


def test_a_stage_after_the_first_may_be_cached(models: Path, tmp_path: Path) -> None:
    recipe = {
        "preset": "digits",
        "teacher": str(models / "teacher"),
        "samples": 8,
        "steps": 2,
        "batch_size": 4,
        "stages": [
            {"name": "a", "objective": "kd", "student": str(models / "student")},
            {"name": "b", "objective": "kd"},
        ],
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    assert cache(["--config", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "cache")]) == 0


def test_a_step_is_all_its_micro_batches(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal time would give a variant with accumulate as many steps as one without."""
    seen: list[int] = []
    original = steptime.batches
    monkeypatch.setattr(
        steptime, "batches", lambda e, indices, *rest: (seen.append(len(indices)), original(e, indices, *rest))[1]
    )
    config = tiny(models, tmp_path / "x", preset="digits", samples=8)
    found = steptime.measure({"one": config, "three": dataclasses.replace(config, accumulate=3)}, 2, warmup=0)
    assert set(found) == {"one", "three"}
    assert seen == [2, 6, 2, 6]


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8452224 vs 8452112"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
)
def test_a_full_disk_in_the_words_of_the_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert checkpoint.out_of_space(error, tmp_path)
    if isinstance(error, SafetensorError):
        with pytest.raises(UserError, match="disk full while writing"), atomic_dir(tmp_path / "student"):
            raise error
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1 << 40))
    assert checkpoint.out_of_space(error, tmp_path) is isinstance(error, SafetensorError)


def test_metrics_that_find_no_room(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "DISK_FULL", (21,))  # EISDIR stands for ENOSPC
    config = tiny(models, tmp_path / "run", data=write(tmp_path, 1))
    (config.out / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"disk full while writing a checkpoint under .*run"):
        train(config)


def test_checkpoints_of_adapters_are_small(models: Path, tmp_path: Path) -> None:
    config = tiny(models, tmp_path / "run", preset="digits", samples=8, eval_every=2)
    whole = disk(config, load_run(config).student, 2)
    adapted = dataclasses.replace(config, lora=Lora(r=2))
    student = load_run(adapted).student
    small = disk(adapted, student, 2)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert small.checkpoint < whole.checkpoint / 2
    assert small.best == 4 * trained < whole.best


def test_the_machine_that_trained_stays_in_the_report(models: Path, tmp_path: Path) -> None:
    config = tiny(models, tmp_path / "run", data=write(tmp_path, 1))
    train(config)
    report_data.collect(config.out, config)
    path = config.out / report_data.FACTS
    facts = json.loads(path.read_text())
    facts["environment"]["device"] = "8 x H200"
    path.write_text(json.dumps(facts))
    assert report_data.collect(config.out, config, shown=1)["environment"]["device"] == "8 x H200"


def test_variants_that_differ_in_punctuation_alone_are_refused() -> None:
    """They would share a folder, and each other's results."""
    with pytest.raises(UserError, match=r"'sft:freeze=a/b' and 'sft:freeze=a b' would share"):
        main(["compare", "--preset", "digits", "--objectives", "sft:freeze=a b,sft:freeze=a/b,kd"])


def test_a_teacher_goes_on_with_its_own_seed() -> None:
    with pytest.raises(UserError, match="drop --seed"):
        main(["teacher", "--resume", "--out", "x", "--seed", "7"])


RECIPE = "objective: sft\nstages:\n  - name: a\n  - name: b\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages.b.student", "/x"], "--stages.b.student: it starts from the student of the stage before"),
        (["--stages.b.student_layers", "1"], "--stages.b.student_layers: it starts from"),
        (["--stages.a.out=/q"], "--stages.a.out: out belongs to the whole run"),
        (["--stages.b.resume"], "--stages.b.resume: resume belongs to the whole run"),
    ],
)
def test_where_a_stage_lies_is_not_its_choice(tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    with pytest.raises(UserError, match=message):
        cli.parse(["--config", str(tmp_path / "r.yaml"), *words])


@pytest.mark.parametrize("line", ["out: 2026-11-28", "freeze: !!binary aGk=", "freeze: &x {a: *x}"])
def test_yaml_that_is_no_option_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "r.yaml").write_text(f"objective: sft\n{line}\n")
    with pytest.raises(UserError, match=r"in quotes|is not|must"):
        cli.parse(["--config", str(tmp_path / "r.yaml")])


def test_lists_of_a_recipe_and_flags_that_stand_alone(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("freeze: [llm, vision]\nobjective: sft\n")
    words = ["--config", str(tmp_path / "r.yaml"), "--align.packing", "--lora.vision", "--lora.r", "4", "--bf16"]
    (stage,) = cli.parse(words).stages
    config = stage.config
    assert (config.freeze, config.align.packing, config.lora.vision, config.bf16) == ("llm,vision", True, True, True)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "object"), ("future", "'future'")])
def test_a_damaged_configuration_is_one_line(models: Path, tmp_path: Path, text: str, message: str) -> None:
    config = tiny(models, tmp_path / "run", data=write(tmp_path, 1))
    train(config)
    shutil.rmtree(config.out / "student")
    path = config.out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"future": 1}) if text == "future" else text)
    with pytest.raises(UserError, match=message):
        train(TrainConfig(out=config.out, resume=True))


def test_a_folder_that_cannot_be_written_is_one_line(models: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write to .*choose another --out"):
        train(
            tiny(models, tmp_path / "file" / "run", preset="digits", objective="lavit", teacher=str(models / "teacher"))
        )


def command(models: Path, out: Path) -> list[str]:
    text = f"train --preset digits --objective sft --student {models}/student --samples 8 --batch_size 2 --threads 1"
    return [*text.split(), "--steps", "4", "--visual_every", "0", "--out", str(out)]


def test_how_to_go_on_after_an_interruption(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once there is something to resume, with words that can be pasted; before that, with the same command."""
    out = tmp_path / "r 1"
    words = command(models, out)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert main(words) == 130
    assert f"go on with: python -m distill train --resume --out '{out}'" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(out)]) == 0

    def early(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.train.load_run", early)
    with pytest.raises(KeyboardInterrupt):
        main([*words[:-1], str(tmp_path / "new")])
    assert "--resume" not in capsys.readouterr().err


def test_an_interrupted_command_says_one_thing(models: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom distill.__main__ import main\nfrom vlm.console import run_command\n"
        "from distill.trainer import DistillTrainer as T\nimport os, signal\nstep = T.training_step\n"
        "def stop(self, *a, **k):\n    os.kill(os.getpid(), signal.SIGINT)\n    return step(self, *a, **k)\n"
        "T.training_step = stop\nrun_command(main)\n"
    )
    words = command(models, tmp_path / "r")
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "go on with" in done.stderr
    assert "run the same command again" not in done.stderr


def test_a_cut_report_is_measured_again(models: Path, tmp_path: Path) -> None:
    config = tiny(models, tmp_path / "run", data=write(tmp_path, 1))
    train(config)
    report_data.collect(config.out, config)
    path = config.out / report_data.FACTS
    path.write_text(path.read_text()[:-20])
    assert report_data.collect(config.out, config)["environment"]
    (config.out / "controls.json").write_text('{"columns": [')
    with pytest.raises(UserError, match=r"controls\.json is not valid JSON"):
        main(["report", str(config.out)])
