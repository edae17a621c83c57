"""Every backend against PyTorch, and PyTorch against Hugging Face's own `generate`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from runtime import load
from runtime.api import Backend, Done, Image, Message, Sampling, Token
from runtime.backend_gguf import GgufBackend, open_gguf
from runtime.backend_onnx import OnnxBackend, open_onnx
from runtime.backend_torch import TorchBackend, open_torch
from runtime.engine import Engine
from runtime.images import answer, from_pillow, question, to_pillow
from runtime.onnx_decoder import SharedCache
from runtime.options import LoadOptions
from runtime.torch_decoder import StaticCache
from vlm import digits
from vlm.errors import MissingPiece, UserError
from vlm.manifest import read_manifest

from .conftest import ROOT, export

STEPS = 12
# a random student's logits have a standard deviation near 1; llama.cpp rounds to float16 inside
TOLERANCE = {"onnx": 3e-4, "gguf": 3e-2, "shared": 3e-4, "static": 1e-4}


def picture(index: int) -> Image:
    return from_pillow(digits.sample("test", index).image)


def noise(seed: int, width: int = 90, height: int = 50) -> Image:
    from PIL import Image as Pillow

    rng = np.random.default_rng(seed)
    return from_pillow(Pillow.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)))


CONVERSATIONS: dict[str, list[Message]] = {
    "one image": [question("Read the top row.", picture(0))],
    "not square": [question("What is this? ñ 😀", noise(1))],
    "two images": [question("Compare them.", picture(1), noise(2))],
    "longer than one batch": [question("7 " * 300, picture(5))],
    "no image": [question("Say something.")],
    "second turn": [question("Add up the top row.", picture(2)), answer("3 + 4 = 7"), question("And the bottom row?")],
    "image inside text": [Message("user", ("before ", picture(3), " after"))],
    "system": [Message("system", ("Be brief.",)), question("Read it.", picture(4))],
}


@pytest.fixture(scope="module")
def torch_backend(student: Path) -> Iterator[TorchBackend]:
    backend = open_torch(student, LoadOptions())
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def onnx_backend(onnx_artifact: Path) -> Iterator[OnnxBackend]:
    backend = open_onnx(onnx_artifact, LoadOptions(), read_manifest(onnx_artifact))
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def gguf_backend(gguf_artifact: Path) -> Iterator[GgufBackend]:
    backend = open_gguf(gguf_artifact, LoadOptions(), read_manifest(gguf_artifact))
    yield backend
    backend.close()


def forced_logits(backend: Backend, messages: list[Message]) -> np.ndarray:
    """logits_SV of the prompt's end and of fixed tokens after it: a difference shows even where the argmax agrees."""
    prompt = backend.prepare(messages)
    embeds = backend.encode(prompt.images) if prompt.images else []
    rows = [backend.prefill(prompt, embeds).copy()]  # a backend's logits hold until its next call
    rows += [backend.step(int(token_id)).copy() for token_id in np.random.default_rng(0).integers(4, 300, STEPS)]
    return np.stack(rows)


@pytest.fixture(scope="module")
def shared_backend(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnnxBackend]:
    """float32 with ONNX Runtime's own attention, whose cache is one buffer for input and output."""
    artifact = export("onnx", "fp32", student, tmp_path_factory.mktemp("shared") / "tiny-ort", "--flavour", "ort")
    backend = open_onnx(artifact, LoadOptions(context=700), read_manifest(artifact))
    assert isinstance(backend._context, SharedCache)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def static_backend(student: Path) -> Iterator[TorchBackend]:
    """What PyTorch does on a GPU, without the CUDA graph around it."""
    import torch

    backend = open_torch(student, LoadOptions(context=700))
    backend._decoder = StaticCache(torch, backend._model, 700, graph=False)
    yield backend
    backend.close()


@pytest.mark.gpu
def test_a_replayed_cuda_graph_gives_the_same_logits(student: Path, torch_backend: TorchBackend) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    backend = open_torch(student, LoadOptions(device="cuda", context=700))
    try:
        for messages in CONVERSATIONS.values():
            expected, got = forced_logits(torch_backend, messages), forced_logits(backend, messages)
            assert np.abs(expected - got).max() < 1e-3 * max(1.0, float(expected.std()))
        assert backend._decoder._graph is not None
    finally:
        backend.close()


