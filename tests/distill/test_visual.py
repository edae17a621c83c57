"""The blind-image test of training: healthy, mismatched, unwired and blind students are told apart."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill import run as run_module
from distill import train as train_module
from distill import visual
from distill.config import Align, TrainConfig
from distill.data import Collator, DigitsExamples, Example
from distill.presets import digits_teacher
from distill.visual import Gain, Reading, VisualWatch
from tests.distill.conftest import Pair
from tests.distill.data_sets import Permuted
from vlm.load import load_model, open_checkpoint


def reading(low: float, moved: float = 1.0) -> Reading:
    return Reading(Gain(low + 0.1, low, low + 0.2, 32), moved, 1.0)


def test_gain_is_a_paired_mean_with_its_t_interval() -> None:
    gain = Gain.of([1.0, 2.0, 3.0, 4.0])
    half = 5.841 * np.std([1, 2, 3, 4], ddof=1) / 2
    assert gain.mean == 2.5
    assert (gain.low, gain.high) == pytest.approx((2.5 - half, 2.5 + half))
    assert Gain.of([1.0]).low == -np.inf


@pytest.mark.parametrize("copies", [[1, 1, 1], [2, 1, 1], [3, 2, 2, 1], [4, 1, 1], [1, 1]])
def test_nobody_keeps_an_image_and_answers_stay(copies: Sequence[int]) -> None:
    examples = [
        Example((index, copy), ("text", "response"), (np.full((3, 2, 2), index, np.float32),))
        for index, count in enumerate(copies)
        for copy in range(count)
    ]
    right, wrong = visual.swapped(examples)
    assert len(right) >= 2
    assert [e.ids for e in right] == [e.ids for e in wrong]
    assert all(not np.array_equal(a.pixels[0], b.pixels[0]) for a, b in zip(right, wrong, strict=True))
    same = sorted(float(e.pixels[0][0, 0, 0]) for e in right)
    assert same == sorted(float(e.pixels[0][0, 0, 0]) for e in wrong)


def test_one_image_alone_cannot_be_exchanged() -> None:
    examples = [Example((1,), ("response",), (np.zeros((3, 2, 2), np.float32),))] * 3
    assert visual.swapped(examples) == ([], [])
    assert visual.swapped([Example((1,), ("response",), ())]) == ([], [])


def test_costs_equal_those_of_one_sample_at_a_time(qwen2_pair: Pair) -> None:
    examples = qwen2_pair.examples()
    together, _ = visual.answers(qwen2_pair.student, qwen2_pair.collate(examples))
    for index, example in enumerate(examples):
        batch = qwen2_pair.collate([example])
        logits = qwen2_pair.student(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, pixel_values=batch.pixels_NCHW
        ).logits[0, :-1]
        trained = batch.response_BT[0, 1:]
        cost = torch.nn.functional.cross_entropy(logits[trained], batch.input_ids_BT[0, 1:][trained])
        assert float(together[index]) == pytest.approx(float(cost), abs=1e-5)


def test_patience_follows_warm_up_and_batch() -> None:
    assert visual.patience(5, 32) == 100
    assert visual.patience(300, 256) == 600
    assert visual.patience(5, 8) == 400


def test_verdicts() -> None:
    watch = VisualWatch(100, reading(2.0))
    assert watch.verdict(10, reading(0.01)) == "sees"
    assert watch.verdict(99, reading(-0.01)) == "early"
    assert watch.verdict(100, reading(-0.01)) == "blind"
    assert watch.verdict(10, reading(-0.01, moved=0.0)) == "unwired"
    assert VisualWatch(100, reading(-0.5)).verdict(1, reading(0.1)) == "mismatched"
    assert VisualWatch(100, None).verdict(1, reading(0.1)) == "sees"
    assert watch.warning(99, reading(-0.01)) is None
    first = watch.warning(100, reading(-0.01))
    assert first is not None
    assert "\n" not in first
    assert "learns blind" in first
    assert watch.warning(150, reading(-0.01)) is None


@pytest.mark.parametrize(("images", "expected"), [("right", None), ("permuted", "do not belong together")])
def test_a_run_on_permuted_images_is_flagged_and_a_right_one_is_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    images: str,
    expected: str | None,
) -> None:
    """The committed teacher knows at once; benchmarks/visual_gain.py follows students over 150 steps."""
    if images == "permuted":
        original = run_module._data

        def permuted(*arguments: Any) -> Any:
            data = original(*arguments)
            return dataclasses.replace(data, train=Permuted(data.train))

        monkeypatch.setattr(run_module, "_data", permuted)
    config = TrainConfig(
        preset="digits",
        out=tmp_path / "run",
        steps=4,
        batch_size=2,
        samples=200,
        eval_samples=32,
        visual_every=2,
        threads=1,
        report_to="none",
        align=Align(iva_layer=0),
    )
    train_module.train(config)
    said = capsys.readouterr().err
    assert ("warning" in said) == (expected is not None)
    assert expected is None or said.count(expected) == 1
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    checks = [line for line in lines if "visual_gain" in line]
    assert [line["step"] for line in checks] == [2, 4]
    verdicts = {line["visual_verdict"] for line in checks}
    assert verdicts <= ({"mismatched"} if expected else {"sees", "early"})


def test_the_teacher_sees_and_a_cut_wire_is_noticed() -> None:
    torch.set_num_threads(1)
    source = open_checkpoint(digits_teacher())
    examples = DigitsExamples("train", 64, source.tokenizer, source.image)
    found = visual.probe(examples, 16, Collator(source.tokenizer.spec.pad_token_id))
    assert found is not None
    model = load_model(source)
    device = torch.device("cpu")
    assert visual.read(model, found, device).gain.low > 1
    torch.nn.init.zeros_(model.model.multi_modal_projector.linear_2.weight)
    blind = visual.read(model, found, device)
    assert blind.moved == 0
    assert VisualWatch(100, None).verdict(1, blind) == "unwired"
