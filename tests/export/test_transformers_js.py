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
@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_same_tokens_as_pytorch(exported: Callable[..., Any], tower: str) -> None:
    made = exported("onnx", "fp32", tower, "qwen3")
    script = Path(__file__).with_name("replay_golden.mjs").read_text()
    command = ["node", "--input-type=module", "-e", script, "--", str(made.root)]  # -e resolves imports from cwd
    done = subprocess.run(command, cwd=LIBRARY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == list(made.manifest.golden[0].token_ids)
