"""Adapters: what trains, what the loss sees, what is saved."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from distill import access, groups, lora, models, ribbon
from distill.config import TERMS, Align, Lora, LossWeights, TrainConfig
from distill.objective import Normaliser, Objective
from distill.teacher import LiveTeacher
from distill.train import train
from tests.distill.conftest import Pair
from tests.tiny import make_student
from vlm.errors import UserError
from vlm.load import load_model, open_checkpoint


@pytest.fixture
def student(qwen2_pair: Pair) -> nn.Module:
    return load_model(qwen2_pair.checkpoint)


def shake(model: nn.Module) -> None:
    """Fresh adapters change nothing (B is zero): give them weights, as training does."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_adapters_and_projector_train_and_nothing_else(student: nn.Module) -> None:
    lora.attach(student, Lora(r=4))
    names = trained(student)
    layers, linear = 2, 7
    assert sum("lora_A" in name for name in names) == layers * linear
    assert {name for name in names if "lora_" not in name} == {
        f"model.multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")
    }
    assert not any("vision_tower" in name or "lm_head" in name for name in names)
    lora_groups = groups.parameter_groups(TrainConfig(lr=1e-4, projector_lr=1e-3), student)
    assert {group.part: group.lr for group in lora_groups} == {"llm": 1e-4, "projector": 1e-3}


def test_targets(student: nn.Module) -> None:
    assert len(lora.targets(student, Lora(r=1, targets="q_proj|v_proj"))) == 4
    assert len(lora.targets(student, Lora(r=1, targets=r"layers\.0\..*mlp"))) == 3
    tower = lora.targets(student, Lora(r=1, targets="q_proj", vision=True))
    assert sum("vision_tower" in name for name in tower) == 2
    for wrong, seen in (
        ("lm_head", "takes in lm_head"),
        (".*", "takes in lm_head"),
        ("embed_tokens", "takes in embed_tokens"),
        ("qproj", "names no linear layer; there are down_proj"),
        ("(", "not a regular expression"),
    ):
        with pytest.raises(UserError, match=seen):
            lora.targets(student, Lora(r=1, targets=wrong))


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        ({"lora": {"r": -1}}, "lora.r must be"),
        ({"lora": {"r": 1, "alpha": 0}}, "lora.alpha"),
        ({"lora": {"r": 1, "dropout": 1}}, "lora.dropout"),
        ({"lora": {"vision": True}}, "without a rank"),
        ({"lora": {"r": 1, "dropout": 0.1}, "align": Align(layout="appended")}, "twice"),
        ({"lora": {"r": 1, "dropout": 0.1}, "gradient_checkpointing": True}, "twice"),
        ({"lora": {"r": 1}, "fsdp": True}, "fsdp"),
    ],
)
def test_settings_that_cannot_work(words: dict[str, Any], seen: str) -> None:
    with pytest.raises(UserError, match=seen):
        TrainConfig(**{**words, "lora": Lora(**words["lora"])})


def test_the_loss_goes_through_the_adapters(qwen2_pair: Pair, student: nn.Module) -> None:
    """All four terms of the adapted student equal those of the same student merged, gradients reach every adapter."""
    lora.attach(student, Lora(r=4, vision=True))
    shake(student)
    align = Align(sampling="top-k")
    objective = Objective(TERMS, LossWeights(), align, LiveTeacher(qwen2_pair.teacher, align, 1), 10**6)
    batch = qwen2_pair.batch()
    loss, values = objective(student, batch, Normaliser.of(batch))
    loss.backward()
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and "vision_tower.post" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    lora.merge(student)
    assert not lora.attached(student)
    assert type(student) is LlavaForConditionalGeneration
    assert not any("lora" in name or "base_layer" in name for name in student.state_dict())
    _, merged = objective(student, batch, Normaliser.of(batch))
    plain, _ = Objective(("sft",), LossWeights(), align, None, 10**6)(
        load_model(qwen2_pair.checkpoint), batch, Normaliser.of(batch)
    )
    assert values.keys() == set(TERMS)
    for name, value in values.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-4, atol=1e-5)
    assert abs(float(plain - values["sft"])) > 1e-3, "the adapters changed something"


