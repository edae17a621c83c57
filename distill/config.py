"""What a training run is told: frozen dataclasses, one docstring line a field; the command line is made from them.

No torch here: a mistyped option should be answered at once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distill.methods import (
    FiraOptions,
    KpodOptions,
    LavitOptions,
    Optim,
    Tokens,
    check_fira,
    check_kpod,
    check_lavit,
    check_lora,
    check_not_negative,
)
from distill.methods import Lora as Lora
from vlm.errors import UserError

Direction = Literal["forward", "reverse"]
Layout = Literal["cached", "appended", "interleaved"]
Sampling = Literal["multinomial", "distinct", "top-k"]

TERMS = ("sft", "kd", "iva", "tpa")
LATENT_TERMS = ("concept", "traj")
OBJECTIVES = {
    "sft": ("sft",),
    "kd": ("sft", "kd"),
    "kd+iva": ("sft", "kd", "iva"),
    "kd+tpa": ("sft", "kd", "tpa"),
    "align-ti": TERMS,
    "lavit": ("sft", *LATENT_TERMS),
    "kd+lavit": ("sft", "kd", *LATENT_TERMS),
    "align-ti+lavit": (*TERMS, *LATENT_TERMS),
}


LOGGERS = ("tensorboard", "trackio", "wandb")
NEW_RUN = Path("runs/NEW")


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms, 0 to leave one out (the paper does not publish its own).

    Attributes:
        sft: next-token cross-entropy on the response.
        kd: KL to the teacher on the response.
        iva: KL at visual tokens, weighted by the teacher's instruction-to-vision attention.
        tpa: KL one step after student-sampled candidates.
        concept: cosine distance of the last latent to what the teacher sees (LaViT; its paper's weight).
        traj: KL of where latents look to where the teacher looks (LaViT; its paper's weight).
    """

    sft: float = 1.0
    kd: float = 1.0
    iva: float = 1.0
    tpa: float = 1.0
    concept: float = 0.3
    traj: float = 0.3

    def __post_init__(self) -> None:
        check_not_negative(vars(self), "weights.")