def test_an_onnx_provider_that_does_not_start_is_said(onnx_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime prints a line and goes on with the processor; the figures would be the processor's."""
    import onnxruntime

    available = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    asked: list[list[str]] = []
    session = onnxruntime.InferenceSession

    def without_gpu(path: str, settings: object, providers: list[object]) -> object:
        asked.append([name[0] if isinstance(name, tuple) else str(name) for name in providers])
        return session(path, settings, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", without_gpu)
    with pytest.raises(MissingPiece, match="could not start CUDAExecutionProvider"):
        load(onnx_artifact, device="cuda")
    monkeypatch.setenv("HOME", "/dev/null")  # nowhere to keep engines: no reason to fail
    with pytest.raises(MissingPiece, match="could not start TensorrtExecutionProvider"):
        load(onnx_artifact, device="cuda", provider="tensorrt")
    assert asked == [["CUDAExecutionProvider"], ["TensorrtExecutionProvider", "CUDAExecutionProvider"]]


def test_a_provider_is_chosen_for_onnx_on_a_gpu_only(gguf_artifact: Path, onnx_artifact: Path) -> None:
    with pytest.raises(UserError, match="for ONNX artefacts only"):
        load(gguf_artifact, device="cuda", provider="tensorrt")
    with pytest.raises(UserError, match="needs a GPU"):
        load(onnx_artifact, provider="tensorrt")
    with pytest.raises(UserError, match="provider is 'openvino'"):
        load(onnx_artifact, provider="openvino")
    with pytest.raises(UserError, match="for GGUF artefacts only"):
        load(onnx_artifact, kv="f16")


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("kind", ["onnx", "gguf", "shared", "static"])
def test_logits_equal_torch(kind: str, name: str, torch_backend: TorchBackend, request: pytest.FixtureRequest) -> None:
    backend: Backend = request.getfixturevalue(f"{kind}_backend")
    messages = CONVERSATIONS[name]
    assert backend.prepare(messages).ids == torch_backend.prepare(messages).ids
    expected, got = forced_logits(torch_backend, messages), forced_logits(backend, messages)
    assert expected.std() > 0.3, "flat logits would pass any comparison"
    assert np.abs(expected - got).max() < TOLERANCE[kind] * max(1.0, float(expected.std()))


@pytest.mark.parametrize("kind", ["torch", "onnx", "gguf", "shared", "static"])
def test_a_request_leaves_nothing_behind(kind: str, request: pytest.FixtureRequest) -> None:
    backend: Backend = request.getfixturevalue(f"{kind}_backend")
    first = forced_logits(backend, CONVERSATIONS["one image"])
    forced_logits(backend, CONVERSATIONS["two images"])
    assert np.array_equal(first, forced_logits(backend, CONVERSATIONS["one image"]))


@pytest.mark.parametrize("kind", ["shared", "static"])
def test_caches_of_fixed_size_take_prompts_in_pieces_and_go_back(kind: str, request: pytest.FixtureRequest) -> None:
    backend: Backend = request.getfixturevalue(f"{kind}_backend")
    prompt = backend.prepare(CONVERSATIONS["two images"])
    embeds = [backend.encode([image])[0] for image in prompt.images]
    whole = backend.prefill(prompt, embeds).copy()
    n, middle = len(prompt.ids), prompt.images[1].start + 3
    for start in range(0, n, 7):
        pieces = backend.prefill(prompt, embeds, start, min(start + 7, n)).copy()
    for token_id in (5, 6, 7):
        backend.step(token_id)
    again = backend.prefill(prompt, [None, embeds[1]], middle, n)
    for got in (pieces, again):
        assert np.abs(whole - got).max() < 1e-4 * max(1.0, float(whole.std()))


def generated(engine: Engine, messages: list[Message]) -> list[int]:
    events = engine.generate(messages, Sampling(max_new_tokens=STEPS))
    return [event.id for event in events if isinstance(event, Token)]


@pytest.mark.parametrize("sizes", [{"decoder": "qwen2"}, {"decoder": "qwen3", "tied": False}, {"tower": "clip"}])
def test_torch_equals_generate(sizes: dict[str, object], tmp_path: Path) -> None:
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from tests.tiny import make_student

    directory = make_student(tmp_path / "s", seed=1, **sizes)
    model = LlavaForConditionalGeneration.from_pretrained(directory).eval()
    processor = AutoProcessor.from_pretrained(directory)
    images = [picture(0), picture(1), noise(5)]
    with load(directory) as engine:
        for image in images:
            text = processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nRead the top row."}]}],
                add_generation_prompt=True,
            )
            inputs = processor(images=to_pillow(image), text=text, return_tensors="pt")
            with torch.no_grad():
                out = model.generate(**inputs, do_sample=False, max_new_tokens=STEPS)
            expected = out[0, inputs["input_ids"].shape[1] :].tolist()
            assert generated(engine, [question("Read the top row.", image)]) == expected


def test_greedy_tokens_agree_between_formats(
    student: Path, onnx_artifact: Path, gguf_artifact: Path, torch_backend: TorchBackend
) -> None:
    conversations = [[question("Which digit is at the top left?", picture(i))] for i in range(8)]
    with load(student) as reference:
        expected = [generated(reference, messages) for messages in conversations]
    assert len({tuple(ids) for ids in expected}) > 1, "one answer for all images compares nothing"
    with load(onnx_artifact) as engine:
        assert [generated(engine, messages) for messages in conversations] == expected
    with load(gguf_artifact) as engine:
        for messages, ids in zip(conversations, expected, strict=True):
            got = generated(engine, messages)
            # its weights are float16: where PyTorch itself is undecided, either token will do
            sure = ids[: decided(torch_backend, messages, ids)]
            assert got[: len(sure)] == sure


def decided(backend: Backend, messages: list[Message], ids: list[int]) -> int:
    """Number of leading tokens whose logit leads the runner-up by more than twice the GGUF tolerance."""
    prompt = backend.prepare(messages)
    logits_V = backend.prefill(prompt, backend.encode(prompt.images))
    for count, token_id in enumerate(ids):
        second, first = np.partition(logits_V, -2)[-2:]
        if first - second < 2 * TOLERANCE["gguf"] * max(1.0, float(logits_V.std())):
            return count
        logits_V = backend.step(token_id)
    return len(ids)


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_golden_sample_of_the_artefact(kind: str, request: pytest.FixtureRequest) -> None:
    from PIL import Image as Pillow

    artifact: Path = request.getfixturevalue(f"{kind}_artifact")
    golden = read_manifest(artifact).golden[0]
    image = from_pillow(Pillow.open(artifact / golden.image))
    with load(artifact) as engine:
        events = engine.generate([question(golden.question, image)], Sampling(max_new_tokens=len(golden.token_ids)))
        assert tuple(e.id for e in events if isinstance(e, Token)) == golden.token_ids


@pytest.mark.parametrize(("kv", "bytes_", "tolerance"), [("f16", 2.0, 3e-2), ("q8_0", 34 / 32, 0.15)])
def test_llama_cpp_keeps_smaller_keys_and_values_when_asked(
    kv: str, bytes_: float, tolerance: float, gguf_artifact: Path, torch_backend: TorchBackend
) -> None:
    backend = open_gguf(gguf_artifact, LoadOptions(kv=kv), read_manifest(gguf_artifact))  # type: ignore[arg-type]
    try:
        assert backend.info.kv_bytes_per_token == int(2 * 2 * 2 * 64 * bytes_)
        messages = CONVERSATIONS["two images"]
        expected, got = forced_logits(torch_backend, messages), forced_logits(backend, messages)
        assert np.abs(expected - got).max() < tolerance * max(1.0, float(expected.std()))
    finally:
        backend.close()


def test_spans_add_up_and_nothing_is_cached(onnx_artifact: Path) -> None:
    with load(onnx_artifact) as engine:
        *_, done = engine.generate([question("Read it.", picture(0))], Sampling(max_new_tokens=4, ignore_eos=True))
    assert isinstance(done, Done)
    assert done.spans[0].start_ns == done.received_ns
    assert sum(s.end_ns - s.start_ns for s in done.spans) == done.spans[-1].end_ns - done.received_ns
    assert (done.usage.cached_tokens, done.usage.image_tokens, done.usage.completion_tokens) == (0, 16, 4)


@pytest.mark.parametrize("kind", ["student", "onnx_artifact", "gguf_artifact"])
def test_model_info_comes_from_disk(kind: str, student: Path, request: pytest.FixtureRequest) -> None:
    from vlm.load import open_checkpoint

    with load(request.getfixturevalue(kind), context=100) as engine:
        info = engine.info
    assert (info.context_length, info.vocab_size, info.tokens_per_image) == (100, 384, 16)
    assert info.weights_sha256 == open_checkpoint(student).weights_sha256()
    assert info.decoder_weight_bytes is not None
    assert info.lm_head_bytes is not None
    assert info.decoder_weight_bytes > info.lm_head_bytes > 0
    assert info.kv_bytes_per_token == 2 * 2 * 2 * 64 * 4


def test_cuda_is_refused_where_there_is_none(student: Path, onnx_artifact: Path, gguf_artifact: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for path in (student, onnx_artifact, gguf_artifact):
        with pytest.raises(MissingPiece):
            load(path, device="cuda")


@pytest.mark.parametrize("kind", ["student", "onnx_artifact", "gguf_artifact"])
def test_exit_in_the_middle_of_an_answer_is_clean(kind: str, request: pytest.FixtureRequest) -> None:
    code = f"""
import threading, runtime
from runtime.api import Sampling, Token
from runtime.images import question
running = threading.Event()
engine = runtime.load({str(request.getfixturevalue(kind))!r})
listener = lambda event: running.set() if isinstance(event, Token) else None
for _ in range(3):
    engine.submit([question("hi")], Sampling(max_new_tokens=900, ignore_eos=True), listener=listener)
running.wait(60)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
