"""Loss functions and candidate drawing on plain tensors."""

from __future__ import annotations

import pytest
import torch

from distill import losses, ribbon


def test_kl_directions_and_temperature_against_torch() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 11, dtype=torch.float64), torch.randn(5, 11, dtype=torch.float64)
    for temperature in (1.0, 2.5):
        p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
        forward = (p * (p / q).log()).sum(-1) * temperature**2
        reverse = (q * (q / p).log()).sum(-1) * temperature**2
        torch.testing.assert_close(
            losses.kl_rows(student, teacher, temperature, "forward").double(), forward, atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            losses.kl_rows(student, teacher, temperature, "reverse").double(), reverse, atol=1e-5, rtol=1e-4
        )


def test_kl_gradient_is_student_minus_teacher_probabilities() -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7)
    losses.kd_loss(student, teacher, 3).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach() / 3)


def test_candidates_are_distinct_and_follow_the_students_distribution() -> None:
    torch.manual_seed(2)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -20.0]]).repeat(20_000, 1)
    ids = ribbon.propose(logits, 3, "multinomial")
    assert all(len(set(row)) == 3 for row in ids[:500].tolist())
    p = logits[0].softmax(-1)
    first = torch.bincount(ids[:, 0], minlength=5) / len(ids)
    torch.testing.assert_close(first, p, atol=0.015, rtol=0)
    # probability of drawing i first and j second without replacement is p_i p_j / (1 - p_i)
    pair = ((ids[:, 0] == 0) & (ids[:, 1] == 1)).float().mean()
    assert float(pair) == pytest.approx(float(p[0] * p[1] / (1 - p[0])), abs=0.015)


def test_top_k_candidates_are_the_most_likely_tokens() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    assert ribbon.propose(logits, 2, "top-k").tolist() == [[1, 3]]


def test_arrange_drops_gold_and_packs_ragged_rows() -> None:
    ids = torch.tensor([[5, 6], [7, 8], [9, 5]])
    packed = ribbon.arrange(ids, torch.tensor([0, 0, 2]), torch.tensor([3, 4, 2]), torch.tensor([5, 1, 9]), batch=3)
    assert packed.keep_BC.sum(dim=1).tolist() == [3, 0, 1]
    assert packed.ids_BC[0].tolist() == [6, 7, 8]
    assert packed.place_BC[0].tolist() == [3, 4, 4]
    assert packed.ids_BC[2, 0] == 5
    everything = ribbon.arrange(
        ids, torch.tensor([0, 0, 2]), torch.tensor([3, 4, 2]), torch.tensor([5, 1, 9]), batch=3, drop_gold=False
    )
    assert int(everything.keep_BC.sum()) == 6


def test_no_candidates_at_all_gives_an_empty_block() -> None:
    packed = ribbon.arrange(torch.tensor([[4]]), torch.tensor([0]), torch.tensor([1]), torch.tensor([4]), batch=2)
    assert packed.ids_BC.shape == (2, 0)
    assert not packed.keep_BC.any()
