"""Everything a run has loaded: student, teacher, data, and the objective over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distill import (
    cache,
    evaluate,
    generate,
    kpod,
    models,
    optimizers,
    placement,
    predictor,
    presets,
    processes,
)
from distill.access import width
from distill.config import Align, TrainConfig
from distill.data import (
    Collator,
    DataOptions,
    DigitsExamples,
    Examples,
    StreamOptions,
    open_split,
    open_streaming_split,
)
from distill.lavit import Lavit, LavitHead
from distill.objective import Objective
from distill.pair import shared_vocabulary
from distill.teacher import Teacher
from vlm import allocator, digits
from vlm.errors import UserError
from vlm.load import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from distill.trainer import DistillTrainer


@dataclass(frozen=True)
class Data:
    """Training examples, a validation set for choices made during training, and the test set for the final figure."""

    train: Examples
    validation: Examples | None
    test: Examples | None
    description: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Everything a run has loaded; the teacher is live (`placed`) or read from disk (`cached`)."""

    config: TrainConfig
    student: nn.Module
    student_source: Checkpoint
    placed: placement.Placed | None
    teacher_source: Checkpoint | None
    data: Data
    vocabulary: int
    cached: cache.Cached | None = None

    @property
    def teacher(self) -> nn.Module | None:
        """The live teacher's model."""
        return None if self.placed is None else self.placed.model

    def collate(self) -> Collator:
        """Batches as the student is trained on them, with its latent tokens where it has some."""
        spec = self.student_source.tokenizer.spec
        return Collator(spec.pad_token_id, keys=self.cached is not None, latents=spec.latent_token_ids)

    def plain(self) -> Collator:
        """Batches as a teacher is shown them."""
        return Collator(self.student_source.tokenizer.spec.pad_token_id)

    def asked(self, align: Align, iva_layer: int) -> Teacher | None:
        """The teacher as the objective asks it."""
        if self.cached is not None:
            return self.cached.teacher
        lavit = self.config.lavit if self.config.watches else None
        return None if self.placed is None else self.placed.teacher(align, iva_layer, lavit)

    def objective(self, align: Align, iva_layer: int) -> Objective:
        """What is trained; the parameters of a LaViT head lie beside the student."""
        config = self.config
        head = None
        if config.watches:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                sizes = (width(self.student), self.cached.semantics if self.cached else width(self.teacher))
                made = LavitHead(*sizes, config.lavit.traj).to(next(self.student.parameters()).device)
            head = Lavit(config.lavit, made, config.steps)
        teacher = self.asked(align, iva_layer)
        return Objective(config.terms, config.weights, align, teacher, self.vocabulary, head)

    def validate(self, trainer: DistillTrainer) -> dict[str, float]:
        """Held-out value of every term, their sum, and task accuracy; in every process."""
        held_out = self.data.validation
        if held_out is None:
            return {}
        collate = self.collate()
        count, size = self.config.eval_samples, evaluate.batch_size(self.config.batch_size)

        def work(student: nn.Module) -> dict[str, float]:
            terms = evaluate.held_out_terms(student, trainer.objective, held_out, min(count, 200), collate, size)
            return {**terms, "exact_match": evaluate.accuracy(student, held_out, count, collate, size).exact_match}

        return trainer.on_student(work)


def load_run(config: TrainConfig) -> Run:
    """Open teacher, student and data of a configuration.

    Raises:
        UserError: one of them is missing, damaged, or they do not fit together.
    """
    if placement.student_device().type == "cpu":
        allocator.keep_freed()
    teacher_source = None
    if config.teacher:
        teacher_source = models.open_model(config.teacher)
    elif config.preset == "digits" and (config.needs_teacher or not (config.student or config.llm)):
        teacher_source = open_checkpoint(presets.digits_teacher())
    from_cache = config.needs_teacher and config.teacher_cache is not None
    if config.needs_teacher and teacher_source is None and not from_cache:
        raise UserError(f"objective {config.objective!r} needs a teacher; pass --teacher DIR or --objective sft")
    student, student_source = models.open_student(config, teacher_source)
    data = _data(config, student_source)
    if kpod.wanted(config):
        kpod.refuse_without_steps(data.train)
        if config.tokens.weights == "kpod":
            predictor.refuse(student)
    if any(held_out is not None and held_out[0].steps is not None for held_out in (data.validation, data.test)):
        # these are scored by decoding, which would stop the run at its first evaluation
        generate.refuse(student)
    if (start := optimizers.state_to_start_from(config)) is not None:
        optimizers.refuse_without_state(start)
    if len(data.train) < config.batch_size * processes.world():
        several = f" in each of {processes.world()} processes" if processes.world() > 1 else ""
        raise UserError(
            f"{len(data.train)} training samples do not fill one batch of {config.batch_size}{several}; lower batch_size"
        )
    vocabulary = int(student_source.config["text_config"]["vocab_size"])
    placed = cached = None
    if from_cache:
        device = placement.student_device()
        cached = cache.open_cached(config, student_source, teacher_source, device, data.train)
        vocabulary = cached.vocabulary
    elif config.needs_teacher and teacher_source is not None:
        vocabulary = shared_vocabulary(teacher_source, student_source)
        if config.align.candidates >= vocabulary:
            raise UserError(f"align.candidates {config.align.candidates}: the vocabulary has only {vocabulary} tokens")
        placed = placement.place(teacher_source, config)
    models.prepare(config, student)
    if config.has_latents and not student.get_input_embeddings().weight.requires_grad:  # type: ignore[operator]
        raise UserError(
            f"objective {config.objective!r}: latent tokens are new and their embeddings must train; drop --lora.r, and "
            "embeddings and llm from --freeze"
        )
    return Run(config, student, student_source, placed, teacher_source, data, vocabulary, cached)


def _data(config: TrainConfig, student: Checkpoint) -> Data:
    if config.preset == "digits" and config.data is None:
        seen, steps = (student.tokenizer, student.image), config.format == "rationale"
        return Data(
            DigitsExamples("train", config.samples, *seen, config.seed, config.augment, steps),
            DigitsExamples("validation", config.eval_samples, *seen, steps=steps),
            DigitsExamples("test", config.eval_samples, *seen, steps=steps),
            {
                "name": "digits with steps" if steps else "digits",
                "sha256": digits.data_sha256(),
                "samples": config.samples,
                "augment": config.augment,
            },
        )
    if config.data is None:
        raise UserError("no data to train on; pass --data F --images D or --preset digits")
    form = None if config.format == "auto" else config.format
    options = DataOptions(config.images, form, config.on_bad_image, config.check_images == "decode")
    context = int(student.config["text_config"].get("max_position_embeddings", 32768))
    read = student.tokenizer, student.image
    if config.streaming:
        asked = config.steps * config.batch_size * config.accumulate * processes.world()
        stream = StreamOptions(asked, config.seed, context)
        split = open_streaming_split(config.data, config.eval_data, options, stream, *read)
    else:
        split = open_split(config.data, config.eval_data, config.holdout, options, *read, context)
    return Data(split.train, split.validation, split.test, split.description)
