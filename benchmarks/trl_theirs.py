"""TRL's side of `benchmarks.trl_step`; runs with the interpreter of TRL's own environment.

gold: GOLDTrainer.training_step with lmbda = 0, beta = 0: the installed release's off-policy path for models with images
    (GKDTrainer passes no pixels to either model). Full logits of both models at every position.
distillation: DistillationTrainer's chunked divergence. That trainer only trains on completions it generates; here the
    batch's own completions stand in for generated ones, so the comparison has no generation in it.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import AutoProcessor

from benchmarks.trl_measure import Job, Loss, run


def settings(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "beta": 0.0,
        "temperature": 1.0,
        "disable_dropout": True,
        "remove_unused_columns": False,
    }


def gold(job: Job, student: nn.Module, teacher: nn.Module, folder: str) -> Loss:
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    args = GOLDConfig(lmbda=0.0, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **settings(folder))
    trainer = GOLDTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        data_collator=list,
        # no image column: its collator would tokenise and resize again what both sides get ready-made
        train_dataset=datasets.Dataset.from_dict({"input_ids": [[0, 1]] * 4, "labels": [[0, 1]] * 4}),
        processing_class=AutoProcessor.from_pretrained(job.pair / "student"),
    )
    trainer.create_accelerator_and_postprocess()
    student.train()

    def loss_and_backward(inputs: dict[str, Tensor]) -> Tensor:
        return trainer.training_step(student, inputs, (inputs["labels"] != -100).sum())

    return loss_and_backward


def distillation(job: Job, student: nn.Module, teacher: nn.Module, folder: str) -> Loss:
    from trl import DistillationConfig, DistillationTrainer

    class Given(DistillationTrainer):
        def _prepare_inputs(self, generation_batch: Any) -> Any:
            return generation_batch

    trainer = Given(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(**settings(folder)),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["a"] * 4}),
        processing_class=AutoProcessor.from_pretrained(job.pair / "student"),
    )
    trainer.current_gradient_accumulation_steps = 1
    student.train()

    def loss_and_backward(inputs: dict[str, Tensor]) -> Tensor:
        trained = inputs["labels"] != -100
        prompt = int(trained.int().argmax(dim=1).min())
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        batch = {
            "prompt_ids": ids[:, :prompt],
            "prompt_mask": mask[:, :prompt],
            "completion_ids": ids[:, prompt:],
            "completion_mask": trained[:, prompt:].long(),
            "pixel_values": inputs["pixel_values"],
            "num_items_in_batch": trained.sum(),
        }
        return trainer.training_step(student, batch, trained.sum())

    return loss_and_backward


def main() -> None:
    job = Job.parse()
    student, teacher = job.models()
    versions = {name: version(name) for name in ("trl", "transformers", "accelerate")}
    with tempfile.TemporaryDirectory() as folder:
        path = {"gold": gold, "distillation": distillation}[job.path]
        run(job, student, path(job, student, teacher, folder), versions)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
