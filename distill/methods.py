"""Settings of the methods that stand beside Align-TI: frozen dataclasses, one docstring line a field. No torch here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from vlm.errors import UserError

Optim = Literal["adamw", "fira"]
Residual = Literal["orthogonal", "release", "none"]


@dataclass(frozen=True)
class FiraOptions:
    """Fira (arXiv 2410.01623): optimiser state of low rank, updates of full rank.

    Attributes:
        rank: of the optimiser state (paper: 32 for fine-tuning, 128 to 512 for pre-training); matrices that are not larger
            stay with AdamW.
        refresh: steps between two singular value decompositions of a gradient (paper: 200; 500 for 7B).
        scale: factor on the low-rank part (released code: 1 for fine-tuning, 0.25 and 0.0625 for pre-training).
        residual: what is left of the gradient outside the subspace: orthogonal (paper), release (the published code's,
            which differs where scale is not 1), or none, which is GaLore.
        scaling: the residual's factor is taken by column (paper) or once a matrix.
        limit: the scaled residual's norm may grow by this factor a step; 0 does not limit it.
        svd: exact, or randomized (oversampling 8, two power iterations): much faster for wide matrices.
        moments: type the two low-rank moments are kept in.
        targets: `auto` (every linear layer of the decoder) or a regular expression of parameter names; the rest is AdamW's.
        per_layer: update a parameter as soon as its gradient is there and drop the gradient, so that never two of them are
            held; needs accumulate 1, max_grad_norm 0 and a single process.
    """

    rank: int = 32
    refresh: int = 200
    scale: float = 1.0
    residual: Residual = "orthogonal"
    scaling: Literal["column", "matrix"] = "column"
    limit: float = 1.01
    svd: Literal["exact", "randomized"] = "exact"
    moments: Literal["float32", "bfloat16"] = "float32"
    targets: str = "auto"
    per_layer: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "refresh"):
            if getattr(self, name) < 1:
                raise UserError(f"fira.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.scale < math.inf:
            raise UserError(f"fira.scale must be above 0 and finite, got {self.scale}")
        if self.limit != 0 and not 1 < self.limit < math.inf:
            raise UserError(f"fira.limit must be above 1, or 0 for no limit, got {self.limit}")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise UserError(f"fira.targets {self.targets!r} is not a regular expression ({error})") from None


def check_fira(optim: Optim, fira: FiraOptions, accumulate: int, max_grad_norm: float, fsdp: bool, lora: int) -> None:
    """Refuse settings of a run that do not go together.

    Raises:
        UserError: says which, and what to set.
    """
    if optim != "fira":
        if fira != FiraOptions():
            raise UserError("fira options without the optimiser; add --optim fira or drop them")
        return
    if fsdp:
        raise UserError(
            "optim fira needs whole gradients and fsdp shards them; use plain torchrun (DDP) or optim adamw"
        )
    if lora:
        raise UserError("optim fira with lora: adapters are of low rank already; drop --lora.r or use optim adamw")
    if fira.per_layer and accumulate > 1:
        raise UserError(
            f"fira.per_layer updates after every backward pass, accumulate {accumulate} adds several up; set accumulate 1"
        )
    if fira.per_layer and max_grad_norm:
        raise UserError(
            f"fira.per_layer never holds all gradients, max_grad_norm {max_grad_norm} is about all of them; "
            "set max_grad_norm 0 (Fira limits its own growth)"
        )


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters; they and the projector train, everything else stays fixed.

    Attributes:
        r: rank; 0 trains the weights themselves.
        alpha: adapters are scaled by alpha / r.
        dropout: before each adapter; not with layouts that run the gold sequence twice.
        targets: `auto` (every linear layer of the decoder) or a regular expression of module names.
        vision: adapt the vision tower too.
    """

    r: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str = "auto"
    vision: bool = False

    def __post_init__(self) -> None:
        if self.r < 0:
            raise UserError(f"lora.r must be 0 (off) or more, got {self.r}")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha must be above 0 and finite, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is a share from 0 to below 1, got {self.dropout}")
        if not self.r and (self.dropout or self.targets != "auto" or self.vision):
            raise UserError("lora options without a rank; add --lora.r 16 or drop them")
