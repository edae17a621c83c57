"""The ONNX artefact in a browser library, unmodified. Needs Node and the library; see the skip reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
        ("int4", "siglip", "llama"),
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

    Every student here has a margin: rounding, and pixels resized in JavaScript, turn the near ties of a random one.
    """
    made = exported("onnx", precision, tower, decoder, memorised=tower != "trained")
    script = Path(__file__).with_name("replay_golden.mjs").read_text()
    command = ["node", "--input-type=module", "-e", script, "--", str(made.root)]  # -e resolves imports from cwd
    done = subprocess.run(command, cwd=LIBRARY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == len(made.manifest.golden) == 4
    assert said == made.manifest.parity["golden_ids"]
    if precision == "fp32":
        assert said == [list(golden.token_ids) for golden in made.manifest.golden]
        assert sum(map(len, said)) >= 16
