"""A batch without images where only the projector trains: a loss, zero gradients, no error."""

from __future__ import annotations

import dataclasses

import torch

from distill.batch import Normaliser
from tests.distill.conftest import Pair
from tests.distill.test_align_ti import all_terms


def test_a_projector_alone_trains_through_a_batch_of_texts(qwen2_pair: Pair) -> None:
    whole = qwen2_pair.batch()
    texts = ~whole.image_BT.any(dim=1)
    assert texts.any(), "the batch holds a text-only sample"
    fields = {f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)}
    rows = {
        name: value[texts]
        for name, value in fields.items()
        if isinstance(value, torch.Tensor) and len(value) == len(texts)
    }
    batch = dataclasses.replace(whole, **rows, pixels_NCHW=None)
    student = qwen2_pair.student
    trained = {p: p.requires_grad for p in student.parameters()}
    student.zero_grad(set_to_none=True)
    try:
        student.requires_grad_(False)
        projector = student.model.multi_modal_projector.requires_grad_(True)
        loss, values = all_terms(qwen2_pair)(student, batch, Normaliser.of(batch))
        loss.backward()
        assert values["sft"] > 0
        for parameter in projector.parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()
    finally:
        student.zero_grad(set_to_none=True)
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
