"""Where a live teacher lives: types, another device, main memory, and one clear line for what cannot be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from distill import access, irs
from distill.config import Align, TrainConfig
from distill.data import Collator
from distill.placement import MovedTeacher, Placed, _moved, computes_on, offloaded, place
from distill.teacher import DenseTarget, LiveTeacher
from tests.distill.conftest import Pair, make_pair
from vlm.errors import MissingPiece, UserError

CPU = torch.device("cpu")
LAYER = 1


@pytest.fixture(scope="module")
def own_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair of this module's own: offloading changes the teacher for good."""
    return make_pair(tmp_path_factory.mktemp("pair"), "qwen2", "clip")


def config(**changes: object) -> TrainConfig:
    return dataclasses.replace(TrainConfig(), **changes)


def test_an_offloaded_teacher_answers_like_one_in_place(own_pair: Pair) -> None:
    align, batch, model = Align(), own_pair.batch(), own_pair.teacher
    at = batch.response_places()
    seen = LiveTeacher(model, align, LAYER)(batch, iva=True, tpa=True)
    rows, weights = seen.rows(at[0], at[1] - 1), seen.weights()
    assert isinstance(rows, DenseTarget)
    collate = Collator(own_pair.checkpoint.tokenizer.spec.pad_token_id)
    scores = irs.layer_scores(model, own_pair.examples()[:3], 2, collate)

    head = _moved(access.head(model), CPU)
    away = Placed(offloaded(model, CPU), CPU, head)
    assert next(away.model.parameters()).device.type == "meta"
    assert computes_on(away.model) == CPU
    teacher = away.teacher(align, LAYER)
    assert isinstance(teacher, MovedTeacher)
    moved = teacher(batch, iva=True, tpa=True)
    got = moved.rows(at[0], at[1] - 1)
    assert isinstance(got, DenseTarget)
    assert torch.equal(got.hidden_RE, rows.hidden_RE)
    assert torch.equal(got.head.logits(got.hidden_RE), rows.head.logits(rows.hidden_RE))
    assert torch.equal(moved.weights(), weights)
    assert irs.layer_scores(away.model, own_pair.examples()[:3], 2, collate).scores == scores.scores


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_teacher_is_loaded_in_the_type_asked_for(qwen2_pair: Pair, dtype: str) -> None:
    placed = place(qwen2_pair.checkpoint, config(teacher_dtype=dtype), CPU)
    wanted = getattr(torch, dtype)
    assert {parameter.dtype for parameter in placed.model.parameters()} == {wanted}
    assert not any(parameter.requires_grad for parameter in placed.model.parameters())
    seen = placed.teacher(Align(), LAYER)(qwen2_pair.batch(), iva=True, tpa=False)
    batch = qwen2_pair.batch()
    target = seen.rows(*batch.image_BT.nonzero(as_tuple=True))
    assert isinstance(target, DenseTarget)
    assert target.hidden_RE.dtype == wanted
    assert torch.isfinite(target.head.logits(target.hidden_RE)).all()
    assert seen.weights().sum(dim=1)[batch.image_BT.any(dim=1)].tolist() == pytest.approx([1.0] * 4, abs=1e-3)


@pytest.mark.parametrize("name", ["auto", "same", "cpu"])
def test_beside_a_student_on_the_cpu_every_place_is_the_cpu(qwen2_pair: Pair, name: str) -> None:
    placed = place(qwen2_pair.checkpoint, config(teacher_device=name), CPU)
    assert computes_on(placed.model) == CPU
    assert isinstance(placed.teacher(Align(), LAYER), LiveTeacher)


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="this machine has the GPU the test wants to miss")
def test_a_missing_gpu_is_named(qwen2_pair: Pair) -> None:
    with pytest.raises(UserError, match=r"teacher_device 'cuda:7': this machine has .*same or cpu"):
        place(qwen2_pair.checkpoint, config(teacher_device="cuda:7"), CPU)


@pytest.mark.parametrize("load", ["8bit", "4bit"])
def test_quantisation_without_a_gpu_or_its_package_is_one_line(
    qwen2_pair: Pair, load: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=f"teacher_load '{load}' needs a CUDA GPU"):
        place(qwen2_pair.checkpoint, config(teacher_load=load), CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    gpu = torch.device("cuda", 0)
    with pytest.raises(MissingPiece, match="pip install bitsandbytes"):
        place(qwen2_pair.checkpoint, config(teacher_load=load), gpu)
    with pytest.raises(UserError, match="drop --teacher_device cpu"):
        place(qwen2_pair.checkpoint, config(teacher_load=load, teacher_device="cpu"), gpu)


def test_the_options_are_checked_when_they_are_read() -> None:
    with pytest.raises(UserError, match="teacher_device 'gpu'"):
        config(teacher_device="gpu")
    with pytest.raises(UserError, match="teacher_cache loads no teacher"):
        config(teacher_cache=Path("c"), teacher_load="8bit")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloading_beside_a_gpu(qwen2_pair: Pair) -> None:
    gpu = torch.device("cuda", 0)
    batch = qwen2_pair.batch()
    at = batch.response_places()
    here = place(qwen2_pair.checkpoint, config(), CPU).teacher(Align(), LAYER)(batch, iva=True, tpa=False)
    away = place(qwen2_pair.checkpoint, config(teacher_device="cpu"), gpu)
    from distill.placement import _on

    there = away.teacher(Align(), LAYER)(_on(batch, gpu), iva=True, tpa=False)
    mine, theirs = here.rows(at[0], at[1] - 1), there.rows(at[0].to(gpu), at[1].to(gpu) - 1)
    assert isinstance(mine, DenseTarget)
    assert isinstance(theirs, DenseTarget)
    assert torch.allclose(mine.hidden_RE, theirs.hidden_RE.cpu(), atol=1e-3)
