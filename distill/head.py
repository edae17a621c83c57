"""One chunked head loss for all terms: hidden states in, weighted loss and gradients out, never [rows, V] logits.

Logits of a few rows at a time are made, turned into the loss and at once into gradients of the hidden states and of the
head, and dropped. Nothing of size rows x V outlives a chunk, of neither model, and no product is computed twice: the
backward pass only hands the gradients on.

Per row r with student logits z, teacher distribution p and student distribution q = softmax(z / T):
    ce_r = - log softmax(z)[label]                          gradient in z: softmax(z) - onehot(label)
    kl_r = T^2 sum_v p log(p / q)        (forward)          gradient in z: T (q - p)
    kl_r = T^2 sum_v q log(q / p)        (reverse)          gradient in z: T q (log(q / p) - sum_v q log(q / p))
    loss = sum_r ce_weight_r ce_r + kl_weight_r kl_r

Shape legend: R = rows, D = student hidden, E = teacher hidden, V = vocabulary, K = stored tokens a row, M = draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill.access import Head
from distill.config import Direction
from distill.teacher import DenseTarget, SparseTarget, Target

# one buffer of a chunk (there are three, four where cross-entropy needs a softmax of its own) takes at most this many
# bytes; fewer rows make a CPU's products slower, more do not make them faster
CHUNK_BYTES = {"cpu": 96 << 20, "cuda": 512 << 20}
Look = Callable[[Tensor, slice], None]


@dataclass(frozen=True)
class Rows:
    """Rows of one kind and how much each counts.

    Attributes:
        hidden_RD: student hidden states at the predicting positions.
        label_R: token to predict, with ce_weight_R.
        target: teacher distributions of the same rows, with kl_weight_R.
        look: called with (student logits of the shared vocabulary, row slice) of every chunk, e.g. to draw candidates.
    """

    hidden_RD: Tensor
    label_R: Tensor | None = None
    ce_weight_R: Tensor | None = None
    target: Target | None = None
    kl_weight_R: Tensor | None = None
    look: Look | None = None


@dataclass(frozen=True)
class RowLosses:
    """Values per row, float32, without gradient; None for what was not asked.

    Attributes:
        variance_R: of kl_R about the divergence from the full teacher, where that was sampled and the error is known.
    """

    ce_R: Tensor | None
    kl_R: Tensor | None
    variance_R: Tensor | None = None


class HeadLoss:
    """Adds up weighted row losses over one head; `total` is the differentiable sum.

    Args:
        head: the student's head; its weight may be frozen.
        vocabulary: leading token ids both models share; divergences compare only these, cross-entropy uses all.
        temperature: of both distributions in every divergence.
        chunk: rows a chunk; 0 chooses by memory.

    The gradients are computed while rows are added, in float32 whatever the weights are, so one head serves any number
    of `add` calls with a single gradient buffer.
    """

    def __init__(
        self, head: Head, vocabulary: int, temperature: float = 1.0, direction: Direction = "forward", chunk: int = 0
    ) -> None:
        self.head, self.vocabulary = head, min(vocabulary, len(head.weight_VD))
        self.temperature, self.direction = temperature, direction
        self.chunk = chunk or chunk_rows(len(head.weight_VD), head.weight_VD.device.type)
        self._trains = torch.is_grad_enabled()
        needs = self._trains and head.weight_VD.requires_grad
        self._grad_VD = torch.zeros_like(head.weight_VD, dtype=torch.float32) if needs else None
        self._inputs: list[Tensor] = []
        self._grads: list[Tensor] = []
        self._value = torch.zeros((), dtype=torch.float32, device=head.weight_VD.device)

    def add(self, rows: Rows) -> RowLosses:
        """Compute the rows' losses and gradients now."""
        count = len(rows.hidden_RD)
        device = rows.hidden_RD.device
        ce_R = torch.zeros(count, device=device) if rows.ce_weight_R is not None else None
        kl_R = torch.zeros(count, device=device) if rows.kl_weight_R is not None else None
        sampled = kl_R is not None and isinstance(rows.target, SparseTarget) and rows.target.scatter is not None
        found = RowLosses(ce_R, kl_R, torch.zeros(count, device=device) if sampled else None)
        wants_grad = self._trains and (ce_R is not None or kl_R is not None)
        grad_RD = torch.zeros_like(rows.hidden_RD) if wants_grad and rows.hidden_RD.requires_grad else None
        with torch.no_grad():
            weight_VD = _compute_type(self.head.weight_VD)
            work = _Work(min(self.chunk, count), len(weight_VD), device)
            for start in range(0, count, self.chunk):
                part = slice(start, min(start + self.chunk, count))
                self._chunk(rows, part, weight_VD, found, grad_RD, work)
            for value_R, weight_R in ((ce_R, rows.ce_weight_R), (kl_R, rows.kl_weight_R)):
                if value_R is not None and weight_R is not None:
                    self._value += (value_R * weight_R).sum()
        if grad_RD is not None:
            self._inputs.append(rows.hidden_RD)
            self._grads.append(grad_RD)
        return found

    def total(self) -> Tensor:
        """The weighted sum of everything added so far; call it once."""
        if not self._trains:
            return self._value
        weight = self.head.weight_VD
        total: Tensor = _HandOn.apply(self._value, self._grad_VD, self._grads, weight, *self._inputs)
        return total

    def _chunk(
        self,
        rows: Rows,
        part: slice,
        weight_VD: Tensor,
        found: RowLosses,
        grad_RD: Tensor | None,
        work: _Work,
    ) -> None:
        hidden = rows.hidden_RD[part].to(weight_VD.dtype)
        logits = _logits(hidden, weight_VD, self.head.soft_cap, work.buffer("logits", len(hidden)))
        if rows.look is not None:
            rows.look(logits[:, : self.vocabulary], part)
        if found.ce_R is None and found.kl_R is None:
            return
        trains = grad_RD is not None or self._grad_VD is not None
        cap = self.head.soft_cap
        slope = None if cap is None or not trains else 1 - (logits / cap) ** 2
        gradient = self._losses(rows, part, logits, found, trains, work)
        if gradient is None:
            return
        if slope is not None:
            gradient *= slope
        narrow = gradient.to(weight_VD.dtype)
        if grad_RD is not None:
            grad_RD[part] = (narrow @ weight_VD).to(grad_RD.dtype)
        if self._grad_VD is not None:
            _add_product(self._grad_VD, narrow, hidden)

    def _losses(
        self,
        rows: Rows,
        part: slice,
        logits: Tensor,
        found: RowLosses,
        trains: bool,
        work: _Work,
    ) -> Tensor | None:
        """Fill in the chunk's values; the weighted gradient of the logits, which are used up."""
        ce_R, kl_R = found.ce_R, found.kl_R
        if kl_R is None:
            assert ce_R is not None
            ce_R[part], gradient = _cross_entropy(logits, rows, part, trains, work)
            return gradient
        assert rows.target is not None
        assert rows.kl_weight_R is not None
        # where both terms read the same softmax, cross-entropy comes out of the divergence's buffers
        one_softmax = self.temperature == 1.0 and self.vocabulary == logits.shape[1]
        dense_forward = self.direction == "forward" and isinstance(rows.target, DenseTarget)
        shared = ce_R is not None and one_softmax and dense_forward
        apart = ce_R is not None and not shared
        terms = _Terms(rows.kl_weight_R[part], self.temperature, self.direction, trains)
        if shared and rows.label_R is not None and rows.ce_weight_R is not None:
            terms = replace(terms, label_R=rows.label_R[part], ce_weight_R=rows.ce_weight_R[part])
        kl = self._divergence(logits, rows.target, part, terms, work, apart)
        kl_R[part] = kl.value_R
        if found.variance_R is not None and kl.variance_R is not None:
            found.variance_R[part] = kl.variance_R
        if ce_R is not None and kl.ce_R is not None:
            ce_R[part] = kl.ce_R
        if ce_R is None or shared:
            return _widen(kl.gradient_RV, logits)
        ce_R[part], gradient = _cross_entropy(logits, rows, part, trains, work)
        if gradient is not None and kl.gradient_RV is not None:
            gradient[:, : self.vocabulary] += kl.gradient_RV
        return gradient

    def _divergence(
        self, logits: Tensor, target: Target, part: slice, terms: _Terms, work: _Work, keep: bool
    ) -> _Divergence:
        """Divergence of one chunk; `keep` says that the logits are needed afterwards."""
        student = work.buffer("student", len(logits), self.vocabulary)
        shared = logits[:, : self.vocabulary]
        scaled = shared
        if self.temperature != 1.0:
            scaled = torch.div(shared, self.temperature, out=work.buffer("teacher", *student.shape))
        torch.log_softmax(scaled, dim=-1, out=student)
        if isinstance(target, SparseTarget):
            return _sparse_divergence(student, target, part, terms)
        weight_VE = _compute_type(target.head.weight_VD)[: self.vocabulary]
        hidden = target.hidden_RE[part].to(weight_VE.dtype)
        raw = _logits(hidden, weight_VE, target.head.soft_cap, work.buffer("teacher", *student.shape))
        if self.temperature != 1.0:
            raw.div_(self.temperature)
        spare = work.buffer("spare" if keep else "logits", *student.shape)
        teacher = torch.log_softmax(raw, dim=-1, out=spare)
        return _dense_divergence(student, teacher, raw, terms)


