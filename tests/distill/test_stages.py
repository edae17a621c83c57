"""Recipes with stages: how they are read, and that a run killed anywhere ends with the uninterrupted run's bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from distill import cli, stages
from distill.cli import Request, Stage, parse, parse_train
from distill.config import TrainConfig
from tests.tiny import make_student
from vlm.errors import UserError

ROOT = Path(__file__).parent.parent.parent
RECIPE = """
preset: digits
teacher: {folder}/teacher
student: {folder}/student
batch_size: 4
steps: 4
lr: 1e-3
samples: 100
eval_samples: 10
eval_every: 0
save_every: 2
log_every: 2
visual_every: 0
report_to: none
threads: 1
stages:
  - name: align
    objective: kd+iva
    freeze_vision: true
    align: {{iva_layer: 0}}
  - name: sft
    objective: sft
    lr: 5e-4
  - name: distill
    objective: align-ti
    align:
      iva_layer: 1
      candidates: 2
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    sizes = {"hidden": 64, "head_dim": 16, "intermediate": 96, "spread": 2.0}
    make_student(folder / "teacher", seed=1, layers=2, **sizes)
    make_student(folder / "student", seed=2, layers=1, **sizes)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return folder / "recipe.yaml"


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# every child goes on in the same folder and is killed at the next moment; forking spares importing torch each time
KILLER = """
import os, signal, sys
from pathlib import Path
from distill import stages, train as train_module, trainer
from distill.__main__ import main
recipe, out = sys.argv[1], sys.argv[2]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def in_stage(name, step):
    original = trainer.Reporter.on_step_end
    def on_step_end(self, args, state, control, **rest):
        if name in args.output_dir and state.global_step == step:
            die()
        original(self, args, state, control, **rest)
    trainer.Reporter.on_step_end = on_step_end
def before_stage(name):
    original = train_module.train
    def train(config):
        if name in str(config.out):
            die()
        return original(config)
    train_module.train = train
def while_linking():
    stages._link_tree = die
moments = [lambda: in_stage("stage-1", 3), lambda: before_stage("stage-2"), lambda: in_stage("stage-2", 3),
           lambda: in_stage("stage-3", 1), while_linking]
for number, arm in enumerate(moments):
    child = os.fork()
    if child == 0:
        arm()
        main(["train", "--config", recipe, "--out", out] if number == 0 else ["train", "--resume", "--out", out])
        os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (number, status)
    assert not (Path(out) / "student").exists()
main(["train", "--resume", "--out", out])
"""


