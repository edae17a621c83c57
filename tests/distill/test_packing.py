"""Packed rows give what padded rows give: logits, terms, gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from distill.access import gold_pass
from distill.batch import Normaliser
from distill.config import TERMS, Align, LossWeights
from distill.objective import Objective
from distill.packing import plan
from distill.teacher import LiveTeacher
from tests.distill.conftest import Pair


def mask(lengths: list[int], left: bool = False) -> torch.Tensor:
    width = max(lengths)
    rows = [[0] * (width - n) + [1] * n if left else [1] * n + [0] * (width - n) for n in lengths]
    return torch.tensor(rows)


@pytest.mark.parametrize("left", [False, True])
def test_packing_there_and_back_loses_nothing(left: bool) -> None:
    attention = mask([3, 9, 5, 2, 4], left)
    packing = plan(attention)
    assert packing is not None
    assert packing.source_PL.shape == (3, 9), "23 tokens fill three rows of nine"
    values = torch.randn(5, 9, 2)
    torch.testing.assert_close(packing.unpack(packing.pack(values)), values * attention[..., None])


def test_a_token_sees_its_own_sample_only() -> None:
    packing = plan(mask([2, 3, 1]))
    assert packing is not None
    visible = packing.visible()
    for p, i, j in torch.cartesian_prod(*map(torch.arange, visible.shape)).tolist():
        expected = j <= i and packing.sample_PL[p, i] == packing.sample_PL[p, j]
        assert bool(visible[p, i, j]) == bool(expected)


def test_rows_that_do_not_get_fewer_are_left_alone() -> None:
    assert plan(mask([9, 8, 7])) is None


@pytest.mark.parametrize("pad_left", [False, True])
def test_gold_states_are_those_of_padded_rows(pair: Pair, pad_left: bool) -> None:
    batch = pair.batch(pad_left)
    packed = dataclasses.replace(batch, packing=plan(batch.attention_mask_BT))
    assert packed.packing is not None
    plain, ours = gold_pass(pair.student, batch, True), gold_pass(pair.student, packed, True)
    real = batch.attention_mask_BT.bool()
    torch.testing.assert_close(ours.hidden_BTD[real], plain.hidden_BTD[real], atol=1e-5, rtol=1e-5)
    for a, b in zip(ours.cache.layers, plain.cache.layers, strict=True):
        kept = real[:, None].expand(a.keys.shape[:3])
        torch.testing.assert_close(a.keys[kept], b.keys[kept], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a.values[kept], b.values[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["cached", "appended"])
def test_terms_and_gradients_are_those_of_padded_rows(pair: Pair, layout: str) -> None:
    batch = pair.batch()
    pair.student.zero_grad()
    found = []
    for packing in (False, True):
        align = Align(packing=packing, layout=layout)  # type: ignore[arg-type]
        objective = Objective(TERMS, LossWeights(), align, LiveTeacher(pair.teacher, align, 1), 10**6)
        loss, values = objective(pair.student, batch, Normaliser.of(batch))
        loss.backward()
        gradients = {n: p.grad for n, p in pair.student.named_parameters() if p.grad is not None}
        pair.student.zero_grad()
        found.append((values, gradients))
    (plain, expected), (packed, ours) = found
    for name, value in plain.items():
        torch.testing.assert_close(packed[name], value, atol=1e-5, rtol=1e-4)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, atol=5e-5, rtol=2e-3, msg=lambda t, n=name: f"{n}: {t}")