class _Work:
    """Buffers that every chunk uses again: touching fresh pages costs more than the arithmetic on them."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.size, self.columns, self.device = rows * columns, columns, device
        self._made: dict[str, Tensor] = {}

    def buffer(self, name: str, rows: int, columns: int = 0) -> Tensor:
        """A contiguous float32 buffer [rows, columns], with whatever it held before."""
        columns = columns or self.columns
        if name not in self._made:
            self._made[name] = torch.empty(self.size, dtype=torch.float32, device=self.device)
        return self._made[name][: rows * columns].view(rows, columns)


@dataclass(frozen=True)
class _Terms:
    """What a divergence of one chunk is asked for; with labels, cross-entropy over the same softmax too."""

    kl_weight_R: Tensor
    temperature: float
    direction: Direction
    trains: bool
    label_R: Tensor | None = None
    ce_weight_R: Tensor | None = None


@dataclass(frozen=True)
class _Divergence:
    value_R: Tensor
    gradient_RV: Tensor | None
    ce_R: Tensor | None = None
    variance_R: Tensor | None = None


def _logits(hidden_RD: Tensor, weight_VD: Tensor, cap: float | None, out_RV: Tensor) -> Tensor:
    """Float32 logits of a few rows in the given buffer."""
    if hidden_RD.dtype == out_RV.dtype:
        torch.mm(hidden_RD, weight_VD.T, out=out_RV)
    else:
        out_RV.copy_(hidden_RD @ weight_VD.T)
    return out_RV if cap is None else out_RV.div_(cap).tanh_().mul_(cap)


def _widen(gradient_RV: Tensor | None, logits_RV: Tensor) -> Tensor | None:
    """A gradient of the leading columns as one of all columns, in the logits' buffer where it has to grow."""
    if gradient_RV is None or gradient_RV.shape == logits_RV.shape:
        return gradient_RV
    wide_RV = logits_RV.zero_()
    wide_RV[:, : gradient_RV.shape[1]] = gradient_RV
    return wide_RV


