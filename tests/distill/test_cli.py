"""Command line, recipe and preset -> TrainConfig."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.cli import parse_train
from distill.presets import DIGITS_TRAIN
from vlm.errors import UserError


@pytest.mark.parametrize(
    "words",
    [
        ["--resume", "--out", "runs/x"],
        ["--out", "runs/x", "--resume"],
        ["--out=runs/x", "--resume", "true"],
        ["--resume=true", "--out=runs/x"],
    ],
)
def test_flags_need_no_value(words: list[str]) -> None:
    config, as_json = parse_train(words)
    assert config.resume is True
    assert config.out == Path("runs/x")
    assert not as_json


def test_flags_can_be_turned_off() -> None:
    assert parse_train(["--resume", "false"])[0].resume is False


def test_resume_refuses_options_it_would_ignore() -> None:
    with pytest.raises(UserError, match="drop --steps"):
        parse_train(["--resume", "--out", "runs/x", "--steps", "9"])


def test_resume_is_a_flag_in_the_middle_too() -> None:
    assert parse_train(["--json", "--resume", "--out", "runs/x"]) == parse_train(["--out=runs/x", "--resume", "--json"])


def test_later_sources_win(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("preset: digits\nsteps: 7\nlr: 0.5\nalign:\n  candidates: 2\nweights:\n  iva: 0.5\n")
    config, as_json = parse_train(["--config", str(recipe), "--lr", "0.25", "--json"])
    assert (config.steps, config.lr, config.align.candidates, config.weights.iva) == (7, 0.25, 2, 0.5)
    assert config.batch_size == DIGITS_TRAIN["batch_size"], "the preset fills what the recipe leaves out"
    assert config.weights.kd == 1.0
    assert as_json


def test_the_preset_of_the_command_line_is_found_in_both_spellings() -> None:
    for words in (["--preset", "digits"], ["--preset=digits"]):
        assert parse_train(words)[0].steps == DIGITS_TRAIN["steps"]


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["--steps", "0"], "steps"),
        (["--lr", "-1"], "lr"),
        (["--steps", "many"], "steps"),
        (["--align.candidates", "0"], "candidates"),
        (["--align.temperature", "0"], "temperature"),
        (["--align.direction", "sideways"], "sideways"),
        (["--objective", "magic"], "magic"),
        (["--max_grad_norm", "-1"], "max_grad_norm"),
        (["--lr", "nan"], "lr"),
        (["--warmup", "5"], "warmup"),
        (["--weight_decay", "-1"], "weight_decay"),
        (["--eval_every", "-1"], "eval_every"),
        (["--seed", "-1"], "seed"),
        (["--threads", "-1"], "threads"),
        (["--align.iva_layer", "-5"], "iva_layer"),
        (["--align.irs_pairs", "0"], "irs_pairs"),
        (["--objective", "sft", "--weights.sft", "0"], "nothing would be trained"),
        (["--weights.kd", "-1"], "weights.kd"),
        (["--weights.iva", "nan"], "weights.iva"),
        (["--align.temperature", "inf"], "temperature"),
        (["--images", "folder"], "--data"),
        (["--preset", "none", "--data", "d.json", "--eval_every", "5"], "eval_every"),
        (["--config", "."], "config"),
    ],
)
def test_bad_values_are_named_in_one_line(words: list[str], seen: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_train(["--preset", "digits", *words])
    assert seen in caught.value.message
    assert "\n" not in caught.value.message


def test_without_a_command_the_preset_is_digits() -> None:
    from distill.__main__ import _with_default_preset

    assert _with_default_preset([], []) == ["--preset", "digits"]
    assert _with_default_preset(["--json"], ["--json"]) == ["--preset", "digits", "--json"]
    assert _with_default_preset(["train", "--json"], ["--json"]) == ["--json"]
    for words in (["--config=r.yaml"], ["--resume", "--out", "x"], ["--student", "s"]):
        assert _with_default_preset(words, words) == words


def test_the_teacher_takes_only_what_it_uses() -> None:
    from distill.__main__ import parse_teacher

    assert parse_teacher(["--preset", "digits", "--seed", "3"])[0].seed == 3
    with pytest.raises(UserError, match="lr"):
        parse_teacher(["--lr", "0.5"])


def test_preset_none_is_the_same_as_no_preset() -> None:
    assert parse_train(["--preset", "none"])[0] == parse_train(["--steps", "1000"])[0]


def test_no_option_is_ignored_by_the_objective() -> None:
    config, _ = parse_train(["--preset", "digits", "--objective", "align-ti", "--weights.kd", "0", "--weights.tpa=0"])
    assert config.terms == ("sft", "iva")
    assert config.needs_teacher
    assert not parse_train(["--preset", "digits", "--objective", "sft"])[0].needs_teacher


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--learning_rate", "--lr"),
        ("--learning-rate", "--lr"),
        ("--stepz", "--steps"),
        ("--align.candidats", "--align.candidates"),
        ("--candidates", "--align.candidates"),
        ("--gradient_accumulation_steps", "--accumulate"),
        ("--batchsize", "--batch_size"),
    ],
)
def test_an_unknown_option_names_the_nearest(word: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"did you mean {meant}\\?"):
        parse_train([word, "3"])
    with pytest.raises(UserError, match=f"did you mean {meant}\\?"):
        parse_train([f"{word}=3"])


def test_hyphens_are_underscores() -> None:
    assert parse_train(["--batch-size", "3", "--align.iva-layer=2"]) == parse_train(
        ["--batch_size", "3", "--align.iva_layer=2"]
    )


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean digits-stages\?"):
        parse_train(["--recipe", "digit-stages"])


@pytest.mark.parametrize("command", ["train", "check"])
def test_help_lists_every_option_once_with_its_meaning(command: str) -> None:
    from distill.cli import option_names
    from distill.cli_help import grouped, page

    listed = [action.dest for _, actions in grouped(command) for action in actions]
    nested = {name.rsplit(".", 1)[0] for name in option_names() if "." in name}
    assert sorted(listed) == sorted({"json", *option_names()} - nested)
    assert all(action.help for _, actions in grouped(command) for action in actions)
    assert "examples:" in page(command)
    assert max(map(len, page(command).splitlines())) <= 120


def test_every_command_is_listed_with_its_meaning() -> None:
    from distill.__main__ import COMMANDS, usage

    for name, (_, meaning) in COMMANDS.items():
        assert f"  {name}" in usage()
        assert meaning in usage()
