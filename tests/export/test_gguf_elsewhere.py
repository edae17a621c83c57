"""The two files alone, in programs that never see the manifest: llama-cpp-python's chat handler and its OpenAI server."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.gguf_elsewhere import handler, server
from export.backends import open_backend
from export.replay import greedy, make_prompt
from vlm import digits
from vlm.preprocess import resize

PAIRS = 4
SERVER = ("sse_starlette", "starlette_context", "pydantic_settings", "uvicorn", "fastapi")
MISSING = [name for name in SERVER if importlib.util.find_spec(name) is None]
PROGRAMS = {
    "handler": handler,
    "server": pytest.param(
        server,
        marks=pytest.mark.skipif(bool(MISSING), reason=f"the server of llama-cpp-python needs {', '.join(MISSING)}"),
    ),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_other_programs_say_the_same(exported: Callable[..., Any], program: Any) -> None:
    """Greedy text of 16 tokens; random students ramble, so that a difference would show soon.

    Those programs drop bytes that are no character yet, and say one token more.
    """
    made = exported("gguf", "f16", "siglip", "qwen2")
    checkpoint, manifest = made.subject.student.checkpoint, made.manifest
    samples = [digits.sample("test", index, seed=3) for index in range(PAIRS)]
    backend = open_backend(made.root, manifest)
    stop = checkpoint.tokenizer.spec.eos_token_ids
    wanted = []
    for s in samples:
        ids = greedy(backend, make_prompt(checkpoint.tokenizer, s.image, s.question), stop, 16)
        wanted.append(checkpoint.tokenizer.decode(ids).replace("\ufffd", ""))
    backend.close()
    text, mmproj = (manifest.path_of(made.root, role) for role in ("text_gguf", "mmproj"))
    with program(text, mmproj) as ask:
        got = [ask(resize(s.image, checkpoint.image), s.question) for s in samples]
    assert [text[: len(own)] for text, own in zip(got, wanted, strict=True)] == wanted
    assert len(set(got)) > 1
    assert min(map(len, wanted)) > 8
