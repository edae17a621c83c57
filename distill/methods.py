"""Settings of the methods that stand beside Align-TI: frozen dataclasses, one docstring line a field. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vlm.errors import UserError

Optim = Literal["adamw", "fira"]
Residual = Literal["orthogonal", "release", "none"]


def check_not_negative(values: Mapping[str, float], prefix: str = "") -> None:
    """Refuse a negative, infinite or undefined value among options of these names."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{prefix}{name} must be 0 or more and finite, got {value}")


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
        svd: exact (eigenvectors of G G' in double precision), or randomized (oversampling 8, two power iterations): faster.
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
class Tokens:
    """How much each response token counts.

    Attributes:
        weights: kpod learns them from rationales: how much a token of the reasoning matters to the answer.
        normalise: the response terms are divided by the weight of all tokens, by their number, or by the samples (the
            paper's sums over tokens).
    """

    weights: Literal["none", "kpod"] = "none"
    normalise: Literal["weight", "count", "sample"] = "weight"


@dataclass(frozen=True)
class KpodOptions:
    """KPOD (arXiv 2405.16064): weights of reasoning tokens, and a schedule from their last steps backwards.

    Attributes:
        alpha: price of a kept token while the weights are learned.
        prefixes: of a rationale, drawn a step for the answer to be predicted from.
        weigher_steps: steps the weigher is trained for, before the student is.
        weigher_batch: rationales a step of it.
        weigher_lr: its learning rate.
        predictor_rank: the student's copy that predicts answers learns through adapters of this rank; 0 trains all of it.
        predictor_lr: its learning rate.
        floor: smallest weight, so that no token is left to chance.
        stages: T, stages until whole rationales are learned; 0 means half the epochs, at least 4.
        until: share of the steps after which whole rationales are learned.
        start: C0, share of all difficulty that is learned from the first stage on.
        growth: p, how fast the rest follows.
        diversity: beta, how much a stage prefers samples of different clusters.
        clusters: of questions, by their mean embedding.
    """

    alpha: float = 0.5
    prefixes: int = 4
    weigher_steps: int = 300
    weigher_batch: int = 16
    weigher_lr: float = 1e-3
    predictor_rank: int = 16
    predictor_lr: float = 5e-4
    floor: float = 0.05
    stages: int = 0
    until: float = 0.5
    start: float = 0.3
    growth: float = 0.5
    diversity: float = 12.0
    clusters: int = 5

    def __post_init__(self) -> None:
        for name in ("prefixes", "weigher_steps", "weigher_batch", "clusters"):
            if getattr(self, name) < 1:
                raise UserError(f"kpod.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("alpha", "predictor_rank", "stages", "growth", "diversity"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"kpod.{name} must be 0 or more and finite, got {getattr(self, name)}")
        for name in ("weigher_lr", "predictor_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"kpod.{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("floor", "start", "until"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"kpod.{name} is a share from 0 to 1, got {getattr(self, name)}")


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


def check_lora(lora: Lora, gold_twice: bool, fsdp: bool) -> None:
    """Refuse settings of a run that do not go together.

    Args:
        gold_twice: a step runs the gold sequence a second time and needs the same activations again.

    Raises:
        UserError: says which, and what to set.
    """
    if lora.dropout and gold_twice:
        raise UserError(
            "lora.dropout needs align.layout cached without gradient_checkpointing: other layouts run the gold "
            "sequence twice, with different dropout; set lora.dropout 0"
        )
    if lora.r and fsdp:
        raise UserError("lora with fsdp is not supported: the frozen weights are not sharded; use plain torchrun (DDP)")


def check_kpod(tokens: Tokens, schedule: str, kpod: KpodOptions, streaming: bool) -> None:
    """Refuse settings of a run that do not go together.

    Raises:
        UserError: says which, and what to set.
    """
    if tokens.weights != "kpod" and schedule != "kpod":
        if kpod != KpodOptions():
            raise UserError(
                "kpod options without its weights or schedule; add --tokens.weights kpod or --schedule kpod"
            )
        return
    if streaming:
        raise UserError("kpod looks at every rationale before training; drop --streaming")


@dataclass(frozen=True)
class LavitOptions:
    """LaViT (arXiv 2601.10129): latent tokens before the answer that look where the teacher looks.

    Attributes:
        latents: K, special tokens the student says before every answer.
        layers: last decoder layers of either model whose attention is the gaze.
        keep: visual tokens with the largest gaze that are kept of the teacher's.
        pool: which latent's hidden state is compared with the teacher's image: the last one's, or their mean.
        traj: where the student's gaze comes from: attention (paper), or a small trained head (published code).
        reduction: the divergences of the latents are averaged or, as in the paper, added up.
        gate: attention from text to the image is opened slowly (cosine), at once (hard), or never closed (none).
        gate_share: share of the steps until it is open.
        gate_floor: the factor on attention odds it starts with.
        gate_prompt: close it for the question and the template too; otherwise the image reaches the answer through them.
    """

    latents: int = 4
    layers: int = 8
    keep: int = 8
    pool: Literal["last", "mean"] = "last"
    traj: Literal["attention", "head"] = "attention"
    reduction: Literal["mean", "sum"] = "mean"
    gate: Literal["cosine", "hard", "none"] = "cosine"
    gate_share: float = 0.4
    gate_floor: float = 1e-6
    gate_prompt: bool = True

    def __post_init__(self) -> None:
        for name in ("latents", "layers", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"lavit.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.gate_share <= 1:
            raise UserError(f"lavit.gate_share is a share of the steps, from 0 to 1, got {self.gate_share}")
        if not 0 < self.gate_floor <= 1:
            raise UserError(f"lavit.gate_floor must be above 0 and up to 1, got {self.gate_floor}")


def check_lavit(has_latents: bool, lavit: LavitOptions, fsdp: bool, recomputing: bool, lora: int) -> None:
    """Refuse settings of a run that do not go together.

    Raises:
        UserError: says which, and what to set.
    """
    if not has_latents:
        if lavit != LavitOptions():
            raise UserError(
                "lavit options without the objective; add --objective lavit (or align-ti+lavit) or drop them"
            )
        return
    if fsdp:
        raise UserError("objective lavit trains a small head beside the student, which fsdp does not shard; use DDP")
    if lora:
        raise UserError(
            "objective lavit with lora: latent tokens are new and their embeddings must train; drop --lora.r"
        )
    if recomputing:
        raise UserError("objective lavit reads attention of the forward pass; drop --gradient_checkpointing")
