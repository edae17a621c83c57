"""The ONNX artefact in a browser library, unmodified. Needs Node and the library; see the skip reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.evidence import load_reference
from export.parity import Expected

LIBRARY = os.environ.get("TRANSFORMERS_JS_DIR", "")


@pytest.mark.skipif(
    not LIBRARY or shutil.which("node") is None,
    reason="set TRANSFORMERS_JS_DIR to a folder where `npm install --ignore-scripts @huggingface/transformers` ran",
)
@pytest.mark.parametrize(
    ("precision", "tower", "decoder"),
    [
        ("fp32", "siglip", "qwen3"),
        ("fp32", "clip", "qwen3"),
        ("fp32", "siglip2", "qwen2.5"),
        ("fp32", "trained", "qwen2"),
        ("fp16", "trained", "qwen2"),
        ("int8", "trained", "qwen2"),
        ("int4", "trained", "qwen2"),
        ("q4f16", "trained", "qwen2"),
    ],
)
def test_same_tokens_as_onnx_runtime_here(
    exported: Callable[..., Any], precision: str, tower: str, decoder: str
) -> None:
    """What the Python runtime says from the same files, which in fp32 is what PyTorch says.

    Below fp32 the student is a trained one: rounding turns the near ties of a random one in each build of the runtime.
    """
    made = exported("onnx", precision, tower, decoder)
    script = Path(__file__).with_name("replay_golden.mjs").read_text()
    command = ["node", "--input-type=module", "-e", script, "--", str(made.root)]  # -e resolves imports from cwd
    done = subprocess.run(command, cwd=LIBRARY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == len(made.manifest.golden) == 4
    if tower == "trained":
        assert said == made.manifest.parity["golden_ids"]
    if precision == "fp32":
        stored = load_reference(made.manifest.path_of(made.root, "reference"))
        sure = [len(expected.forced) if tower == "trained" else _sure_steps(expected) for expected in stored]
        assert sum(sure) >= 16
        truth = [golden.token_ids for golden in made.manifest.golden]
        assert [ids[:n] for ids, n in zip(said, sure, strict=True)] == [
            list(ids[:n]) for ids, n in zip(truth, sure, strict=True)
        ]


def _sure_steps(expected: Expected) -> int:
    """Steps before the first near tie: JavaScript's resized pixels differ from Pillow's by some thousandths."""
    margin = (expected.top_logits[:, 0] - expected.top_logits[:, 1]) / expected.spread
    return int(np.argmax([*(margin < 0.01), True]))
