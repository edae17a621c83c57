"""Which models are on offer, and what the page may claim about them without loading them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from demo import catalogue, page, tab_about
from vlm.errors import UserError
from vlm.manifest import FileEntry, Manifest, write_manifest


def make_artefact(root: Path, **changes: Any) -> Path:
    root.mkdir(parents=True)
    manifest = Manifest(
        format="onnx",
        created="2026-01-01",
        tools={},
        source={},
        files=(FileEntry("a.onnx", "decoder", 1_500_000, "0"), FileEntry("b.json", "tokenizer", 2_000, "0")),
        io={},
        precision={"decoder": {"type": "int8"}, "vision_encoder": {"type": "fp16"}},
        image={},
        chat={},
        model={},
        pair_id="p",
        golden=(),
    )
    write_manifest(root, dataclasses.replace(manifest, **changes))
    return root


def test_an_artefact_is_described_by_its_manifest(tmp_path: Path) -> None:
    entry = catalogue.describe(make_artefact(tmp_path / "small", verified=True))
    assert (entry.name, entry.engine, entry.verified) == ("small", "ONNX Runtime", True)
    assert catalogue.size_text(entry.bytes) == "1.5 MB"
    assert entry.precision == "int8 decoder, fp16 vision encoder"
    assert entry.label == "small · ONNX Runtime · int8 decoder, fp16 vision encoder"


def test_an_unverified_artefact_is_warned_about_wherever_it_is_named(tmp_path: Path) -> None:
    entry = catalogue.describe(make_artefact(tmp_path / "small"))
    assert "not verified" in entry.label
    card = page.model_card(entry)
    assert "Do not trust these answers yet" in card
    assert f"python -m export verify {entry.path}" in card


def test_a_checkpoint_is_neither_verified_nor_warned_about(student: Path) -> None:
    entry = catalogue.describe(student)
    assert (entry.name, entry.engine, entry.precision, entry.verified) == ("tiny", "PyTorch", "float32", None)
    assert entry.bytes > 1_000_000
    assert "Do not trust" not in page.model_card(entry)


def test_all_artefacts_and_the_newest_student_are_found(tmp_path: Path, student: Path) -> None:
    make_artefact(tmp_path / "artifacts" / "b")
    make_artefact(tmp_path / "artifacts" / "a")
    make_artefact(tmp_path / "artifacts" / ".c.partial-1")  # what a killed export leaves
    found = catalogue.find(tmp_path / "artifacts", student.parent.parent)
    assert [entry.name for entry in found] == ["a", "b", "tiny"]


def test_a_damaged_artefact_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_artefact(tmp_path / "artifacts" / "good")
    (make_artefact(tmp_path / "artifacts" / "bad") / "manifest.json").write_text("{")
    assert [entry.name for entry in catalogue.find(tmp_path / "artifacts", tmp_path)] == ["good"]
    assert "left out" in capsys.readouterr().err


def test_nothing_found_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="python -m distill"):
        catalogue.find(tmp_path, tmp_path)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither an artefact"):
        catalogue.named([tmp_path])


def test_same_names_are_told_apart_and_repeats_dropped(tmp_path: Path) -> None:
    a, b = make_artefact(tmp_path / "x" / "m"), make_artefact(tmp_path / "y" / "m")
    assert [entry.name for entry in catalogue.named([a, b, a])] == ["x/m", "y/m"]


def test_names_are_escaped_on_the_page(tmp_path: Path) -> None:
    card = page.model_card(catalogue.describe(make_artefact(tmp_path / "<b>bold")))
    assert "<b>" not in card


@pytest.mark.parametrize(
    ("precision", "text"),
    [
        ({}, "unknown precision"),
        ({"decoder": "int8"}, "int8"),
        ({"a": {"type": "fp16"}, "b": {"type": "fp16"}}, "fp16"),
    ],
)
def test_precision_text(precision: dict[str, Any], text: str) -> None:
    assert catalogue.precision_text(precision) == text


@pytest.mark.parametrize(("size", "text"), [(12, "12 B"), (1_999, "2.0 kB"), (8_388_608, "8.4 MB"), (2**31, "2.1 GB")])
def test_size_text(size: int, text: str) -> None:
    assert catalogue.size_text(size) == text


def test_the_model_card_tells_all_the_manifest_knows_and_says_what_it_does_not(tmp_path: Path) -> None:
    root = make_artefact(
        tmp_path / "small",
        verified=True,
        source={"student_sha256": "abc123", "data": {"name": "digits"}, "licence": "<b>Apache</b>"},
        parity={"worst": {"prefill": 1.5e-5}, "gate": {"prefill": 3e-4}},
        accuracy={"task": "digits", "n": 200, "before": 0.95, "after": 0.945, "after_interval": [0.91, 0.97]},
    )
    card = tab_about.render(catalogue.describe(root))
    for text in ("abc123", "name digits", "1.5e-05", "0.0003", "n = 200", "0.945", "0.91 to 0.97", "1.5 MB", "a.onnx"):
        assert text in card, text
    assert "<b>Apache" not in card
    assert '<th scope="row">teacher</th><td>–</td>' in card
    empty = tab_about.render(catalogue.describe(make_artefact(tmp_path / "bare")))
    assert empty.count("Not recorded.") == 2  # parity and accuracy
    assert "NO: not every gate held" in empty


def test_a_model_card_of_a_checkpoint_and_of_nothing(student: Path, tmp_path: Path) -> None:
    entry = catalogue.describe(student)
    assert "PyTorch checkpoint" in tab_about.render(entry)
    damaged = dataclasses.replace(entry, path=make_artefact(tmp_path / "x"))
    (damaged.path / "manifest.json").write_text("{")
    assert "is damaged" in tab_about.render(damaged)
