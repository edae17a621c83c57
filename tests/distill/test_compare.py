"""The comparison's bookkeeping, with runs replaced by a formula: fairness, resuming, table and JSON."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from distill import compare
from distill.config import TrainConfig
from distill.stored import config_from_json, config_to_json
from vlm.errors import ToolError, UserError

SECONDS = {"sft": 1.0, "kd": 2.0, "align-ti": 4.0}


class Runs:
    """Stands in for `python -m distill train`: reads the recipe it was given, writes a score made from it."""

    def __init__(self) -> None:
        self.seen: list[TrainConfig] = []
        self.lock = threading.Lock()
        self.both_started = threading.Barrier(2)

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        import contextlib

        with contextlib.suppress(threading.BrokenBarrierError):
            self.both_started.wait(timeout=1)  # recipes of both jobs are written before either is read
        if "--config" in command:
            config = config_from_json(json.loads(Path(command[command.index("--config") + 1]).read_text()))
        else:
            config = config_from_json(
                json.loads((Path(command[command.index("--out") + 1]) / "config.json").read_text())
            )
        with self.lock:
            self.seen.append(config)
        score = {2.5e-4: 0.2, 5e-4: 0.1, 1e-3: 0.3}[config.lr] + config.steps / 1e4 + config.seed / 1e6
        (config.out / "student").mkdir(parents=True, exist_ok=True)
        (config.out / "metrics.jsonl").write_text(json.dumps({"step": config.steps, "eval_exact_match": score}) + "\n")
        (config.out / "student" / "vlm.json").write_text(json.dumps({"exact_match": score}))
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    fake = Runs()
    monkeypatch.setattr(compare.subprocess, "run", fake)
    monkeypatch.setattr(
        compare, "_step_times", lambda plan, _: {name: SECONDS.get(name, 1.0) for name in plan.objectives}
    )
    return fake


def arguments(out: Path) -> list[str]:
    return [
        "--objectives",
        "sft,kd,align-ti",
        "--seeds",
        "3",
        "--steps",
        "100",
        "--jobs",
        "2",
        "--out",
        str(out),
        "--json",
    ]


def test_every_run_gets_its_own_recipe_and_budgets_are_fair(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(arguments(tmp_path / "c")) == 0
    assert len({config.out for config in runs.seen}) == len(runs.seen), "two jobs shared a recipe"
    sweep = [config for config in runs.seen if config.seed == compare.SWEEP_SEED]
    assert {(c.objective, c.lr) for c in sweep} == {(o, lr) for o in SECONDS for lr in (2.5e-4, 5e-4, 1e-3)}
    assert len({config.steps for config in sweep}) == 1
    final = [config for config in runs.seen if config.seed != compare.SWEEP_SEED]
    assert {config.lr for config in final} == {1e-3}, "the sweep's best rate is used"
    steps = {name: sorted({c.steps for c in final if c.objective == name}) for name in SECONDS}
    assert steps == {"sft": [100, 400], "kd": [100, 200], "align-ti": [100]}
    assert all(sum(c.objective == n and c.steps == s for c in final) == 3 for n, all_ in steps.items() for s in all_)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["objective"], row["budget"]): row for row in result["rows"]}
    assert len(rows) == 6
    assert rows["sft", "time"]["mean"] == pytest.approx(0.3 + 0.04 + 1e-6)
    assert rows["sft", "time"]["std"] == pytest.approx(1e-6)
    assert rows["align-ti", "time"]["scores"] == rows["align-ti", "steps"]["scores"]


def test_an_objective_may_carry_options_of_its_own(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = ["--objectives", "sft,sft:optim=fira;fira.rank=8", "--seeds", "1"]
    assert compare.main([*arguments(tmp_path / "c"), *two]) == 0
    assert {(c.optim, c.fira.rank) for c in runs.seen} == {("adamw", 32), ("fira", 8)}
    assert len({c.out for c in runs.seen}) == len(runs.seen)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["objective"] for row in result["rows"]} == {"sft", "sft:optim=fira;fira.rank=8"}
    for wrong, seen in (
        ("sft:optim=magic", "magic"),
        ("sft:fira.rnk=8", "fira.rank"),
        ("sft:seed=3", "can differ"),
        ("sft:eval_every=3", "can differ"),
        ("sft:x", "can differ"),
    ):
        with pytest.raises(UserError, match=seen):
            compare.parse([*arguments(tmp_path), "--objectives", wrong])


def test_every_method_can_be_compared(tmp_path: Path) -> None:
    kpod = "sft:format=rationale;tokens.weights=kpod;schedule=kpod"
    names = f"sft,sft:optim=fira,lavit,align-ti+lavit,lavit:lavit.gate=hard,sft:format=rationale,{kpod}"
    plan = compare.parse([*arguments(tmp_path), "--objectives", names])
    configs = {name: compare.variant("digits", name) for name in plan.objectives}
    assert configs["align-ti+lavit"].watches
    assert configs["lavit:lavit.gate=hard"].lavit.gate == "hard"
    assert (configs[kpod].tokens.weights, configs[kpod].schedule) == ("kpod", "kpod")
    assert len({compare._folder(name) for name in names.split(",")}) == 7


def test_help_says_when_to_use_which(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        compare.parse(["--help"])
    said = capsys.readouterr().out
    assert left.value.code == 0
    for paper in ("2602.09483", "2601.10129", "2405.16064", "2410.01623"):
        assert paper in said
    assert "sft:optim=fira;fira.rank=16" in said


def test_finished_runs_are_not_repeated(runs: Runs, tmp_path: Path) -> None:
    compare.main(arguments(tmp_path / "c"))
    first = len(runs.seen)
    compare.main(arguments(tmp_path / "c"))
    assert len(runs.seen) == first


def test_a_run_cut_short_is_resumed(runs: Runs, tmp_path: Path) -> None:
    plan = compare.parse(arguments(tmp_path / "c"))
    out = tmp_path / "c" / "sft-100steps-seed0"
    config = compare._config(plan, out.name, "sft", 100, 1e-3, 0)
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config_to_json(config)))
    compare._run_one(config)
    assert runs.seen == [config]
    assert not list(out.parent.glob("*.recipe.json"))


def test_a_failed_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 2, "", "noise\nerror: no such teacher\n")

    monkeypatch.setattr(compare.subprocess, "run", fail)
    with pytest.raises(ToolError, match=r"sweep-sft-100steps-lr0\.00025 failed .*no such teacher"):
        compare.main([*arguments(tmp_path / "c"), "--objectives", "sft"])


def test_a_students_parts_may_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained student, whose step time counts as well, is made of no parts any more."""
    measured: list[dict[str, TrainConfig]] = []

    def measure(configs: dict[str, TrainConfig], _: int) -> dict[str, float]:
        measured.append(configs)
        return dict.fromkeys(configs, 1.0)

    monkeypatch.setattr("distill.steptime.measure", measure)
    parts, fewer = "sft:llm=l;vision_tower=v", "sft:student_layers=1"
    plan = compare.parse([*arguments(tmp_path / "c"), "--objectives", f"{parts},{fewer}"])
    compare._step_times(plan, dict.fromkeys(plan.objectives, 1e-3))
    fresh, trained = measured
    assert (fresh[parts].llm, fresh[fewer].student_layers) == ("l", 1)
    for name, config in trained.items():
        assert (config.llm, config.vision_tower, config.student_layers) == (None, None, 0)
        assert str(config.student).endswith(f"{compare._folder(name)}-100steps-lr0.001/student")


@pytest.mark.parametrize("bad", [["--objectives", "magic"], ["--lrs", "fast"], ["--seeds", "0"], ["--jobs", "0"]])
def test_wrong_options(bad: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        compare.main([*arguments(tmp_path), *bad])
