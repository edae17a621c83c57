"""Fira (arXiv 2410.01623): the memory of a low-rank optimiser, the updates of a full-rank one.

For a matrix W (m x n, m <= n, else transposed) with gradient G:
    every `refresh` steps   P = first r left singular vectors of G
    R = P' G                the gradient in the subspace; Adam's moments are kept of R only
    N = mhat / (sqrt(vhat) + eps)
    phi_i = |N_i| / |R_i|   how Adam scales column i; the paper finds it alike inside and outside the subspace
    S = (G - P R) phi       what is outside, scaled in the same way
    S is shortened to `limit` times its last length where it is longer
    W <- (1 - lr decay) (W - lr (scale P N + S))

All else (vectors, embeddings, matrices no larger than the rank) is torch's own fused AdamW.

Shape legend: m = shorter side, n = longer side, r = rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from distill.methods import FiraOptions
from vlm.console import note

OVERSAMPLING, POWER_ITERATIONS = 8, 2
# rows whose squares are added up at a time: they stay in the processor's cache
ROWS = 128
# share of a gradient's square below which what is left of it is not a difference of two squares any more
CANCELLED = 1e-4
PROJECTOR, AVERAGE, AVERAGE_SQ, NORM = "projector", "low_avg", "low_avg_sq", "residual_norm"


class Fira(torch.optim.Optimizer):
    """Low-rank state, full-rank updates, for the groups whose `rank` is above 0; AdamW for the others.

    Args:
        params: parameter groups; `rank` 0 (default) means AdamW. Groups of (name, parameter) pairs keep their names, by
            which another optimiser can take the state over.
        seed: of the randomised decomposition; its draws touch no global random state, so that all processes agree.

    An update with a gradient that is not finite is skipped, and said once.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        settings: FiraOptions | None = None,
        seed: int = 0,
    ) -> None:
        self.settings, self.seed = settings or FiraOptions(), seed
        self.skipped = 0
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": 0})
        for group in self.param_groups:
            wrong = [p for p in group["params"] if group["rank"] and p.ndim != 2]
            if wrong:
                raise ValueError(
                    f"a tensor of shape {tuple(wrong[0].shape)} has no low rank; put it into a group of rank 0"
                )
        self._handles: list[Any] = []
        if self.settings.per_layer:
            self._update_in_backward()

    def _update_in_backward(self) -> None:
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:

                def update(p: Tensor, number: int = number) -> None:
                    with torch.no_grad():
                        self._step(self.param_groups[number], [p])
                    p.grad = None

                self._handles.append(parameter.register_post_accumulate_grad_hook(update))

    def release(self) -> None:
        """Take the hooks of `per_layer` off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; with `per_layer` the backward pass has done it already."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        waiting = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        if self._finite([p.grad for _, members in waiting for p in members]):
            for group, members in waiting:
                self._step(group, members, checked=True)
        return loss

    def _step(self, group: dict[str, Any], members: list[Tensor], checked: bool = False) -> None:
        if not members or not (checked or self._finite([p.grad for p in members])):
            return
        if not group["rank"]:
            self._adamw(group, members)
            return
        for p in members:
            self._low_rank(group, p)

    def _finite(self, gradients: list[Tensor | None]) -> bool:
        """Whether no gradient has an infinite or undefined entry: one number decides, so there is one wait for a GPU."""
        held = [gradient for gradient in gradients if gradient is not None]
        if not held or bool(torch.isfinite(nn.utils.get_total_norm(held))):
            return True
        self.skipped += 1
        if self.skipped == 1:
            note("warning: a gradient is not finite; the update is skipped (this is said once)")
        return False

    def _adamw(self, group: dict[str, Any], members: list[Tensor]) -> None:
        for p in members:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in members]
        adamw(
            members,
            [p.grad for p in members],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _low_rank(self, group: dict[str, Any], p: Tensor) -> None:
        assert p.grad is not None
        turned = p.shape[0] > p.shape[1]
        wide = p.grad.T if turned else p.grad
        # half precision is for keeping, not for computing
        gradient_mn = wide.to(torch.promote_types(wide.dtype, torch.float32))
        state = self._state(p, gradient_mn, group["rank"])
        if state["step"] % self.settings.refresh == 0:
            state[PROJECTOR] = self._projector(gradient_mn, group["rank"], state["step"]).to(p.dtype)
        state["step"] += 1
        projector_mr = state[PROJECTOR].to(gradient_mn.dtype)
        low_rn = projector_mr.T @ gradient_mn
        inside_rn = _adam(state, low_rn, group).mul_(self.settings.scale)
        factor_n = None
        # in the whole space nothing is left
        if self.settings.residual != "none" and projector_mr.shape[1] < projector_mr.shape[0]:
            factor_n, share = self._residual(state, gradient_mn, projector_mr, low_rn, inside_rn)
            # S = (G - a P R) factor: its second half goes into the product that is needed anyway
            inside_rn -= low_rn * (share * factor_n)
        _apply(p.T if turned else p, gradient_mn, projector_mr, inside_rn, factor_n, group["lr"])
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])

    def _state(self, p: Tensor, gradient_mn: Tensor, rank: int) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            rank = min(rank, gradient_mn.shape[0])
            kind = torch.bfloat16 if self.settings.moments == "bfloat16" else gradient_mn.dtype
            zero_rn = torch.zeros(rank, gradient_mn.shape[1], dtype=kind, device=p.device)
            state.update({"step": 0, AVERAGE: zero_rn, AVERAGE_SQ: zero_rn.clone()})
            state[NORM] = torch.zeros((), dtype=gradient_mn.dtype, device=p.device)
        return state

    def _projector(self, gradient_mn: Tensor, rank: int, step: int) -> Tensor:
        rank = min(rank, gradient_mn.shape[0])
        if self.settings.svd == "exact" or rank + OVERSAMPLING >= gradient_mn.shape[0]:
            return left_vectors(gradient_mn, rank)
        told = f"{self.seed} {step} {tuple(gradient_mn.shape)}".encode()
        generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.blake2b(told, digest_size=7).digest(), "little")
        )
        return range_finder(gradient_mn, rank, generator)

    def _residual(
        self, state: dict[str, Any], gradient_mn: Tensor, projector_mr: Tensor, low_rn: Tensor, inside_rn: Tensor
    ) -> tuple[Tensor, float]:
        """(phi with the limiter, by column; a of S = (G - a P R) phi).

        Args:
            inside_rn: scale N.
        """
        settings = self.settings
        share = settings.scale if settings.residual == "release" else 1.0
        length = column_norms if settings.scaling == "column" else torch.linalg.vector_norm
        low, normed = length(low_rn), length(inside_rn)
        phi = torch.where(low > torch.finfo(low.dtype).tiny, normed / (settings.scale * low), 0.0)
        whole = length(gradient_mn).square()
        # P is orthonormal to the precision of the numbers, so |G - a P R| needs no third product where enough is left
        left = whole + (share**2 - 2 * share) * low.square()
        if state[PROJECTOR].dtype == gradient_mn.dtype and bool(left.sum() > CANCELLED * whole.sum()):
            norm = (phi.square() * left.clamp(min=0)).sum().sqrt()
        else:
            norm = torch.linalg.vector_norm(torch.addmm(gradient_mn, projector_mr, low_rn, alpha=-share) * phi)
        before = state[NORM]
        if settings.limit:
            # before the first step there is nothing to compare with
            allowed = torch.where(before > 0, settings.limit * before, norm)
            shorter = torch.where(norm > allowed, allowed / norm, 1.0)
            phi, norm = phi * shorter, norm * shorter
        state[NORM] = norm
        return phi.expand(gradient_mn.shape[1]), share

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved: the base class would cast what is kept in another type than its parameter."""
        super().load_state_dict(state_dict)
        members = [p for group in self.param_groups for p in group["params"]]
        for number, saved in state_dict["state"].items():
            p = members[number]
            for name, value in saved.items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(p.device, copy=True)

    def state_bytes(self) -> int:
        """Bytes of all state tensors."""
        held = (value for state in self.state.values() for value in state.values())
        return sum(value.numel() * value.element_size() for value in held if isinstance(value, Tensor))


