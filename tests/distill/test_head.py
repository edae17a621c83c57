"""The chunked head loss against full-vocabulary versions, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.access import Head
from distill.config import Direction
from distill.head import HeadLoss, Rows
from distill.teacher import DenseTarget, SparseTarget

R, D, E, V, SHARED = 13, 8, 6, 31, 29


class Case:
    """Random rows with a student head of 31 tokens and a teacher head of 29."""

    def __init__(self, soft_cap: float | None = None) -> None:
        random = torch.Generator().manual_seed(5)
        self.hidden = torch.randn(R, D, generator=random).requires_grad_(True)
        self.weight = torch.randn(V, D, generator=random).requires_grad_(True)
        self.teacher_hidden = torch.randn(R, E, generator=random)
        self.teacher_weight = torch.randn(SHARED, E, generator=random)
        self.label = torch.randint(0, V, (R,), generator=random)
        self.ce_weight, self.kl_weight = torch.rand(2, R, generator=random)
        self.soft_cap = soft_cap

    @property
    def target(self) -> DenseTarget:
        return DenseTarget(self.teacher_hidden, Head(self.teacher_weight, self.soft_cap))

    def logits(self) -> tuple[Tensor, Tensor]:
        return Head(self.weight, self.soft_cap).logits(self.hidden), self.target.head.logits(self.teacher_hidden)

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        loss.backward()
        found = self.hidden.grad, self.weight.grad
        self.hidden.grad = self.weight.grad = None
        assert found[0] is not None
        assert found[1] is not None
        return found[0], found[1]


def naive(case: Case, temperature: float, direction: Direction) -> tuple[Tensor, Tensor]:
    student, teacher = case.logits()
    ce_R = F.cross_entropy(student, case.label, reduction="none")
    q = (student[:, :SHARED] / temperature).log_softmax(-1)
    p = (teacher / temperature).log_softmax(-1)
    a, b = (p, q) if direction == "forward" else (q, p)
    return ce_R, (a.exp() * (a - b)).sum(-1) * temperature**2


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("terms", ["ce", "kl", "both"])
def test_values_and_gradients_equal_the_full_vocabulary_version(
    soft_cap: float | None, temperature: float, direction: Direction, terms: str
) -> None:
    case = Case(soft_cap)
    ce_R, kl_R = naive(case, temperature, direction)
    weights = case.ce_weight * (terms != "kl"), case.kl_weight * (terms != "ce")
    expected = (ce_R * weights[0]).sum() + (kl_R * weights[1]).sum()
    expected_grads = case.gradients(expected)
    loss = HeadLoss(Head(case.weight, soft_cap), SHARED, temperature, direction, chunk=4)
    rows = Rows(
        case.hidden,
        case.label if terms != "kl" else None,
        weights[0] if terms != "kl" else None,
        case.target if terms != "ce" else None,
        weights[1] if terms != "ce" else None,
    )
    result = loss.add(rows)
    if terms != "kl":
        torch.testing.assert_close(result.ce_R, ce_R.detach())
    if terms != "ce":
        torch.testing.assert_close(result.kl_R, kl_R.detach(), atol=1e-5, rtol=1e-4)
    total = loss.total()
    torch.testing.assert_close(total, expected.detach(), atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(case.gradients(total * 1.0), expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_several_kinds_of_rows_share_one_gradient() -> None:
    case = Case()
    ce_R, kl_R = naive(case, 1.0, "forward")
    expected = 3 * ((ce_R[:5] * case.ce_weight[:5]).sum() + (kl_R[5:] * case.kl_weight[5:]).sum())
    expected_grads = case.gradients(expected)
    loss = HeadLoss(Head(case.weight), SHARED, chunk=3)
    target = DenseTarget(case.teacher_hidden[5:], case.target.head)
    loss.add(Rows(case.hidden[:5], case.label[:5], case.ce_weight[:5]))
    loss.add(Rows(case.hidden[5:], target=target, kl_weight_R=case.kl_weight[5:]))
    loss.add(Rows(case.hidden[:0], case.label[:0], case.ce_weight[:0]))
    for ours, theirs in zip(case.gradients(3 * loss.total()), expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_stored_distribution_with_every_token_equals_the_live_one() -> None:
    case = Case()
    logp = case.logits()[1].log_softmax(-1)
    stored = SparseTarget(torch.arange(SHARED).expand(R, -1), logp.exp(), (logp.exp() * logp).sum(-1))
    found = []
    for target in (case.target, stored):
        loss = HeadLoss(Head(case.weight), SHARED, chunk=5)
        kl_R = loss.add(Rows(case.hidden, target=target, kl_weight_R=case.kl_weight)).kl_R
        found.append((kl_R, *case.gradients(loss.total())))
    for live, cached in zip(*found, strict=True):
        torch.testing.assert_close(live, cached, atol=1e-6, rtol=1e-5)


def test_a_frozen_head_still_passes_the_gradient_to_the_hidden_states() -> None:
    case = Case()
    expected = case.gradients((naive(case, 1.0, "forward")[1] * case.kl_weight).sum())[0]
    loss = HeadLoss(Head(case.weight.detach()), SHARED)
    loss.add(Rows(case.hidden, target=case.target, kl_weight_R=case.kl_weight))
    loss.total().backward()
    assert case.weight.grad is None
    torch.testing.assert_close(case.hidden.grad, expected, atol=1e-5, rtol=1e-4)


def test_logits_are_shown_once_in_order_and_only_the_shared_vocabulary() -> None:
    case = Case()
    seen: list[Tensor] = []
    loss = HeadLoss(Head(case.weight), SHARED, chunk=4)
    loss.add(Rows(case.hidden, look=lambda logits, part: seen.append(logits.clone())))
    torch.testing.assert_close(torch.cat(seen), case.logits()[0][:, :SHARED].detach())


def test_without_gradients_the_value_alone_is_computed() -> None:
    case = Case()
    expected = (naive(case, 1.0, "forward")[0] * case.ce_weight).sum().detach()
    with torch.no_grad():
        loss = HeadLoss(Head(case.weight), SHARED)
        loss.add(Rows(case.hidden, case.label, case.ce_weight))
        total = loss.total()
    assert not total.requires_grad
    torch.testing.assert_close(total, expected)


def test_bfloat16_autocast_keeps_the_loss_in_float32() -> None:
    case = Case()
    expected = case.gradients((naive(case, 1.0, "forward")[0] * case.ce_weight).sum())
    with torch.autocast("cpu", torch.bfloat16):
        loss = HeadLoss(Head(case.weight), SHARED, chunk=4)
        loss.add(Rows(case.hidden, case.label, case.ce_weight))
        total = loss.total()
    assert total.dtype == torch.float32
    ours = case.gradients(total)
    assert ours[1].dtype == torch.float32
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


def test_differentiating_twice_is_refused() -> None:
    case = Case()
    loss = HeadLoss(Head(case.weight), SHARED)
    loss.add(Rows(case.hidden, case.label, case.ce_weight))
    total = loss.total()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("terms", ["kl", "both"])
def test_one_softmax_serves_both_terms_when_the_vocabularies_are_equal(soft_cap: float | None, terms: str) -> None:
    case = Case(soft_cap)
    teacher_weight = torch.randn(V, E, generator=torch.Generator().manual_seed(9))
    target = DenseTarget(case.teacher_hidden, Head(teacher_weight, soft_cap))
    logp, logq = (
        h.logits(x).log_softmax(-1)
        for h, x in ((target.head, case.teacher_hidden), (Head(case.weight, soft_cap), case.hidden))
    )
    ce_R = F.nll_loss(logq, case.label, reduction="none")
    kl_R = (logp.exp() * (logp - logq)).sum(-1)
    both = terms == "both"
    expected = (kl_R * case.kl_weight).sum() + (ce_R * case.ce_weight).sum() * both
    expected_grads = case.gradients(expected)
    loss = HeadLoss(Head(case.weight, soft_cap), V, chunk=4)
    found = loss.add(
        Rows(case.hidden, case.label if both else None, case.ce_weight if both else None, target, case.kl_weight)
    )
    torch.testing.assert_close(found.kl_R, kl_R.detach(), atol=1e-6, rtol=1e-5)
    if both:
        torch.testing.assert_close(found.ce_R, ce_R.detach(), atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(case.gradients(loss.total()), expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
