"""LaViT in runs: the token replacement test, resuming, cached teachers, settings that are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill import access, replacement
from distill.batch import Batch
from distill.config import Align, LossWeights, TrainConfig
from distill.data import Collator, Example
from distill.methods import LavitOptions
from distill.train import train
from tests.distill import killing
from vlm.errors import UserError
from vlm.load import open_checkpoint

OPTIONS = LavitOptions(latents=2, layers=2, keep=4)


class Attention(nn.Module):
    """Keys and values of one number a token; what is read is the mean of the visible values, or the token's own."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.v_proj = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)


def hand_built(monkeypatch: pytest.MonkeyPatch, reads_latents: bool) -> nn.Module:
    """A model of one layer whose answer is the class the first latent carries, or the one the image carries."""
    model = nn.Module()
    model.attention = Attention()
    layer = nn.Module()
    layer.self_attn = model.attention
    model.layers = nn.ModuleList([layer])
    with torch.no_grad():
        model.attention.v_proj.weight.copy_(torch.eye(8))
    monkeypatch.setattr(access, "decoder", lambda m: m)

    def matches(m: Any, batch: Batch) -> list[bool]:
        label_B = batch.input_ids_BT[:, 0] % 4
        content_BTX = nn.functional.one_hot(label_B, 8).float()[:, None].expand(-1, batch.input_ids_BT.shape[1], -1)
        m.attention.k_proj(content_BTX)
        values_BTX = m.attention.v_proj(content_BTX)
        source_BT = batch.latent_BT if reads_latents else batch.image_BT
        read_BX = (values_BTX * source_BT[..., None]).sum(dim=1)
        found: list[bool] = (read_BX.argmax(dim=-1) == label_B).tolist()
        return found

    monkeypatch.setattr(replacement.evaluate, "matches", matches)
    return model


def labelled(count: int) -> list[Example]:
    """Samples whose first token is their class, with two image tokens and an answer of one token."""
    spans = ("template", "image", "image", "response")
    return [Example((4 + i % 4, 9, 9, 1), spans, ()) for i in range(count)]


@pytest.mark.parametrize("reads_latents", [True, False])
def test_the_replacement_test_tells_who_reads_latents(
    monkeypatch: pytest.MonkeyPatch, reads_latents: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = hand_built(monkeypatch, reads_latents)
    found = replacement.measure(model, labelled(48), 48, Collator(0, latents=(90, 91)))
    replacement.report(found, tmp_path)
    said = capsys.readouterr().err
    assert found.exact_match == 1.0
    drops = {drop.kind: drop.drop for drop in found.drops}
    if reads_latents:
        assert min(drops["zero"], drops["random"], drops["shuffled"]) > 0.5
        assert "latents are load-bearing" in said
    else:
        assert set(drops.values()) == {0.0}
        assert "latents not load-bearing" in said
    assert json.loads((tmp_path / replacement.FILE).read_text())["load_bearing"] is reads_latents


def test_replaced_rows() -> None:
    latent = torch.tensor([[False, True, True, False], [True, True, False, False]])
    value = torch.arange(16.0).view(2, 4, 2)
    generator = torch.Generator().manual_seed(0)
    zero, first, shuffled = (
        replacement.replace_rows(value, latent, k, generator) for k in ("zero", "first", "shuffled")
    )
    assert not zero[latent].any()
    assert torch.equal(first[0, 1:3], value[0, 1].expand(2, -1))
    assert torch.equal(shuffled[0, 1:3], value[1, 0:2])
    assert torch.equal(shuffled[1, 0:2], value[0, 1:3])
    for found in (zero, first, shuffled):
        assert torch.equal(found[~latent], value[~latent])


def test_latents_are_swapped_with_another_samples_also_in_a_conversation() -> None:
    """Three answers of one sample, then two of the next: no group gets one of its own sample."""
    latent = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 0]], dtype=torch.bool)
    value = torch.arange(12.0).view(2, 6, 1)
    found = replacement.replace_rows(value, latent, "shuffled", torch.Generator())
    assert found[latent].flatten().tolist() == [7, 7, 7, 0, 0]
    alone = replacement.replace_rows(value[:1], latent[:1], "shuffled", torch.Generator())
    assert torch.equal(alone, value[:1])