def column_norms(matrix_mn: Tensor) -> Tensor:
    """|column|_n. On a CPU, torch walks down the columns of a row-major matrix, an order of magnitude slower than this."""
    if matrix_mn.device.type != "cpu" or matrix_mn.stride(-1) != 1:
        return torch.linalg.vector_norm(matrix_mn, dim=0)
    total_n = torch.zeros_like(matrix_mn[0])
    for rows_kn in matrix_mn.split(ROWS):
        total_n += rows_kn.square().sum(dim=0)
    return total_n.sqrt_()


def _apply(
    p_mn: Tensor, gradient_mn: Tensor, projector_mr: Tensor, inside_rn: Tensor, factor_n: Tensor | None, lr: float
) -> None:
    """p <- p - lr (P inside + G factor)."""
    if p_mn.dtype == gradient_mn.dtype:
        p_mn.addmm_(projector_mr, inside_rn, alpha=-lr)
        if factor_n is not None:
            p_mn.addcmul_(gradient_mn, factor_n, value=-lr)
        return
    # rounded once only
    update_mn = projector_mr @ inside_rn
    if factor_n is not None:
        update_mn.addcmul_(gradient_mn, factor_n)
    p_mn.add_(update_mn.to(p_mn.dtype), alpha=-lr)


def _adam(state: dict[str, Any], low_rn: Tensor, group: dict[str, Any]) -> Tensor:
    """Bias-corrected and normalised N_rn; the moments move on."""
    beta1, beta2 = group["betas"]
    average_rn = state[AVERAGE].to(low_rn.dtype).lerp_(low_rn, 1 - beta1)
    average_sq_rn = state[AVERAGE_SQ].to(low_rn.dtype).mul_(beta2).addcmul_(low_rn, low_rn, value=1 - beta2)
    # in place where they are of one type already
    state[AVERAGE], state[AVERAGE_SQ] = average_rn.to(state[AVERAGE].dtype), average_sq_rn.to(state[AVERAGE_SQ].dtype)
    step = state["step"]
    root_rn = (average_sq_rn / (1 - beta2**step)).sqrt_().add_(group["eps"])
    return (average_rn / (1 - beta1**step)).div_(root_rn)


