"""The residual's norm, which the limiter compares from step to step, in single precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill.fira import NORM, PROJECTOR, Fira, column_norms
from distill.methods import FiraOptions
from tests.distill.test_fira import run


@pytest.mark.parametrize("left", [1e-3, 1e-5, 0.0])
def test_the_norm_is_exact_where_hardly_anything_is_left(left: float) -> None:
    """|G|^2 - |R|^2 cancels in float32; what is stored must be what is applied."""
    random = torch.Generator().manual_seed(0)
    narrow, wide, noise = (torch.randn(*size, generator=random) for size in ((64, 8), (8, 128), (64, 128)))
    p = nn.Parameter(torch.zeros(64, 128))
    optimizer = Fira([{"params": [p], "rank": 8}], lr=1.0, eps=0.0, settings=FiraOptions(residual="orthogonal"))
    (update,) = run(p, optimizer, [narrow @ wide + left * noise])
    projector = optimizer.state[p][PROJECTOR]
    applied = (update - projector @ (projector.T @ update)).norm()
    torch.testing.assert_close(optimizer.state[p][NORM], applied, rtol=0.02, atol=2e-5)


@pytest.mark.parametrize("shape", [(300, 7), (7, 300), (128, 5), (1, 1)])
def test_column_norms(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    for given in (matrix, matrix.T.contiguous().T):
        torch.testing.assert_close(column_norms(given), torch.linalg.vector_norm(matrix, dim=0))