@dataclass(frozen=True)
class Align:
    """Settings of the distillation terms; where the paper is silent the default is ours and stated here.

    Attributes:
        temperature: of both distributions in every KL.
        direction: forward is KL(teacher || student).
        candidates: K, candidate tokens per response position (4 in the published Qwen2 and Llama files).
        sampling: how candidates are drawn from the student: independently (repeats merged), distinct ones, or the likeliest.
        drop_gold: skip candidates equal to the gold token; L_kd covers them already.
        layout: how candidates run; `cached` is cheapest, the others need no key/value cache.
        packing: fill rows of the decoder with several samples; saves padding where lengths differ, the numbers stay the same.
        tpa_share: share of the drawn candidates that is computed, in proportion to their weight; the loss stays unbiased.
        tpa_entropy: positions where the student's entropy (nats) is below this get no candidates.
        iva_rows: L_iva is computed at most at so many visual positions a sample, drawn by their weight (unbiased); 0 takes all.
        iva_layer: teacher layer whose attention weights the visual tokens; -1 chooses it by IRS before training.
        irs_pairs: image-instruction pairs used to choose that layer.
    """

    temperature: float = 1.0
    direction: Direction = "forward"
    candidates: int = 4
    sampling: Sampling = "multinomial"
    drop_gold: bool = True
    layout: Layout = "cached"
    packing: bool = False
    tpa_share: float = 0.15
    tpa_entropy: float = 0.0
    iva_rows: int = 8
    iva_layer: int = -1
    irs_pairs: int = 200

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise UserError(f"align.temperature must be above 0 and finite, got {self.temperature}")
        if self.candidates < 1:
            raise UserError(f"align.candidates must be at least 1, got {self.candidates}")
        if not 0 < self.tpa_share <= 1:
            raise UserError(f"align.tpa_share is a share above 0 and up to 1, got {self.tpa_share}")
        if not 0 <= self.tpa_entropy < math.inf:
            raise UserError(f"align.tpa_entropy must be 0 nats or more, got {self.tpa_entropy}")
        if self.iva_rows < 0:
            raise UserError(f"align.iva_rows must be 0 (all) or more, got {self.iva_rows}")
        if self.iva_layer < -1:
            raise UserError(f"align.iva_layer must be -1 (chosen by IRS) or a layer number, got {self.iva_layer}")
        if self.irs_pairs < 1:
            raise UserError(f"align.irs_pairs must be at least 1, got {self.irs_pairs}")


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rate by part of the model; 0 means the part's default.

    Attributes:
        vision: vision tower; default lr.
        projector: default projector_lr, else lr.
        llm: decoder; default lr.
        embeddings: token embeddings; default that of the llm.
        lm_head: output head where it is not tied to the embeddings; default that of the llm.
    """

    vision: float = 0.0
    projector: float = 0.0
    llm: float = 0.0
    embeddings: float = 0.0
    lm_head: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative(vars(self), "lrs.")


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        preset: a complete built-in set-up; `digits` needs no download and runs on a CPU.
        teacher: LLaVA checkpoint directory or hub id; the preset brings its own.
        teacher_cache: folder made by `python -m distill cache`, read instead of running the teacher; its weights are not
            loaded. With tpa the candidates are the stored ones, not drawn from the student as it trains.
        teacher_device: where a live teacher runs: auto and same are the student's device, cuda:N another GPU, cpu keeps
            its weights in main memory and moves them layer by layer to the student's GPU.
        teacher_dtype: type of a live teacher's weights.
        teacher_load: quantise a live teacher while loading (needs bitsandbytes).
        student: LLaVA checkpoint directory to start from; the preset builds one.
        vision_tower: SigLIP, SigLIP2 (fixed size) or CLIP directory or hub id (or a LLaVA checkpoint, for its tower); with
            llm, a student is assembled with a fresh projector in OUT/initial.
        llm: Qwen2, Qwen2.5, Qwen3 or Llama language model, directory or hub id.
        feature_layer: hidden state of the tower that an assembled student's projector reads.
        student_layers: keep so many decoder layers (first, last, evenly between) of the student, of the llm, or of the
            teacher if no student is named; 0 keeps all.
        data: JSON or JSON-lines file, parquet file, folder or pattern of shards (parquet, tar, jsonl), saved data set,
            or hf:ORG/NAME[:SPLIT]; LLaVA, ShareGPT, HF messages or rationales.
        images: folder the data's image paths are relative to.
        format: layout of the records; auto looks at the first of them. With the preset alone, rationale makes its answers
            say their steps first.
        on_bad_image: refuse a data set with missing or damaged images, or skip those records (listed in OUT).
        check_images: open every image before training, or only see that the files exist.
        eval_data: data set for evaluation, read like data.
        holdout: records of the data kept out of training for evaluation, chosen by content.
        group_by_length: put records of similar length into one batch (data sets only).
        streaming: read an hf: data set or parquet files row by row, without a copy on this disk.
        objective: one of sft, kd, kd+iva, kd+tpa, align-ti, lavit, kd+lavit, align-ti+lavit.
        out: run directory, the student is written to OUT/student; the default makes a new dated folder under runs/.
        resume: go on from the last complete checkpoint in OUT, with the options stored there.
        steps: optimiser steps.
        batch_size: samples per micro-batch.
        accumulate: micro-batches per optimiser step.
        lr: peak learning rate (cosine decay to zero).
        projector_lr: peak learning rate of the projector; 0 means the same as lr.
        warmup: share of the steps spent warming up; with less than half a step of it the first step has the peak rate.
        weight_decay: decoupled decay of matrices.
        max_grad_norm: gradient clipping; 0 clips nothing.
        optim: adamw, or fira: state of low rank, updates of full rank.
        optim_state: checkpoint folder (of any run of the same model, with either optimiser) whose optimiser state is taken
            over where it has the same form.
        freeze_vision: keep the vision tower fixed; the same as freeze=vision.
        freeze: comma-separated parts to keep fixed: vision, projector, llm, embeddings, lm_head, llm.layers.0-11,
            vision.layers.0-5, or regular expressions of parameter names.
        bf16: train in bfloat16 autocast; weights and optimiser stay float32.
        save_dtype: type the student's weights are stored in; accuracy is measured after rounding to it.
        eval_every: steps between evaluations; 0 only at the end.
        eval_samples: held-out samples for task accuracy.
        save_every: steps between checkpoints.
        log_every: steps between log lines.
        samples: how many distinct training samples the preset's stream holds.
        augment: shift, turn and re-ink the preset's training scans.
        seed: the preset's sample stream, data order, initialisation and candidates.
        threads: CPU threads; 0 leaves torch's choice.
        fsdp: with several processes, shard weights, gradients and optimiser over them (FSDP2) instead of copying (DDP).
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        keep_checkpoints: how many of the newest checkpoints stay.
        keep_best: held-out figure by which the best student is kept in OUT/best (loss where there is no exact match).
        final: which student the run ends with: the last one, or the best by keep_best.
        report_to: comma-separated loggers: tensorboard, trackio, wandb; or none.
        visual_every: steps between checks that answers depend on the image (visual_gain); 0 never checks.
        visual_samples: samples a check looks at.
        lora: low-rank adapters instead of full fine-tuning.
        lrs: peak learning rates by part of the model.
        weights: weights of the loss terms.
        align: settings of the distillation terms.
        fira: settings of the low-rank optimiser.
        tokens: how much each response token counts.
        schedule: kpod learns rationales from their last steps backwards.
        kpod: settings of the weights and the schedule.
        lavit: settings of the latent tokens and their terms.
    """

    preset: Literal["digits", "none"] = "none"
    teacher: str | None = None
    teacher_cache: Path | None = None
    teacher_device: str = "auto"
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    teacher_load: Literal["none", "8bit", "4bit"] = "none"
    student: str | None = None
    vision_tower: str | None = None
    llm: str | None = None
    feature_layer: int = -2
    student_layers: int = 0
    data: Path | None = None
    images: Path | None = None
    format: Literal["auto", "llava", "sharegpt", "messages", "rationale"] = "auto"
    on_bad_image: Literal["stop", "skip"] = "stop"
    check_images: Literal["decode", "exists"] = "decode"
    eval_data: Path | None = None
    holdout: int = 0
    group_by_length: bool = True
    streaming: bool = False
    objective: str = "align-ti"
    out: Path = NEW_RUN
    resume: bool = False
    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 2e-5
    projector_lr: float = 0.0
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optim: Optim = "adamw"
    optim_state: Path | None = None
    freeze_vision: bool = False
    freeze: str = ""
    bf16: bool = False
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    eval_every: int = 0
    eval_samples: int = 500
    save_every: int = 500
    log_every: int = 20
    samples: int = 50_000
    augment: bool = False
    seed: int = 0
    threads: int = 0
    fsdp: bool = False
    gradient_checkpointing: bool = False
    keep_checkpoints: int = 3
    keep_best: Literal["exact_match", "loss", "none"] = "exact_match"
    final: Literal["last", "best"] = "last"
    report_to: str = "tensorboard"
    visual_every: int = 50
    visual_samples: int = 32
    lora: Lora = field(default_factory=Lora)
    lrs: LearningRates = field(default_factory=LearningRates)
    weights: LossWeights = field(default_factory=LossWeights)
    align: Align = field(default_factory=Align)
    fira: FiraOptions = field(default_factory=FiraOptions)
    tokens: Tokens = field(default_factory=Tokens)
    schedule: Literal["none", "kpod"] = "none"
    kpod: KpodOptions = field(default_factory=KpodOptions)
    lavit: LavitOptions = field(default_factory=LavitOptions)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|same|cpu|cuda(:\d+)?", self.teacher_device):
            raise UserError(f"teacher_device {self.teacher_device!r} is unknown; choose auto, same, cpu or cuda:N")
        if self.teacher_cache is not None and (self.teacher_device, self.teacher_load) != ("auto", "none"):
            raise UserError("teacher_cache loads no teacher; drop teacher_device and teacher_load")
        if self.objective not in OBJECTIVES:
            raise UserError(f"objective {self.objective!r} is unknown; choose one of {', '.join(OBJECTIVES)}")
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "log_every",
            "save_every",
            "eval_samples",
            "samples",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise UserError(f"lr must be above 0 and finite, got {self.lr}")
        names = "projector_lr max_grad_norm weight_decay eval_every seed threads student_layers holdout visual_every"
        check_not_negative({name: getattr(self, name) for name in names.split()})
        check_fira(self.optim, self.fira, self.accumulate, self.max_grad_norm, self.fsdp, self.lora.r)
        check_kpod(self.tokens, self.schedule, self.kpod, self.streaming)
        check_lavit(self.has_latents, self.lavit, self.fsdp, self.gradient_checkpointing, self.lora.r)
        if self.has_latents and not self.watches and self.lavit.gate != "none":
            raise UserError(
                f"objective {self.objective} with weights.concept 0 and weights.traj 0 would leave lavit.gate "
                f"{self.lavit.gate} out; set lavit.gate none too, or one of the two weights above 0"
            )
        if self.has_latents and "tpa" in self.terms and self.align.layout != "cached":
            raise UserError(f"objective {self.objective}: the gate needs align.layout cached, got {self.align.layout}")
        if (self.llm is None) != (self.vision_tower is None):
            raise UserError("an assembled student needs both --vision_tower and --llm (a LLaVA checkpoint has a tower)")
        if self.llm is not None and self.student is not None:
            raise UserError("--student and --llm both say what the student is; drop one")
        twice = "tpa" in self.terms and (self.align.layout != "cached" or self.gradient_checkpointing)
        check_lora(self.lora, twice, self.fsdp)
        if self.feature_layer == 0:
            raise UserError("feature_layer counts from 1 (after the first block) or from -1 (after the last), got 0")
        if self.projector_lr and self.lrs.projector and self.projector_lr != self.lrs.projector:
            raise UserError(f"projector_lr {self.projector_lr} and lrs.projector {self.lrs.projector}: give only one")
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup is a share of the steps, from 0 to below 1, got {self.warmup}")
        if not self.terms:
            raise UserError(f"every term of objective {self.objective!r} has weight 0; nothing would be trained")
        self._check_data()
        if self.visual_samples < 2:
            raise UserError(
                f"visual_samples {self.visual_samples}: two samples at least are needed to swap their images"
            )
        if self.final == "best" and (self.keep_best == "none" or not self.eval_every):
            raise UserError("final best needs held-out figures; add --eval_every N and a keep_best other than none")
        for name in self.loggers:
            if name not in LOGGERS:
                raise UserError(f"report_to {name!r} is unknown; choose from {', '.join(LOGGERS)}, or none")

    def _check_data(self) -> None:
        """Refuse options about data that do not go together."""
        needs_data = {"images": None, "format": "auto", "eval_data": None, "holdout": 0, "streaming": False}
        if self.preset == "digits" and self.format == "rationale":  # the preset can say its reasoning
            needs_data.pop("format")
        for name, unset in needs_data.items():
            if self.data is None and getattr(self, name) != unset:
                raise UserError(f"{name} {str(getattr(self, name))!r} without data; add --data F")
        if self.streaming and self.holdout:
            raise UserError(f"holdout {self.holdout}: a stream is not read to its end first; use --eval_data F")
        held_out = self.eval_data is not None or self.holdout
        if self.eval_every and self.data is not None and not held_out:
            raise UserError(
                f"eval_every {self.eval_every}: --data has no held-out questions; add --holdout N or --eval_data F"
            )
        if self.augment and self.data is not None:
            raise UserError("augment applies to the preset's scans only; drop it or --data")

    @property
    def clip_norm(self) -> float:
        """Gradients longer than this are shortened."""
        return self.max_grad_norm or math.inf

    @property
    def loggers(self) -> tuple[str, ...]:
        names = tuple(filter(None, (name.strip() for name in self.report_to.split(","))))
        return () if names == ("none",) else names

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup * self.steps)

    @property
    def terms(self) -> tuple[str, ...]:
        """The loss terms of the objective whose weight is not zero."""
        return tuple(term for term in OBJECTIVES[self.objective] if getattr(self.weights, term) != 0)

    @property
    def has_latents(self) -> bool:
        """Whether the student is given latent tokens."""
        return "concept" in OBJECTIVES[self.objective]

    @property
    def watches(self) -> bool:
        """Whether a term needs to know where the teacher looks."""
        return bool({*LATENT_TERMS} & {*self.terms})

    @property
    def needs_teacher(self) -> bool:
        return any(term != "sft" for term in self.terms)
