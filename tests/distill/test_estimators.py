"""Weights of tokens, and terms estimated at sampled positions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from distill.batch import Normaliser
from distill.config import TERMS, Align, LossWeights
from distill.objective import Objective
from distill.teacher import LiveTeacher
from tests.distill.conftest import Pair
from tests.distill.test_align_ti import all_terms, positions


def test_token_weights_scale_the_response_terms_position_by_position(qwen2_pair: Pair) -> None:
    batch = qwen2_pair.batch()
    sample_N, place_N, _ = positions(batch)
    random = torch.rand(len(sample_N), generator=torch.Generator().manual_seed(4))
    weight_BT = torch.zeros(batch.input_ids_BT.shape)
    objective = all_terms(qwen2_pair)

    def terms(weight_N: Tensor, normaliser: Normaliser | None = None) -> dict[str, Tensor]:
        weighted = dataclasses.replace(batch, token_weight_BT=weight_BT.index_put((sample_N, place_N), weight_N))
        return objective(qwen2_pair.student, weighted, normaliser or Normaliser.of(weighted))[1]

    plain = objective(qwen2_pair.student, batch, Normaliser.of(batch))[1]
    for name, value in terms(torch.full((len(sample_N),), 0.5)).items():
        torch.testing.assert_close(value, plain[name], msg=lambda t, n=name: f"{n}: equal weights change nothing: {t}")
    one = [terms(torch.eye(len(sample_N))[n], Normaliser(1.0, 1.0)) for n in range(len(sample_N))]
    expected = sum((w * values["tpa"] for w, values in zip(random, one, strict=True)), start=torch.zeros(()))
    together = terms(random, Normaliser(1.0, 1.0))
    torch.testing.assert_close(together["tpa"], expected, atol=1e-5, rtol=1e-4)
    for name in ("sft", "kd"):
        expected = sum((w * values[name] for w, values in zip(random, one, strict=True)), start=torch.zeros(()))
        torch.testing.assert_close(together[name], expected, atol=1e-4, rtol=1e-4)


def test_sampled_positions_are_unbiased(qwen2_pair: Pair) -> None:
    """L_tpa over a share of the positions and L_iva over a few visual tokens average to the full terms."""
    batch = qwen2_pair.batch()
    normaliser = Normaliser.of(batch)

    def terms(align: Align, seed: int) -> dict[str, Tensor]:
        objective = Objective(TERMS, LossWeights(), align, LiveTeacher(qwen2_pair.teacher, align, 1), 10**6)
        with torch.no_grad():
            return objective(qwen2_pair.student, batch, normaliser, [seed * 10 + row for row in range(5)])[1]

    exact = terms(Align(sampling="top-k", tpa_share=1.0, iva_rows=0), 0)
    assert int(batch.image_BT.sum(dim=1).max()) > 4, "sampling has something to leave out"
    drawn = [terms(Align(sampling="top-k", tpa_share=0.4, iva_rows=4), seed) for seed in range(60)]
    for name in ("tpa", "iva"):
        values = torch.stack([found[name] for found in drawn])
        assert values.std() > 0
        error = 4 * float(values.std()) / len(values) ** 0.5
        assert abs(float(values.mean()) - float(exact[name])) < error, name


@pytest.mark.parametrize("term", ["iva", "tpa"])
def test_gradients_at_sampled_positions_are_unbiased(qwen2_pair: Pair, term: str) -> None:
    """The same for the gradient, with the candidates taken as given: its slopes along random directions."""
    batch, parameters = qwen2_pair.batch(), list(qwen2_pair.student.parameters())
    random = torch.Generator().manual_seed(7)
    directions = [[torch.randn(p.shape, generator=random) for p in parameters] for _ in range(3)]

    def slopes(align: Align, seed: int) -> Tensor:
        objective = Objective((term,), LossWeights(), align, LiveTeacher(qwen2_pair.teacher, align, 1), 10**6)
        loss, _ = objective(qwen2_pair.student, batch, Normaliser.of(batch), [seed * 10 + row for row in range(5)])
        found = torch.autograd.grad(loss, parameters, materialize_grads=True)
        products = [[(g * d).sum() for g, d in zip(found, to, strict=True)] for to in directions]
        return torch.stack([torch.stack(one).sum() for one in products])

    exact = slopes(Align(sampling="top-k", tpa_share=1.0, iva_rows=0), 0)
    drawn = torch.stack([slopes(Align(sampling="top-k", tpa_share=0.4, iva_rows=4), seed) for seed in range(30)])
    error = 4 * drawn.std(dim=0) / len(drawn) ** 0.5
    assert (error > 0).all()
    assert (error < exact.abs()).any(), "a gradient that is halved or missing would be seen"
    assert ((drawn.mean(dim=0) - exact).abs() < error).all()
