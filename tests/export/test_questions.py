"""The student's own questions: both forms of records, their division, and one line for each malformed file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.cli import main
from export.questions import divide, read_questions
from vlm import digits
from vlm.errors import UserError
from vlm.manifest import read_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(8):
        digits.sample("validation", index).image.save(tmp_path / f"{index}.png")
    return tmp_path


def test_both_forms_and_both_containers_read_the_same(folder: Path) -> None:
    plain = [{"image": f"{i}.png", "question": "how many ?", "answer": str(i)} for i in range(8)]
    turns = [
        {
            "image": f"{i}.png",
            "conversations": [{"from": "human", "value": "<image>\nhow many ?"}, {"from": "gpt", "value": str(i)}],
        }
        for i in range(8)
    ]
    (folder / "a.json").write_text(json.dumps(plain))
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, turns)) + "\n\n")
    first, second = read_questions(folder / "a.json"), read_questions(folder / "b.jsonl")
    assert first == second
    assert first[3].answers == ("3",)
    assert first[3].image().size == (64, 64)


def test_calibration_never_sees_an_evaluated_question(folder: Path) -> None:
    records = [{"image": f"{i}.png", "question": "q", "answers": [str(i), "x"]} for i in range(8)]
    (folder / "a.json").write_text(json.dumps(records))
    asked, rest = divide(read_questions(folder / "a.json"), 5, seed=3)
    assert len(asked) == 5
    assert {q.answers for q in asked}.isdisjoint(q.answers for q in rest)
    assert len(rest) == 3


FAULTS = {
    "not json": ("{'a'}", "neither"),
    "empty list": ("[]", "no record"),
    "a number": ("[3]", "record 0 is a int"),
    "no question": ('[{"image": "0.png", "answer": "a"}]', "no image name or no question"),
    "no answer": ('[{"image": "0.png", "question": "q"}]', "no answer"),
    "unanswered turn": ('[{"image": "0.png", "conversations": [{"from": "human", "value": "q"}]}]', "no answer"),
    "odd turn": ('[{"image": "0.png", "conversations": ["q"]}]', "no image name or no question"),
    "no image": ('[{"image": "nine.png", "question": "q", "answer": "a"}]', "no image at .*nine.png"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_malformed_file_is_one_line(folder: Path, fault: str) -> None:
    text, message = FAULTS[fault]
    (folder / "a.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_questions(folder / "a.json")
    assert "\n" not in str(caught.value)


def test_export_measures_accuracy_on_the_students_own_questions(
    subjects: Callable[..., Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = subjects("siglip", "llama")
    answer = subject.student.checkpoint.tokenizer.decode(subject.evidence.answers[0])
    records = [{"image": f"{i}.png", "question": "q", "answers": ["never", answer]} for i in range(8)]
    (folder / "mine.json").write_text(json.dumps(records))
    command = ["--target", "onnx", "--precision", "fp16", "--student", str(subject.directory), "--no-ablation"]
    out = folder / "out"
    assert main([*command, "--out", str(out), "--data", str(folder / "mine.json"), "--samples", "5"]) == 0
    manifest = read_manifest(out)
    assert manifest.accuracy["task"] == "mine"
    assert manifest.accuracy["n"] == 5
    assert manifest.accuracy["change"] == 0.0
    assert manifest.parity["calibration"]["prompts"] == 3
    assert "calibrating on real images" in capsys.readouterr().err
