"""The student's own questions: both forms of records, their division, and one line for each malformed file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export import imatrix, to_gguf
from export.artefact import Making, build
from export.cli import main
from export.evidence import PIXEL_IMAGES, accuracy, calibration_prompts, collect
from export.gguf_precision import parse_gguf
from export.measure import measure
from export.options import ExportOptions
from export.parity import GATES
from export.questions import Question, divide, read_questions
from export.reference import TorchBackend
from export.stages import Stages
from vlm import digits
from vlm.errors import UserError
from vlm.manifest import read_manifest
from vlm.preprocess import pixels


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


@pytest.mark.parametrize(("precision", "plain"), [("f16", False), ("q8_0", False), ("q4_k_m", True)])
def test_calibration_that_nothing_reads_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], precision: str, plain: bool
) -> None:
    run = ExportOptions("gguf", folder, folder / "out", precision, calibration=folder, no_imatrix=plain)
    found = to_gguf.find_importance(None, None, run, parse_gguf(precision), folder, Stages(None), {})  # type: ignore[arg-type]
    assert found is None
    assert f"needs no calibration: --calibration {folder} is not read" in capsys.readouterr().err


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


@pytest.mark.parametrize("given", [True, False])
def test_a_file_called_digits_is_not_the_digits_task(
    subjects: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    """Answers to the user's questions may differ at near ties, whatever their file is called."""
    subject = subjects("siglip", "llama")
    monkeypatch.setattr("export.evidence.is_tie", lambda *_: True)
    asked = dataclasses.replace(
        subject.evidence, answers=((0,),) * len(subject.evidence.answers), task="digits", given=given, knows_digits=True
    )
    backend = TorchBackend(subject.student)
    tokenizer = subject.student.checkpoint.tokenizer
    result, found = accuracy(backend, lambda: backend, tokenizer, asked, GATES["onnx", "fp32"])
    assert result["tokens_equal"] == 0.0
    assert [f for f in found if "greedy answers" in f] == (
        [] if given else ["greedy answers: tokens_equal 0.0000 is below 1.0"]
    )


@pytest.mark.parametrize(
    ("target", "precision", "said", "own", "foreign"),
    [
        ("tensorrt", "int8", "calibrating on", "3 prompts", "32 prompts"),
        (
            "gguf",
            "q4_k_m",
            "gathering an importance matrix on",
            "3 images of mine.json with questions and answers",
            "16 images of digits (training split) with questions and answers",
        ),
    ],
)
def test_every_target_calibrates_on_the_students_own_questions(
    subjects: Callable[..., Any],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    target: Any,
    precision: str,
    said: str,
    own: str,
    foreign: str,
) -> None:
    """Or says that it had to take images the student does not know."""
    subject = subjects("siglip", "qwen2")
    records = [{"image": f"{i}.png", "question": f"{i} ?", "answer": "x"} for i in range(8)]
    (folder / "mine.json").write_text(json.dumps(records))
    evidence = dataclasses.replace(subject.evidence, task="mine")
    free = read_questions(folder / "mine.json")[:3]

    def calibrated_on(questions: list[Question], out: str) -> str:
        root = folder / out
        root.mkdir()
        run = ExportOptions(target, subject.directory, root, precision, data=folder / "mine.json")
        if target == "gguf":
            manifest = build(subject.student, evidence, run, root, questions=questions)
            return str(manifest.precision["decoder"]["imatrix"]["data"])
        making = Making(subject.student, evidence, run, root, Stages(None), questions)
        making.trt_storage()
        assert making.calibration is not None
        return f"{making.calibration.prompts} prompts"

    assert calibrated_on(free, "own") == own
    assert f"{said} real images" in capsys.readouterr().err
    assert calibrated_on([], "foreign") == foreign
    assert f"{said} digits, which this student does not know" in capsys.readouterr().err


