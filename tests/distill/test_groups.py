"""Freeze lists and learning rates by part of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from distill import groups
from distill.config import LearningRates, TrainConfig
from distill.optimizers import build_optimizer
from tests.tiny import make_student
from vlm.errors import UserError
from vlm.load import load_model, open_checkpoint


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(tmp_path_factory.mktemp("tied"), layers=3)


@pytest.fixture
def model(tied: Path) -> nn.Module:
    return load_model(open_checkpoint(tied)).train()


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_every_parameter_has_one_part(model: nn.Module) -> None:
    parts = {name: groups.part_of(name) for name, _ in model.named_parameters()}
    assert set(parts.values()) == {"vision", "projector", "embeddings", "llm"}
    assert all("multi_modal_projector" in name for name, part in parts.items() if part == "projector")
    assert all("vision_tower" in name for name, part in parts.items() if part == "vision")
    assert [name for name, part in parts.items() if part == "embeddings"] == [
        "model.language_model.embed_tokens.weight"
    ]


def test_freezing_by_part_layer_and_pattern(model: nn.Module) -> None:
    everything = trained(model)
    groups.freeze(model, "vision, llm.layers.0-1, linear_2\\.bias$")
    fixed = everything - trained(model)
    assert fixed == {
        name
        for name in everything
        if "vision_tower" in name or ".layers.0." in name or ".layers.1." in name or name.endswith("linear_2.bias")
    }
    assert any("language_model.layers.2" in name for name in trained(model))
    groups.freeze(model, "llm")
    assert {groups.part_of(name) for name in trained(model)} == {"projector"}


@pytest.mark.parametrize(
    ("entry", "seen"),
    [
        ("lmm", "choose from embeddings, llm, projector, vision, llm.layers.A-B"),
        ("llm.layers.1-9", "layers 0 to 2"),
        ("vision.layers.7", "layers 0 to 1"),
        ("llm.layers.2-1", "layers 0 to 2"),
        ("(", "not a regular expression"),
        ("lm_head", "tied to the embeddings"),
    ],
)
def test_names_of_nothing_are_refused(model: nn.Module, entry: str, seen: str) -> None:
    before = trained(model)
    with pytest.raises(UserError, match=seen):
        groups.freeze(model, entry)
    assert trained(model) == before


def test_groups_cover_each_parameter_once(model: nn.Module) -> None:
    rates = LearningRates(projector=1e-3, vision=2e-6, llm=3e-5)
    config = TrainConfig(lr=1e-5, weight_decay=0.1, lrs=rates)
    optimizer = build_optimizer(config, model)
    seen = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(seen) == sum(len(group["params"]) for group in optimizer.param_groups)
    expected = {"projector": 1e-3, "vision": 2e-6, "llm": 3e-5, "embeddings": 3e-5}
    for name, parameter in model.named_parameters():
        decay = 0.1 if parameter.ndim >= 2 else 0.0
        assert seen[id(parameter)] == (expected[groups.part_of(name)], decay), name
    text = groups.table(groups.parameter_groups(config, model), model)
    assert "projector" in text
    assert "1.0e-03" in text


def test_projector_lr_still_works(model: nn.Module) -> None:
    found = groups.parameter_groups(TrainConfig(lr=1e-5, projector_lr=1e-3), model)
    assert {group.part: group.lr for group in found}["projector"] == 1e-3
    assert {group.lr for group in found if group.part != "projector"} == {1e-5}


def test_a_rate_for_a_fixed_or_absent_part_is_refused(model: nn.Module) -> None:
    groups.freeze(model, "vision")
    with pytest.raises(UserError, match=r"lrs.vision 0.001: that part is frozen"):
        groups.parameter_groups(TrainConfig(lrs=LearningRates(vision=1e-3)), model)
    with pytest.raises(UserError, match=r"lrs.lm_head 0.001: that part has no parameters of its own"):
        groups.parameter_groups(TrainConfig(lrs=LearningRates(lm_head=1e-3)), model)
    with pytest.raises(UserError, match="give only one"):
        TrainConfig(projector_lr=1e-3, lrs=LearningRates(projector=2e-3))
    with pytest.raises(UserError, match=r"lrs.llm must be 0 or more"):
        LearningRates(llm=-1.0)


def test_nothing_to_train_is_refused(model: nn.Module) -> None:
    groups.freeze(model, "vision,projector,llm")
    with pytest.raises(UserError, match="every parameter is frozen"):
        build_optimizer(TrainConfig(), model)


def test_an_untied_head_is_a_part_of_its_own(tmp_path: Path) -> None:
    model = load_model(open_checkpoint(make_student(tmp_path, tied=False)))
    groups.freeze(model, "lm_head")
    assert not model.lm_head.weight.requires_grad
    assert model.model.language_model.embed_tokens.weight.requires_grad


def test_only_unfrozen_parameters_move(model: nn.Module) -> None:
    groups.freeze(model, "vision,embeddings,llm.layers.0")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(TrainConfig(lr=1e-2, weight_decay=0.5), model)
    sum(p.square().sum() for p in model.parameters() if p.requires_grad).backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved <= trained(model)
    assert moved