@pytest.mark.parametrize("count", [13, 48, 1])
def test_no_sample_is_alone_in_its_batch(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """13 samples in batches of 12 would leave one that can only be swapped with itself."""
    found = replacement.measure(
        hand_built(monkeypatch, True), labelled(count), count, Collator(0, latents=(90, 91)), 12
    )
    assert found.n == count
    shuffled = next(drop for drop in found.drops if drop.kind == "shuffled")
    assert shuffled.drop == (1.0 if count > 1 else 0.0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    torch.set_num_threads(1)
    base = killing.recipe(tmp_path_factory.mktemp("models"))
    return dataclasses.replace(
        base,
        objective="align-ti+lavit",
        eval_every=0,
        visual_every=0,
        steps=4,
        save_every=2,
        final="last",
        lavit=OPTIONS,
    )


def test_a_run_resumes_to_the_same_bits_and_ends_with_a_plain_student(
    recipe: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    whole = dataclasses.replace(recipe, out=tmp_path / "whole")
    train(whole)
    said = capsys.readouterr().err
    assert "gaze=renormalised" in said
    assert "token replacement test" in said
    assert (whole.out / replacement.FILE).is_file()
    cut = dataclasses.replace(recipe, out=tmp_path / "cut")
    killing.stop_after(cut, 3)
    train(dataclasses.replace(cut, resume=True))
    assert not killing.differences(whole.out, cut.out)
    model, info = LlavaForConditionalGeneration.from_pretrained(whole.out / "student", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    processor = AutoProcessor.from_pretrained(whole.out / "student")
    ids = open_checkpoint(whole.out / "student").tokenizer.spec.latent_token_ids
    assert model.config.latent_token_ids == list(ids)
    assert processor.tokenizer.convert_ids_to_tokens(list(ids)) == ["<|latent_1|>", "<|latent_2|>"]
    assert processor.tokenizer.decode(list(ids), skip_special_tokens=True) == ""
    metrics = [json.loads(line) for line in (whole.out / "metrics.jsonl").read_text().splitlines()]
    assert any("concept" in line and "traj" in line for line in metrics)


def test_a_cached_teacher_gives_the_same_gaze(recipe: TrainConfig, tmp_path: Path) -> None:
    from distill.cache_command import main

    words = ["--preset", "digits", "--teacher", str(recipe.teacher), "--student", str(recipe.student)]
    words += ["--objective", "lavit", "--samples", "20", "--eval_samples", "8", "--batch_size", "2", "--steps", "12"]
    words += [
        "--align.iva_layer",
        "0",
        "--lavit.latents",
        "2",
        "--lavit.layers",
        "2",
        "--lavit.keep",
        "4",
        "--all_logits",
    ]
    assert main([*words, "--out", str(tmp_path / "cache")]) == 0
    live = dataclasses.replace(recipe, objective="lavit", out=tmp_path / "live", steps=2)
    cached = dataclasses.replace(live, teacher_cache=tmp_path / "cache", out=tmp_path / "cached")
    for config in (live, cached):
        train(config)
    ours, theirs = (
        [json.loads(x) for x in (c.out / "metrics.jsonl").read_text().splitlines() if '"concept"' in x]
        for c in (live, cached)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a["concept"] == pytest.approx(b["concept"], abs=2e-3)
        assert a["traj"] == pytest.approx(b["traj"], abs=5e-3)
    with pytest.raises(UserError, match="needs the teacher's gaze"):
        train(dataclasses.replace(cached, out=tmp_path / "other", lavit=dataclasses.replace(recipe.lavit, keep=3)))


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"objective": "sft", "lavit": LavitOptions(latents=2)}, "add --objective lavit"),
        ({"objective": "lavit", "fsdp": True}, "use DDP"),
        ({"objective": "lavit", "weights": LossWeights(concept=0.0, traj=0.0)}, "set lavit.gate none too"),
        ({"objective": "lavit", "gradient_checkpointing": True}, "drop --gradient_checkpointing"),
        ({"objective": "align-ti+lavit", "align": Align(layout="appended")}, r"align\.layout cached"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], seen: str) -> None:
    with pytest.raises(UserError, match=seen):
        TrainConfig(preset="digits", **changes)
    with pytest.raises(UserError, match=r"lavit\.gate_floor"):
        LavitOptions(gate_floor=0.0)


def test_frozen_embeddings_are_refused(recipe: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="their embeddings must train"):
        train(dataclasses.replace(recipe, freeze="embeddings", out=tmp_path / "run"))