def test_killed_inside_and_between_stages_ends_with_the_same_bits(recipe: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    result = stages.start(parse(["--config", str(recipe)]), whole)
    assert result.student == whole / "student"
    killed = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(recipe), str(killed)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for folder in ("stage-1-align/student", "stage-2-sft/student", "stage-3-distill/student", "student"):
        ours, theirs = (load_file(run / folder / "model.safetensors") for run in (whole, killed))
        assert ours.keys() == theirs.keys()
        assert all((value == theirs[name]).all() for name, value in ours.items()), folder
    assert weights(whole / "student") == weights(whole / "stage-3-distill" / "student")
    assert weights(whole / "stage-2-sft" / "student") != weights(whole / "stage-1-align" / "student")


def test_each_stage_starts_from_the_student_before(recipe: Path, tmp_path: Path) -> None:
    found = stages.placed(parse(["--config", str(recipe)]).stages, tmp_path / "run")
    assert [stage.config.objective for stage in found] == ["kd+iva", "sft", "align-ti"]
    assert [stage.config.freeze_vision for stage in found] == [True, False, False]
    assert [stage.config.lr for stage in found] == [1e-3, 5e-4, 1e-3]
    assert found[0].config.student == f"{recipe.parent}/student"
    assert found[1].config.student == str(found[0].config.out / "student")
    assert found[2].config.student == str(found[1].config.out / "student")
    assert [stage.config.out.name for stage in found] == ["stage-1-align", "stage-2-sft", "stage-3-distill"]


def test_the_stored_plan_is_the_one_asked_for(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    seen: list[TrainConfig] = []

    class Stop(Exception):
        pass

    def stop(config: TrainConfig) -> None:
        seen.append(config)
        raise Stop

    monkeypatch.setattr("distill.train.train", stop)
    request = parse(["--config", str(recipe), "--seed", "3"])
    with pytest.raises(Stop):
        stages.start(request, out)
    assert stages.read_plan(out) == stages.placed(request.stages, out)
    with pytest.raises(UserError, match="--resume"):
        stages.start(request, out)
    assert seen[0].seed == 3


def test_options_override_every_stage_or_one(recipe: Path) -> None:
    words = ["--config", str(recipe), "--lr", "0.25", "--stages.sft.steps", "9", "--stages.distill.align.candidates=3"]
    found = {stage.name: stage.config for stage in parse(words).stages}
    assert {config.lr for config in found.values()} == {0.25}
    assert [config.steps for config in found.values()] == [4, 9, 4]
    alone = ["--config", str(recipe), "--stages.sft.bf16", "--seed", "7", "--stages.distill.gradient_checkpointing"]
    found = {stage.name: stage.config for stage in parse(alone).stages}
    assert [found[name].bf16 for name in ("sft", "distill")] == [True, False]
    assert {config.seed for config in found.values()} == {7}
    found = {stage.name: stage.config for stage in parse(words).stages}
    assert found["distill"].align.candidates == 3


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("stages: []", "stages must be a list"),
        ("stages: [1]", "stages must be a list"),
        ("stages: [{objective: sft}]", "stage 1: name ''"),
        ("stages: [{name: a}, {name: a}]", "stage 2: name 'a'"),
        ("stages: [{name: ../x}]", "stage 1: name '../x'"),
        ("stages: [{name: a, stepz: 3}]", "did you mean steps"),
        ("stages: [{name: a, align: {candidats: 3}}]", "did you mean align.candidates"),
        ("stages: [{name: a, align: 3}]", "align must hold"),
        ("stages: [{name: a, out: x}]", "out belongs to the whole run"),
        ("stages: [{name: a, steps: 0}]", "stage a: steps must be at least 1"),
        ("stages: [{name: a, steps: many}]", "stage a: "),
        ("stages: [{name: a}, {name: b, student: x}]", "starts from the student of the stage before"),
        ("learning_rate: 3", "did you mean lr"),
        ("- 1", "key: value"),
        ("steps: [1", "YAML"),
    ],
)
def test_a_wrong_recipe_names_file_stage_and_key(tmp_path: Path, text: str, seen: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        parse(["--config", str(tmp_path / "r.yaml")])
    assert seen in caught.value.message
    assert "\n" not in caught.value.message
    assert "r.yaml" in caught.value.message


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["--stages.sftt.lr", "1"], "sftt"),
        (["--stages.sft.lrr", "1"], "did you mean --lr"),
        (["--recipe", "digits-stages"], "keep one"),
        (["--resume", "--out", "x"], "drop --config"),
    ],
)
def test_wrong_options_beside_a_recipe(recipe: Path, words: list[str], seen: str) -> None:
    with pytest.raises(UserError, match=seen):
        parse(["--config", str(recipe), *words])


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["data", "none.json", "--preset", "none"], r"no data at none\.json; check --data"),
        (["eval_data", "none.json", "--stages.distill.data", "."], r"no eval_data at none\.json"),
        (["teacher", "./typo"], "no teacher at typo"),
        (["teacher_cache", "typo"], r"no teacher_cache at typo/cache\.json"),
        (["optim_state", "typo"], r"no optim_state at typo/optimizer\.pt"),
        (["preset", "none"], "no data to train on"),
    ],
)
def test_what_a_later_stage_lacks_is_found_before_the_first_starts(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], seen: str
) -> None:
    monkeypatch.setattr("distill.train.train", lambda _: pytest.fail("a stage was started"))
    name, value, *more = words
    request = parse(["--config", str(recipe), f"--stages.distill.{name}", value, *more])
    with pytest.raises(UserError, match=rf"stage distill: .*{seen}"):
        stages.start(request, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    untaught = Stage("sft", TrainConfig(data=recipe, objective="sft")), Stage("late", TrainConfig(data=recipe))
    with pytest.raises(UserError, match="stage late: objective 'align-ti' needs a teacher"):
        stages.start(Request(untaught, True, "r.yaml", {}), tmp_path / "run")


def test_a_refused_first_stage_leaves_nothing_behind(recipe: Path, tmp_path: Path) -> None:
    request = parse(["--config", str(recipe), "--teacher", "runs/typo"])
    with pytest.raises(UserError, match="typo"):
        stages.start(request, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_recipe_with_stages_is_not_one_configuration(recipe: Path) -> None:
    with pytest.raises(UserError, match="stages"):
        parse_train(["--config", str(recipe)])


@pytest.mark.parametrize("name", cli.recipes())
def test_recipes_of_the_package_parse(name: str) -> None:
    own_data = "preset" in cli.read_recipe(cli.recipe_path(name))
    words = [] if own_data else ["--data", "d.json", "--teacher", "t", "--student", "s"]
    request = parse(["--recipe", name, *words])
    assert request.recipe.endswith(f"{name}.yaml")
    assert request.staged
    assert cli.read_recipe(cli.recipe_path(name))["description"]
    assert json.dumps([stage.name for stage in request.stages])
