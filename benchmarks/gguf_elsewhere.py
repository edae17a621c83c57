"""Does a GGUF pair answer the same in other people's programs? Greedy text, held against this project's runtime.

    python -m benchmarks.gguf_elsewhere artifacts/NAME-gguf --pairs 50

Two programs of llama-cpp-python that know nothing of the manifest: `MTMDChatHandler`, and its OpenAI server (which needs
`pip install 'llama-cpp-python[server]'`). They are given the two files, a question and a PNG, and take everything else from
the files. Images come at the side of the tower and at the size they were drawn in: llama.cpp then resizes with its own
bicubic filter, whatever the student was trained with.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.common import machine
from runtime.api import Sampling, Token
from runtime.images import from_pillow, question
from runtime.loading import load
from vlm import digits
from vlm.manifest import read_manifest
from vlm.preprocess import ImageSpec, resize

TOKENS = 16
CONTEXT = 1024
START_S = 120.0
Ask = Callable[[Image.Image, str], str]


def data_url(image: Image.Image) -> str:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return "data:image/png;base64," + base64.b64encode(sink.getvalue()).decode()


def messages(image: Image.Image, text: str) -> list[dict[str, Any]]:
    """As a user of those programs writes them; the line break before the question belongs to the student's prompt."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": f"\n{text}"}]
    return [{"role": "user", "content": parts}]


def ours(root: Path, samples: list[digits.Sample]) -> list[str]:
    with load(root) as engine:
        answers = []
        for s in samples:
            events = engine.complete([question(s.question, from_pillow(s.image))], Sampling(max_new_tokens=TOKENS))
            answers.append("".join(event.text for event in events if isinstance(event, Token)))
    return answers


@contextmanager
def handler(text: Path, mmproj: Path) -> Iterator[Ask]:
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import MTMDChatHandler

    chat = MTMDChatHandler(clip_model_path=str(mmproj), verbose=False)
    llama = Llama(model_path=str(text), chat_handler=chat, n_ctx=CONTEXT, n_threads=1, verbose=False)

    def ask(image: Image.Image, words: str) -> str:
        made = llama.create_chat_completion(
            messages(image, words), temperature=0.0, repeat_penalty=1.0, max_tokens=TOKENS
        )
        return str(made["choices"][0]["message"]["content"])

    try:
        yield ask
    finally:
        llama.close()


@contextmanager
def server(text: Path, mmproj: Path) -> Iterator[Ask]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(text), "--clip_model_path", str(mmproj)]
    command += ["--chat_format", "mtmd", "--n_ctx", str(CONTEXT), "--n_threads", "1", "--port", str(port)]
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115  a pipe that nobody reads would stop the server when it is full
    child = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=dict(os.environ))

    def call(path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            value: dict[str, Any] = json.load(answer)
        return value

    def ask(image: Image.Image, words: str) -> str:
        body = {"messages": messages(image, words), "temperature": 0, "repeat_penalty": 1.0, "max_tokens": TOKENS}
        return str(call("/v1/chat/completions", body)["choices"][0]["message"]["content"])

    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                call("/v1/models")
                break
            except (urllib.error.URLError, ConnectionError):
                if child.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"the server did not start: {log.read()[-300:]}") from None
                time.sleep(0.2)
        yield ask
    finally:
        child.terminate()
        child.wait()
        log.close()


PROGRAMS = {"handler": ("MTMDChatHandler", handler), "server": ("OpenAI server", server)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artefact", type=Path)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--out", type=Path, help="keep the JSON here too")
    parser.add_argument("--programs", default="handler,server")
    given = parser.parse_args()
    manifest = read_manifest(given.artefact)
    text, mmproj = (manifest.path_of(given.artefact, role) for role in ("text_gguf", "mmproj"))
    spec = ImageSpec.from_json(manifest.image)
    samples = [digits.sample("test", index, seed=1) for index in range(given.pairs)]
    wanted = ours(given.artefact, samples)
    rows = []
    for short in given.programs.split(","):
        name, program = PROGRAMS[short]
        with program(text, mmproj) as ask:
            for shown, change in (("tower's side", lambda i: resize(i, spec)), ("as drawn", lambda i: i)):
                got = [ask(change(s.image), s.question) for s in samples]
                same = sum(a == b for a, b in zip(wanted, got, strict=True))
                rows.append({"program": name, "image": shown, "equal": same, "n": len(samples)})
                print(f"{name}, image {shown}: {same} of {len(samples)} answers equal", flush=True)
    value = {"rows": rows, "artefact": given.artefact.name, "distinct": len(set(wanted)), "machine": machine()}
    if given.out:
        given.out.write_text(json.dumps(value, indent=1) + "\n")
    print(json.dumps(value))


if __name__ == "__main__":
    main()