def _cross_entropy(logits: Tensor, rows: Rows, part: slice, trains: bool, work: _Work) -> tuple[Tensor, Tensor | None]:
    """(value_R, weighted gradient_RV or None)."""
    assert rows.label_R is not None
    assert rows.ce_weight_R is not None
    label_R, weight_R = rows.label_R[part], rows.ce_weight_R[part]
    log_q = torch.log_softmax(logits, dim=-1, out=work.buffer("teacher", *logits.shape))
    value_R = -log_q.gather(1, label_R[:, None]).squeeze(1)
    if not trains:
        return value_R, None
    gradient = log_q.exp_().mul_(weight_R[:, None])
    return value_R, gradient.scatter_add_(1, label_R[:, None], -weight_R[:, None].to(gradient.dtype))


def _dense_divergence(student: Tensor, teacher: Tensor, spare: Tensor, terms: _Terms) -> _Divergence:
    """From log-softmax rows of both models; all three buffers are used up."""
    weight_R1 = (terms.kl_weight_R * terms.temperature)[:, None]
    ce_R = None if terms.label_R is None else -student.gather(1, terms.label_R[:, None]).squeeze(1)
    if terms.direction == "forward":
        p = torch.exp(teacher, out=spare)
        value_R = teacher.sub_(student).mul_(p).sum(dim=-1)
        gradient = _forward_gradient(student, p, weight_R1, terms) if terms.trains else None
    else:
        q = torch.exp(student, out=spare)
        ratio = student.sub_(teacher)
        value_R = torch.mul(q, ratio, out=teacher).sum(dim=-1)
        gradient = ratio.sub_(value_R[:, None]).mul_(q).mul_(weight_R1) if terms.trains else None
    return _Divergence(value_R * terms.temperature**2, gradient, ce_R)


