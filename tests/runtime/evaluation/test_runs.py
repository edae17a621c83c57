"""`eval` as people meet it: killed and resumed, changed in between, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import cli
from tests.runtime.conftest import ROOT
from tests.runtime.serving import png
from vlm.errors import DataError, UserError

from .scripted import Scripted, evaluate, lines, make_data, without_times

SCRIPT = """
import os, signal, sys
import runtime.evaluate
from runtime import cli
from runtime.backend_fake import FakeBackend, FakeScript
from runtime.engine import Engine
asked = 0
def reply(messages):
    global asked
    asked += 1
    if asked > {kill_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return messages[-1].content[-1].strip()[-1]
runtime.evaluate.load = lambda *a, **k: Engine(FakeBackend(FakeScript(reply=reply)))
sys.exit(cli.main(sys.argv[1:]))
"""


def test_result_and_samples(tmp_path: Path, model: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(make_data(tmp_path / "d"), tmp_path / "out", "--json") == 0
    value = json.loads(capsys.readouterr().out.splitlines()[-1])
    # wrong: 0, 3, 6, 9, 12, 15, 18
    assert (value["task"], value["n"], value["score"]) == ("json", 20, 13 / 20)
    assert value["interval"][0] < 13 / 20 < value["interval"][1]
    assert value["parts"]["category a"]["n"] == 10
    sample = lines(tmp_path / "out/samples.jsonl")[4]
    assert (sample["id"], sample["prompt"], sample["prediction"], sample["score"]) == ("4", "Say 4", "4", 1.0)
    assert json.loads((tmp_path / "out/result.json").read_text())["score"] == 13 / 20


@pytest.mark.parametrize("kill_at", [0, 7, 19])
def test_a_killed_run_resumes_to_the_same_result(tmp_path: Path, model: Scripted, kill_at: int) -> None:
    data = make_data(tmp_path / "d")
    given = ["eval", "x", "--backend", "fake", "--task", "json", "--data", str(data), "--out", str(tmp_path / "killed")]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(kill_at=kill_at), *given],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(lines(tmp_path / "killed/predictions.jsonl")) == kill_at
    assert not (tmp_path / "killed/result.json").exists()
    evaluate(data, tmp_path / "killed")
    assert model.asked == 20 - kill_at
    evaluate(data, tmp_path / "whole")
    assert without_times(tmp_path / "killed/samples.jsonl") == without_times(tmp_path / "whole/samples.jsonl")
    results = [json.loads((tmp_path / f"{name}/result.json").read_text()) for name in ("killed", "whole")]
    for name in ("score", "interval", "parts", "n", "identity"):
        assert results[0][name] == results[1][name]


def test_a_line_cut_off_by_a_crash_is_asked_again(tmp_path: Path, model: Scripted) -> None:
    data = make_data(tmp_path / "d")
    evaluate(data, tmp_path / "out")
    before = without_times(tmp_path / "out/samples.jsonl")
    path = tmp_path / "out/predictions.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    model.asked = 0
    evaluate(data, tmp_path / "out")
    assert model.asked == 1
    assert without_times(tmp_path / "out/samples.jsonl") == before


def test_a_finished_run_needs_no_model(tmp_path: Path, model: Scripted) -> None:
    data = make_data(tmp_path / "d")
    for _ in range(2):
        evaluate(data, tmp_path / "out")
    assert (model.opened, model.asked) == (1, 20)
    evaluate(data, tmp_path / "out", "--fresh")
    assert model.asked == 40


@pytest.mark.parametrize(
    ("change", "named"),
    [("artefact", "artefact"), ("question", "data"), ("answer", "data"), ("image", "data"), ("tokens", "settings"),
     ("kv", "settings"), ("latents", "settings"), ("provider", "settings"), ("samples", "data")],
)  # fmt: skip
def test_a_change_refuses_to_resume(tmp_path: Path, model: Scripted, change: str, named: str) -> None:
    data = make_data(tmp_path / "d")
    evaluate(data, tmp_path / "out")
    before = (tmp_path / "out/predictions.jsonl").read_bytes()
    text = (data / "task.json").read_text()
    artefact, more = "x", []
    if change == "artefact":
        artefact = "y"
    elif change == "question":
        (data / "task.json").write_text(text.replace("Say 7", "Tell 7"))
    elif change == "answer":
        (data / "task.json").write_text(text.replace('"answer": "7"', '"answer": "8"'))
    elif change == "image":
        (data / "3.png").write_bytes(png(99))
    else:
        more = {
            "tokens": ["--max-new-tokens", "3"],
            "kv": ["--kv", "q8_0"],
            "latents": ["--latents", "prefill"],
            "provider": ["--provider", "tensorrt"],
            "samples": ["--samples", "5"],
        }[change]
    with pytest.raises(UserError, match=f"holds answers for another {named};"):
        evaluate(data, tmp_path / "out", *more, artefact=artefact)
    assert (tmp_path / "out/predictions.jsonl").read_bytes() == before
    assert evaluate(data, tmp_path / "out", "--fresh", *more, artefact=artefact) == 0


def test_an_artefact_that_changed_refuses_to_resume(tmp_path: Path, model: Scripted) -> None:
    """The digest of a checkpoint follows its weights, tokenizer and template, not its name."""
    data, checkpoint = make_data(tmp_path / "d"), tmp_path / "student"
    checkpoint.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        (checkpoint / name).write_text(name)
    evaluate(data, tmp_path / "out", artefact=str(checkpoint))
    (checkpoint / "notes.txt").write_text("not part of the model")
    evaluate(data, tmp_path / "out", artefact=str(checkpoint))
    assert model.opened == 1
    for name in ("model.safetensors", "chat_template.jinja"):
        (checkpoint / name).write_text("other")
        with pytest.raises(UserError, match="another artefact"):
            evaluate(data, tmp_path / "out", artefact=str(checkpoint))
        (checkpoint / name).write_text(name)


def test_answers_that_were_edited_are_refused(tmp_path: Path, model: Scripted) -> None:
    data = make_data(tmp_path / "d")
    evaluate(data, tmp_path / "out")
    path = tmp_path / "out/predictions.jsonl"
    rows = lines(path)
    rows[3]["item"] = "0" * 64
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="question '3' has changed"):
        evaluate(data, tmp_path / "out")


def test_folders_of_something_else_are_left_alone(tmp_path: Path, model: Scripted) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    for more in ([], ["--fresh"]):
        with pytest.raises(UserError, match="is not empty and holds no evaluation"):
            evaluate(make_data(tmp_path / "d"), tmp_path / "out", *more)
    assert (tmp_path / "out/thesis.tex").exists()


def test_a_model_that_does_not_load_leaves_no_directory(tmp_path: Path) -> None:
    data = make_data(tmp_path / "d", 3)
    for artefact in (tmp_path / "nowhere", data):
        with pytest.raises(UserError):
            cli.main(["eval", str(artefact), "--task", "json", "--data", str(data), "--out", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()


def test_one_process_at_a_time(tmp_path: Path, model: Scripted) -> None:
    import fcntl

    data = make_data(tmp_path / "d")
    evaluate(data, tmp_path / "out")
    with (tmp_path / "out/predictions.jsonl").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process evaluates into"):
            evaluate(data, tmp_path / "out")


def test_missing_images(tmp_path: Path, model: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tmp_path / "d")
    (data / "4.png").unlink()
    (data / "5.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"1 images of json are missing, the first is .*4\.png"):
        evaluate(data, tmp_path / "out")
    assert model.opened == 0
    evaluate(data, tmp_path / "out", "--missing", "wrong", "--json")
    captured = capsys.readouterr()
    value = json.loads(captured.out.splitlines()[-1])
    assert (value["score"], value["n"], value["not_asked"]) == (11 / 20, 20, 2)
    errors = {row["id"]: row["error"] for row in lines(tmp_path / "out/samples.jsonl") if "error" in row}
    assert errors == {"4": "image_missing", "5": "image_damaged"}
    assert "their questions count as wrong" in captured.err
