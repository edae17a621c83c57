"""A student with latent tokens through every export and backend: the same answers in both latent modes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest
import torch

from distill.methods import LavitOptions
from distill.train import train
from runtime.api import Done, Sampling
from runtime.images import question, read_image
from runtime.loading import load
from tests.distill import killing
from tests.test_bad_input import run
from vlm import digits
from vlm.errors import UserError
from vlm.load import open_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("latents")
    recipe = killing.recipe(root / "models")
    lavit = LavitOptions(latents=2, layers=1)
    train(
        dataclasses.replace(
            recipe,
            objective="lavit",
            lavit=lavit,
            steps=3,
            eval_every=0,
            visual_every=0,
            final="last",
            out=root / "run",
        )
    )
    for index in range(3):
        digits.sample("test", index).image.save(root / f"{index}.png")
    for target, precision in (("onnx", "fp32"), ("gguf", "f16")):
        words = [
            "--target",
            target,
            "--precision",
            precision,
            "--samples",
            "5",
            "--student",
            "run/student",
            "--out",
            target,
        ]
        done = run(root, "export", *words, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["verified"] is True
    return root


def answers(artefact: Path, folder: Path, latents: Literal["emit", "prefill"]) -> list[tuple[str, int]]:
    """(text, prompt tokens) of three questions."""
    found = []
    with load(artefact, latents=latents) as engine:
        for index in range(3):
            asked = question(digits.sample("test", index).question, read_image(folder / f"{index}.png"))
            done = engine.complete([asked], Sampling(max_new_tokens=6))[-1]
            assert isinstance(done, Done)
            found.append((done.text, done.usage.prompt_tokens))
    return found


@pytest.mark.parametrize("latents", ["emit", "prefill"])
def test_every_backend_answers_as_pytorch_does(folder: Path, latents: Literal["emit", "prefill"]) -> None:
    expected = answers(folder / "run" / "student", folder, latents)
    for target in ("onnx", "gguf"):
        assert answers(folder / target, folder, latents) == expected, target
    assert not any("latent" in text for text, _ in expected)


def test_prefilled_latents_lengthen_the_prompt(folder: Path) -> None:
    emitted, prefilled = (answers(folder / "onnx", folder, mode) for mode in ("emit", "prefill"))
    assert [b - a for (_, a), (_, b) in zip(emitted, prefilled, strict=True)] == [2, 2, 2]
    manifest = json.loads((folder / "onnx" / "manifest.json").read_text())
    ids = open_checkpoint(folder / "run" / "student").tokenizer.spec.latent_token_ids
    assert manifest["chat"]["latent_token_ids"] == list(ids)


def test_a_model_without_latents_has_none_to_prefill(folder: Path) -> None:
    with pytest.raises(UserError, match="drop `--latents prefill`"):
        load(folder / "models" / "student", latents="prefill")