def left_vectors(gradient_mn: Tensor, rank: int) -> Tensor:
    """The first left singular vectors P_mr, exactly.

    Of a float32 gradient by the eigenvectors of G G' in double precision, whose squared singular values it still resolves:
    several times faster than a decomposition of G.
    """
    if gradient_mn.dtype == torch.float64:
        return torch.linalg.svd(gradient_mn, full_matrices=False).U[:, :rank].contiguous()
    wide_mn = gradient_mn.double()
    vectors_mm = torch.linalg.eigh(wide_mn @ wide_mn.T).eigenvectors
    return vectors_mm[:, -rank:].flip(1).to(gradient_mn.dtype).contiguous()


def range_finder(gradient_mn: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Left singular vectors P_mr by a randomised decomposition (Halko, Martinsson and Tropp, 2011, algorithm 4.4 and 5.1).

    Args:
        generator: on the CPU, so that every device draws the same numbers.
    """
    width = rank + OVERSAMPLING
    drawn = torch.randn(gradient_mn.shape[1], width, generator=generator, dtype=torch.float32)
    basis = torch.linalg.qr(gradient_mn @ drawn.to(gradient_mn)).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(gradient_mn.T @ basis).Q
        basis = torch.linalg.qr(gradient_mn @ basis).Q
    return basis @ left_vectors(basis.T @ gradient_mn, rank)