def test_with_dropout_candidates_run_on_the_dropped_prefix(qwen2_pair: Pair, student: nn.Module) -> None:
    """Keys and values of the gold pass are reused, so two draws differ only in the candidate's own token."""
    lora.attach(student, Lora(r=4, dropout=0.5))
    shake(student)
    student.train()
    batch = qwen2_pair.batch()
    torch.manual_seed(0)
    alone = access.gold_pass(student, batch, keep_cache=True)
    keys = [layer.keys.clone() for layer in alone.cache.layers]
    place = torch.full((len(batch.input_ids_BT), 1), batch.input_ids_BT.shape[1] - 2)
    ones = torch.ones(place.shape)
    candidates = ribbon.Candidates(torch.full_like(place, 7), place, weight_BC=ones, keep_BC=ones.bool())
    ribbon.run_cached(access.decoder(student), candidates, alone.cache, batch.attention_mask_BT, batch.position_BT)
    for before, layer in zip(keys, alone.cache.layers, strict=True):
        assert torch.equal(before, layer.keys[:, :, : before.shape[2]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(tmp_path_factory.mktemp("base"), layers=2)


def run(base: Path, out: Path, **options: Any) -> TrainConfig:
    settings = {
        "preset": "digits",
        "student": str(base),
        "objective": "sft",
        "out": out,
        "steps": 6,
        "batch_size": 2,
        "samples": 20,
        "save_every": 3,
        "eval_samples": 20,
        "log_every": 1,
        "lr": 1e-2,
        "threads": 1,
        "lora": Lora(r=2, dropout=0.1),
        **options,
    }
    return TrainConfig(**settings)


def test_the_saved_student_is_merged_and_the_adapter_lies_beside_it(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    result = train(run(base, tmp_path / "run"))
    source, student = load_model(open_checkpoint(base)), load_model(open_checkpoint(result.student))
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 2
    adapted = PeftModel.from_pretrained(load_model(open_checkpoint(base)), tmp_path / "run" / "adapter").eval()
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        merged, plain = student(input_ids=ids).logits, source(input_ids=ids).logits
        torch.testing.assert_close(adapted(input_ids=ids).logits, merged, rtol=1e-4, atol=1e-4)
        assert (merged - plain).abs().max() > 1e-2
        pixels = torch.randn(1, 3, 32, 32)
        theirs = adapted.get_base_model().model.get_image_features(pixel_values=pixels).pooler_output[0]
        ours = student.model.get_image_features(pixel_values=pixels).pooler_output[0]
        torch.testing.assert_close(theirs, ours)
    for name, parameter in source.named_parameters():
        changed = not torch.equal(parameter, student.get_parameter(name))
        linear = ".layers." in name and "language_model" in name and "_proj.weight" in name
        assert changed == (linear or "multi_modal_projector" in name), name


def test_resuming_is_exact(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.trainer import DistillTrainer

    whole = train(run(base, tmp_path / "whole"))
    calls = 0
    real = DistillTrainer.compute_loss

    def stop_at_five(self: DistillTrainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("killed")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "compute_loss", stop_at_five)
    config = run(base, tmp_path / "cut")
    with pytest.raises(RuntimeError, match="killed"):
        train(config)
    monkeypatch.setattr(DistillTrainer, "compute_loss", real)
    resumed = train(dataclasses.replace(config, resume=True))
    ours, theirs = (load_file(r.student / "model.safetensors") for r in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_freezing_on_top_of_adapters(student: nn.Module) -> None:
    models.prepare(TrainConfig(lora=Lora(r=2), freeze="projector,llm.layers.0"), student)
    assert all(".layers.1." in name and "lora_" in name for name in trained(student))
    assert trained(student)