def _forward_gradient(log_q: Tensor, p: Tensor, weight_R1: Tensor, terms: _Terms) -> Tensor:
    """weight (q - p), and with labels ce_weight (q - onehot) too."""
    if terms.label_R is None or terms.ce_weight_R is None:
        return log_q.exp_().sub_(p).mul_(weight_R1)
    ce_R1 = terms.ce_weight_R[:, None].to(p.dtype)
    gradient = log_q.exp_().mul_(weight_R1 + ce_R1).addcmul_(p, weight_R1.to(p.dtype), value=-1)
    return gradient.scatter_add_(1, terms.label_R[:, None], -ce_R1)


def _sparse_divergence(student: Tensor, target: SparseTarget, part: slice, terms: _Terms) -> _Divergence:
    if terms.direction != "forward":
        raise ValueError("stored teacher distributions serve the forward divergence only")
    rows = target.take(torch.arange(part.start, part.stop, device=student.device))
    ids, probs = rows.ids_RK, rows.probs_RK.float()
    log_q_RK = student.gather(1, ids)
    value_R = rows.negentropy_R.float() - (probs * log_q_RK).sum(dim=-1)
    variance_R = rows.variance(log_q_RK)
    gradient = None
    if terms.trains:
        gradient = student.exp_().mul_(probs.sum(dim=-1, keepdim=True)).scatter_add_(1, ids, -probs)
        gradient.mul_((terms.kl_weight_R * terms.temperature)[:, None])
    scale = terms.temperature**2
    return _Divergence(value_R * scale, gradient, variance_R=None if variance_R is None else variance_R * scale**2)


def _compute_type(weight: Tensor) -> Tensor:
    """The weight in the type products run in: autocast's where it is on, else its own."""
    kind = weight.device.type
    return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight


def _add_product(total_VD: Tensor, gradient_RV: Tensor, hidden_RD: Tensor) -> None:
    """total += gradient.T @ hidden, accumulated in float32."""
    if gradient_RV.dtype == total_VD.dtype:
        total_VD.addmm_(gradient_RV.T, hidden_RD)
    else:
        total_VD += gradient_RV.T @ hidden_RD


def chunk_rows(vocabulary: int, device: str) -> int:
    """Rows whose float32 logits fit the chunk budget of a device type."""
    budget = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"])
    return max(16, budget // (4 * vocabulary) // 16 * 16)


class _HandOn(torch.autograd.Function):
    """Gives gradients that are known already to their inputs."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, grad_VD: Tensor | None, grads: list[Tensor], weight_VD: Tensor, *_: Tensor
    ) -> Tensor:
        ctx.grad_VD, ctx.grads, ctx.dtype = grad_VD, grads, weight_VD.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        if ctx.grads is None:
            raise RuntimeError("the head loss hands its gradients on once; build the loss again")
        scale = outputs[0]
        # in place: the buffers are large, and a loss is differentiated once
        grads = [grad.mul_(scale) for grad in ctx.grads]
        weight = None if ctx.grad_VD is None else ctx.grad_VD.mul_(scale).to(ctx.dtype)
        ctx.grads = ctx.grad_VD = None
        return None, None, None, weight, *grads