@pytest.mark.parametrize(("target", "precision", "decoder"), [("tensorrt", "fp16", "llama"), ("gguf", "f16", "qwen3")])
def test_a_long_question_is_measured(
    exported: Callable[..., Any], tmp_path: Path, target: str, precision: str, decoder: str
) -> None:
    """Longer than the room a backend has for the questions of the digits."""
    made = exported(target, precision, "siglip", decoder)
    # a tiny student reads no more than that room: one that reads further, of the same weights
    facts = dataclasses.replace(made.subject.student.facts, context_length=4096)
    student = dataclasses.replace(made.subject.student, facts=facts)
    manifest = dataclasses.replace(made.manifest, model={**made.manifest.model, "context_length": 4096})
    long = Question(digits.sample("test", 0).image, " ".join(digits.PLACES * 180), ("a",))
    evidence = collect(student, 0, 0, limit=2, questions=[long], task="mine")
    assert 1024 < evidence.longest <= 4096
    assert measure(student.checkpoint, evidence, made.root, manifest).accuracy["n"] == 1


def test_photos_are_held_as_the_tower_gets_them(subjects: Callable[..., Any], tmp_path: Path) -> None:
    """Two hundred of 12 megapixels would take 7 GB; preprocessing is compared on the first ones, which stay whole."""
    student = subjects("siglip", "llama").student
    rng, spec = np.random.default_rng(0), student.checkpoint.image
    photo, thumbnail = (Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in ((300, 401), (9, 7)))
    photo.save(tmp_path / "a.png")
    asked = [Question(photo, "q", ("a",))] * (PIXEL_IMAGES + 1) + [Question(thumbnail, "q", ("a",))]
    evidence = collect(student, 0, 0, limit=1, questions=asked, task="mine")
    sizes = [prompt.image.size for prompt in evidence.prompts]
    assert sizes == [photo.size] * PIXEL_IMAGES + [(spec.size, spec.size), thumbnail.size]
    for prompts, _ in (calibration_prompts(student, tmp_path), calibration_prompts(student, None, 1, asked)):
        assert [prompt.image.size for prompt in prompts] == [(spec.size, spec.size)]
        np.testing.assert_array_equal(pixels(prompts[0].image, spec), pixels(photo, spec))


def test_a_question_beyond_the_context_is_named_before_the_work(subjects: Callable[..., Any]) -> None:
    student = subjects("siglip", "llama").student
    image = digits.sample("test", 0).image
    asked = [Question(image, "short ?", ("a",)), Question(image, "the row\n" + "row " * 1100, ("a",))]
    with pytest.raises(UserError, match=r"question 'the row.*\.\.\. takes \d+ tokens .* reads 1024") as caught:
        collect(student, 0, 0, questions=asked, task="mine")
    assert "\n" not in str(caught.value)


def test_other_questions_make_another_importance_matrix(
    subjects: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One from an earlier run is taken for the same questions only."""
    subject = subjects("siglip", "qwen2")
    (folder / "stages").mkdir()
    gathered: list[list[str]] = []

    def gather(_student: Any, _images: Path | None, questions: list[Question], _name: str) -> imatrix.Importance:
        gathered.append([q.text for q in questions])
        return imatrix.Importance({"output.weight": np.ones(4, np.float32)}, 4, "")

    def ask(*texts: str) -> None:
        questions = [Question(folder / "0.png", text, ("a",)) for text in texts]
        run = ExportOptions("gguf", subject.directory, folder / "out", "q4_k_m", data=folder / "mine.json")
        root = folder / str(len(list(folder.iterdir())))
        root.mkdir()
        stages = Stages(folder / "stages")
        to_gguf.find_importance(
            subject.student, subject.evidence, run, parse_gguf("q4_k_m"), root, stages, {}, questions
        )

    monkeypatch.setattr(imatrix, "gather", gather)
    for texts in (("a",), ("a",), ("a", "b"), ()):
        ask(*texts)
    assert gathered == [["a"], ["a", "b"], []]
    ask("b")
    digits.sample("validation", 1).image.resize((99, 9)).save(folder / "0.png")
    ask("b")
    assert gathered[3:] == [["b"], ["b"]]
