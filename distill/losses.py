"""The four Align-TI loss terms as pure functions (arXiv 2602.09483; terms named as in the paper).

Shape legend: N = selected positions, V = vocabulary, J = visual positions, C = candidates.
Every function returns a sum over its rows, divided by an explicit normaliser, so that micro-batches of unequal size
add up to the full-batch loss exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.config import Direction


def kl_rows(student_NV: Tensor, teacher_NV: Tensor, temperature: float, direction: Direction) -> Tensor:
    """KL divergence per row in nats, times temperature squared (keeps the gradient scale of T = 1).

    Args:
        direction: `forward` is KL(teacher || student), `reverse` is KL(student || teacher).

    Returns:
        kl_N, float32.
    """
    student = F.log_softmax(student_NV.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_NV.float() / temperature, dim=-1)
    target, source = (teacher, student) if direction == "forward" else (student, teacher)
    return (target.exp() * (target - source)).sum(dim=-1) * temperature**2


def sft_loss(student_NV: Tensor, target_N: Tensor, normaliser: Tensor | float) -> Tensor:
    """L_sft = - sum_k log p_S(y_k | x, y_<k) / normaliser, rows already shifted to the predicting positions."""
    return F.cross_entropy(student_NV.float(), target_N, reduction="sum") / normaliser


def kd_loss(
    student_NV: Tensor,
    teacher_NV: Tensor,
    normaliser: Tensor | float,
    temperature: float = 1.0,
    direction: Direction = "forward",
) -> Tensor:
    """L_kd = sum_k KL(p_T(.|x, y_<k) || p_S(.|x, y_<k)) / normaliser."""
    return kl_rows(student_NV, teacher_NV, temperature, direction).sum() / normaliser


def iva_loss(
    student_JV: Tensor,
    teacher_JV: Tensor,
    weight_J: Tensor,
    normaliser: Tensor | float,
    temperature: float = 1.0,
    direction: Direction = "forward",
) -> Tensor:
    """L_iva = sum_j w_j KL(p_T(.|x up to j) || p_S(.|x up to j)) / normaliser (samples with an image).

    `weight_J` sums to one over the visual tokens of each sample.
    """
    return (weight_J.float() * kl_rows(student_JV, teacher_JV, temperature, direction)).sum() / normaliser


def tpa_loss(
    student_CV: Tensor,
    teacher_CV: Tensor,
    normaliser: Tensor | float,
    temperature: float = 1.0,
    direction: Direction = "forward",
) -> Tensor:
    """L_tpa = sum_k sum_m KL(p_T(.|x, y_<k, c_k^m) || p_S(.|x, y_<k, c_k^m)) / normaliser.

    The normaliser is response tokens x K. A candidate dropped because it equals the gold token adds nothing here:
    its divergence is the next position's L_kd term.
    """
    return kl_rows(student_CV, teacher_CV, temperature, direction).sum() / normaliser


def zero_like(hidden: Tensor) -> Tensor:
    """A zero that still belongs to the graph, for a micro-batch where a term has no rows."""
    return hidden.sum() * 0.0 if hidden.requires_grad else torch.zeros((), device=hidden.device)
