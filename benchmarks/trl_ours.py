"""Our side of `benchmarks.trl_step`: the knowledge-distillation term as `distill train --objective kd` computes it."""

from __future__ import annotations

from importlib.metadata import version

import torch
from torch import Tensor

from benchmarks.trl_measure import Job, run
from distill import access
from distill.batch import Batch, Normaliser
from distill.config import Align, LossWeights
from distill.objective import Objective
from distill.teacher import LiveTeacher


def main() -> None:
    job = Job.parse()
    student, teacher = job.models()
    vocabulary = int(student.config.text_config.vocab_size)
    objective = Objective(("kd",), LossWeights(), Align(), LiveTeacher(teacher, Align()), vocabulary)
    image = access.image_token(student)

    def loss_and_backward(inputs: dict[str, Tensor]) -> Tensor:
        ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
        image_BT, response_BT = ids_BT == image, inputs["labels"] != -100
        instruction_BT = ~image_BT & ~response_BT & mask_BT.bool()
        batch = Batch(ids_BT, mask_BT, image_BT, instruction_BT, response_BT, inputs["pixel_values"])
        loss: Tensor = objective(student, batch, Normaliser.of(batch))[0]
        torch.autograd.backward(loss)
        return loss

    run(job, student, loss_and_backward, {"transformers": version("transformers")})


if __name__ == "__main__":
    main()
