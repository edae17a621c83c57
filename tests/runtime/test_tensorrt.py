"""TensorRT artefacts end to end: ONNX Runtime, and engines on stand-ins that hold real memory, both against PyTorch.

The stand-ins execute the graphs an engine would be built from, so numbers are real; what they cannot show is what
TensorRT itself makes of a graph. `scripts/check-gpu` does that on a device.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import load
from runtime.api import Backend, ContextOverflow, Done, Image, Message, ModelFailed, Sampling, Token
from runtime.backend_tensorrt import open_tensorrt
from runtime.backend_torch import TorchBackend, open_torch
from runtime.delta import DeltaBackend, DeviceLogits
from runtime.engine import Engine
from runtime.images import answer, from_pillow, question
from runtime.options import LoadOptions
from runtime.trt_runner import TrtRunner
from tests.fake_cuda import FakeCudart
from tests.fake_tensorrt import Fake
from vlm import digits, engine_key
from vlm.errors import ArtifactError, MissingPiece, UserError
from vlm.manifest import read_manifest

STEPS = 32
TOLERANCE = {"fp32": 3e-4, "fp16": 0.05}
ORIN = {"gpu": "Orin", "sm": "8.7", "cuda": "12.6", "l4t": "36.4.3"}
CONTEXT = 160
# row bytes: 2 heads x 64 x 2 are a multiple of 256, 1 x 32 x 2 are not
SHAPES: dict[str, dict[str, Any]] = {
    "fp32": {"decoder": "qwen3", "kv_heads": 1, "heads": 4, "head_dim": 32},
    "fp16": {"decoder": "qwen2"},
}


@dataclasses.dataclass(frozen=True)
class Made:
    student: Path
    root: Path
    precision: str
    torch: TorchBackend


def make(precision: str, folder: Path) -> Made:
    """A tiny student and its artefact, written but not measured."""
    from export.artefact import build
    from export.evidence import collect
    from export.options import ExportOptions
    from export.student import open_student
    from export.to_tensorrt import TrtStorage
    from export.trt_precision import parse_trt_precision
    from tests.tiny import make_student
    from vlm.load import open_checkpoint
    from vlm.manifest import write_manifest

    where = make_student(folder / "student", seed=3, context=CONTEXT, vision_layers=1, **SHAPES[precision])
    student = open_student(open_checkpoint(where))
    root = folder / "artefact"
    root.mkdir()
    run = ExportOptions("tensorrt", where, root, precision)
    storage = TrtStorage(parse_trt_precision(precision))
    write_manifest(root, build(student, collect(student, 1, seed=0, limit=1), run, root, storage))
    return Made(where, root, precision, open_torch(where, LoadOptions()))


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Made]]:
    """Factory: precision -> artefact, made once."""
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    found: dict[str, Made] = {}

    def get(precision: str) -> Made:
        if precision not in found:
            found[precision] = make(precision, tmp_path_factory.mktemp(f"trt-{precision}"))
        return found[precision]

    yield get
    for each in found.values():
        each.torch.close()


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def made(request: pytest.FixtureRequest, once: Callable[[str], Made]) -> Made:
    return once(request.param)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A machine with TensorRT and a GPU."""
    fake = Fake("10.3.0")
    install(fake, monkeypatch)
    return fake


def install(fake: Fake, monkeypatch: pytest.MonkeyPatch, facts: dict[str, str] = ORIN) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module)
    monkeypatch.setattr("runtime.cuda.load_cudart", lambda: fake.cudart)
    monkeypatch.setattr(engine_key, "device_facts", lambda: facts)
    monkeypatch.setattr(engine_key, "free_memory", lambda: (8 << 30, 4 << 30))


KINDS = ("ort", "graphs", "eager")


@pytest.fixture(params=KINDS)
def backend(made: Made, device: Fake, request: pytest.FixtureRequest) -> Iterator[DeltaBackend]:
    """The same artefact three ways: ONNX Runtime, engines with recorded graphs, engines that cannot be recorded."""
    from export.build_engine import build

    device.cudart.records = request.param != "eager"
    if request.param != "ort":
        build(made.root)
    opened = open(made, "cpu" if request.param == "ort" else "auto")
    yield opened
    opened.close()
    assert device.cudart.device == device.cudart.host == device.cudart.graphs == {}, "memory was not given back"


def open(made: Made, provider: str, **options: Any) -> DeltaBackend:  # noqa: A001
    return open_tensorrt(made.root, LoadOptions(provider=provider, **options), read_manifest(made.root))  # type: ignore[arg-type]


def picture(index: int) -> Image:
    return from_pillow(digits.sample("test", index).image)


def forced(backend: Backend, messages: list[Message], steps: int = STEPS, chunk: int = 10**6) -> np.ndarray:
    """logits of the prompt's end and of fixed tokens after it."""
    prompt = backend.prepare(messages)
    embeds = backend.encode(prompt.images) if prompt.images else []
    for start in range(0, len(prompt.ids), chunk):
        logits = backend.prefill(prompt, embeds, start, min(start + chunk, len(prompt.ids)))
    rows = [np.array(logits)]
    rows += [np.array(backend.step(int(token))) for token in np.random.default_rng(0).integers(4, 300, steps)]
    return np.stack(rows)


def close_to(expected: np.ndarray, got: np.ndarray, precision: str) -> bool:
    assert expected.std() > 0.25, "flat logits would pass any comparison"
    return bool(np.abs(expected - got).max() < TOLERANCE[precision] * max(1.0, float(expected.std())))


QUESTIONS: dict[str, list[Message]] = {
    "one image": [question("Read the top row.", picture(0))],
    "three images": [question("Compare.", picture(1), picture(2), picture(0))],
    "no image": [question("Say something.")],
    # 128 rows is where one bucket ends and the next begins
    "across a bucket": [question("7 " * 45, picture(2))],
    "second turn": [question("Add.", picture(2)), answer("3 + 4 = 7"), question("And below?")],
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_step_equals_torch(name: str, backend: DeltaBackend, made: Made) -> None:
    expected, got = forced(made.torch, QUESTIONS[name]), forced(backend, QUESTIONS[name])
    assert got.shape == (1 + STEPS, expected.shape[1])
    assert close_to(expected, got, made.precision)
    if name == "across a bucket":
        assert len(backend.prepare(QUESTIONS[name]).ids) < 127 < len(backend.prepare(QUESTIONS[name]).ids) + STEPS


@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_a_prompt_in_pieces_gives_the_same(chunk: int, backend: DeltaBackend, made: Made) -> None:
    expected = forced(made.torch, QUESTIONS["three images"], 2)
    assert close_to(expected, forced(backend, QUESTIONS["three images"], 2, chunk), made.precision)


def test_the_profile_cuts_a_long_prompt_by_itself(backend: DeltaBackend, made: Made) -> None:
    backend._runner.max_new = 16
    assert close_to(
        forced(made.torch, QUESTIONS["across a bucket"], 2),
        forced(backend, QUESTIONS["across a bucket"], 2),
        made.precision,
    )


def test_up_to_the_last_row_of_the_profile(backend: DeltaBackend, made: Made) -> None:
    messages = QUESTIONS["one image"]
    room = CONTEXT - len(backend.prepare(messages).ids)
    expected, got = forced(made.torch, messages, room), forced(backend, messages, room)
    assert close_to(expected[-1:], got[-1:], made.precision)
    with pytest.raises(ValueError, match="do not fit"):
        backend.step(5)


def test_going_back_into_a_conversation(backend: DeltaBackend, made: Made) -> None:
    """The engine keeps what two prompts share and takes in the rest from there."""
    first, second = QUESTIONS["one image"], [question("Read the bottom row, then stop.", picture(0))]
    forced(backend, first)
    prompt = backend.prepare(second)
    shared = next(i for i, (a, b) in enumerate(zip(prompt.ids, backend.prepare(first).ids, strict=False)) if a != b)
    assert shared > 16
    got = [np.array(backend.prefill(prompt, backend.encode(prompt.images), shared)), np.array(backend.step(9))]
    made.torch.prefill(prompt, made.torch.encode(prompt.images))
    expected = forced(made.torch, second, 0)
    assert close_to(expected[0], got[0], made.precision)


def test_an_overflow_does_not_reach_the_next_conversation(backend: DeltaBackend, made: Made) -> None:
    before = forced(backend, QUESTIONS["one image"])
    bad = np.full((40, backend._table_VD.shape[1]), np.nan, np.float32)
    assert np.isnan(np.array(backend._runner.extend(bad, 60))).all()
    assert close_to(before, forced(backend, QUESTIONS["one image"]), made.precision)


def test_greedy_answers_through_the_engine(backend: DeltaBackend, made: Made) -> None:
    messages = QUESTIONS["three images"]
    prompt = made.torch.prepare(messages)
    expected, logits = [], made.torch.prefill(prompt, made.torch.encode(prompt.images))
    for _ in range(STEPS):
        expected.append(int(logits.argmax()))
        logits = made.torch.step(expected[-1])
    opened = Engine(Borrowed(backend))  # type: ignore[arg-type]
    events = list(opened.generate(messages, Sampling(max_new_tokens=STEPS, ignore_eos=True)))
    assert [e.id for e in events if isinstance(e, Token)] == expected or made.precision == "fp16"
    done = events[-1]
    assert isinstance(done, Done)
    assert sum(s.end_ns - s.start_ns for s in done.spans) == done.spans[-1].end_ns - done.received_ns
    drawn = Sampling(max_new_tokens=4, temperature=1.0, seed=1, repetition_penalty=1.2, ignore_eos=True)
    assert [len(tokens(opened, messages, drawn)) for _ in range(2)] == [4, 4]
    with pytest.raises(ContextOverflow):
        tokens(opened, [question("7 " * 200)])
    opened.close()


class Borrowed:
    """A backend the engine does not close."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return (lambda: None) if name == "close" else getattr(self._backend, name)


def tokens(engine: Engine, messages: list[Message], sampling: Sampling | None = None) -> list[int]:
    chosen = sampling or Sampling(max_new_tokens=STEPS, ignore_eos=True)
    return [event.id for event in engine.generate(messages, chosen) if isinstance(event, Token)]


def engines(made: Made, device: Fake) -> DeltaBackend:
    from export.build_engine import build

    build(made.root)
    return open(made, "auto")


def test_a_greedy_step_is_one_graph_one_copy_one_wait(made: Made, device: Fake) -> None:
    backend = engines(made, device)
    prompt = backend.prepare(QUESTIONS["no image"])
    logits = backend.prefill(prompt, [])
    backend.step(5)
    device.cudart.calls.clear()
    logits = backend.step(6)
    assert isinstance(logits, DeviceLogits)
    assert int(logits.argmax()) == int(np.array(logits).argmax())
    assert device.cudart.calls[:3] == ["cudaGraphLaunch", "cudaMemcpy2DAsync", "cudaStreamSynchronize"]
    device.cudart.calls.clear()
    stale = backend.step(7)
    backend.step(8)
    assert device.cudart.calls == ["cudaGraphLaunch", "cudaMemcpy2DAsync", "cudaStreamSynchronize"] * 2
    with pytest.raises(RuntimeError, match="overwritten"):
        np.array(stale)
    backend.close()


def test_rows_go_in_place_where_addresses_allow(made: Made, device: Fake) -> None:
    backend = engines(made, device)
    runner = backend._runner
    assert isinstance(runner, TrtRunner)
    device.cudart.calls.clear()
    backend.prefill(backend.prepare(QUESTIONS["no image"]), [])
    in_place = runner._row_bytes % 256 == 0
    assert in_place == (made.precision == "fp16")
    assert ("cudaMemcpy2DAsync" in device.cudart.calls) != in_place
    backend.close()


def test_a_new_bucket_is_recorded_once(made: Made, device: Fake) -> None:
    backend = engines(made, device)
    device.cudart.calls.clear()
    forced(backend, QUESTIONS["across a bucket"])
    forced(backend, QUESTIONS["across a bucket"])
    assert device.cudart.calls.count("cudaStreamBeginCapture") == 2
    assert device.cudart.calls.count("cudaGraphInstantiate") == 2
    backend.close()


def test_an_empty_cache_is_the_same_as_its_reserved_row(made: Made) -> None:
    """The graph itself, with no past rows at all and with the one masked row the runtime binds instead."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(made.root / "onnx" / "decoder.onnx"), providers=["CPUExecutionProvider"])
    ports = {port.name: port for port in session.get_inputs()}
    dtype = np.float16 if made.precision == "fp16" else np.float32
    hidden = ports["inputs_embeds"].shape[2]
    embeds = np.random.default_rng(0).normal(size=(1, 5, hidden)).astype(dtype)
    results = []
    for past in (0, 1):
        bias = np.where(np.arange(5 + past)[None] <= np.arange(past, past + 5)[:, None], 0, np.finfo(dtype).min)
        bias[:, :past] = np.finfo(dtype).min
        feed = {
            "inputs_embeds": embeds,
            "position_ids": np.arange(5)[None],
            "attention_bias": bias[None, None].astype(dtype),
        }
        for name, port in ports.items():
            if name.startswith("past_"):
                feed[name] = np.zeros((1, past, *port.shape[2:]), dtype)
        results.append(session.run(None, feed))
    for a, b in zip(*results, strict=True):
        assert np.allclose(a, b, rtol=0, atol=1e-5 if made.precision == "fp32" else 1e-2)


# -- what is refused, and what it says


@pytest.fixture
def one(once: Callable[[str], Made]) -> Made:
    return once("fp32")


@pytest.fixture
def fresh(one: Made, tmp_path: Path) -> Made:
    """A copy without engines."""
    ignore = shutil.ignore_patterns("engines")
    return dataclasses.replace(one, root=Path(shutil.copytree(one.root, tmp_path / "artefact", ignore=ignore)))


def test_no_engine_yet(fresh: Made, device: Fake) -> None:
    with pytest.raises(ArtifactError, match=rf"no engine was built yet; .*python -m export build {fresh.root}"):
        open(fresh, "auto")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"gpu": "NVIDIA GeForce RTX 4060", "sm": "8.9", "l4t": ""},
            "GPU: built for Orin, this is NVIDIA GeForce RTX 4060",
        ),
        ({"l4t": "36.5"}, r"L4T \(JetPack\): built for 36.4.3, this is 36.5"),
        ({"cuda": "13.0"}, "CUDA of the driver: built for 12.6, this is 13.0"),
    ],
)
def test_an_engine_of_another_machine(
    other: dict[str, str], said: str, fresh: Made, device: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.build_engine import build

    build(fresh.root)
    monkeypatch.setattr(engine_key, "device_facts", lambda: {**ORIN, **other})
    with pytest.raises(ArtifactError, match=said) as caught:
        open(fresh, "auto")
    assert f"python -m export build {fresh.root}" in str(caught.value)


def test_an_engine_of_another_tensorrt(fresh: Made, device: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.build_engine import BuildOptions, build

    build(fresh.root, BuildOptions(version_compatible=True))
    install(Fake("10.13.3.9"), monkeypatch)
    open(fresh, "auto").close()  # its runtime lets the engine bring its own
    shutil.rmtree(fresh.root / "engines")
    install(device, monkeypatch)
    build(fresh.root)
    install(Fake("10.13.3.9"), monkeypatch)
    with pytest.raises(ArtifactError, match=r"TensorRT: built for 10\.3\.0, this is 10\.13\.3\.9"):
        open(fresh, "auto")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-9]), "decoder.engine has"),
        (lambda p: p.write_bytes(b"x" + p.read_bytes()[1:]), "decoder.engine was altered"),
        (lambda p: p.unlink(), "decoder.engine is missing"),
        (lambda p: p.with_name("engine.json").write_text("{"), "engine.json is damaged"),
    ],
)
def test_a_damaged_engine(damage: Callable[[Path], Any], said: str, fresh: Made, device: Fake) -> None:
    from export.build_engine import build

    folder, _ = build(fresh.root)
    damage(folder / "decoder.engine")
    with pytest.raises(ArtifactError, match=said):
        open(fresh, "auto")
    assert build(fresh.root)[1], "damage is built again"
    open(fresh, "auto").close()


def test_what_is_missing_is_named(fresh: Made, device: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.build_engine import build
    from runtime import cuda

    build(fresh.root)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPiece, match=r"tensorrt cannot be used here.*--provider cpu"):
        open(fresh, "auto")
    install(device, monkeypatch)
    monkeypatch.setattr(cuda, "load_cudart", load_cudart)
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPiece, match="cuda-python is not installed"):
        open(fresh, "auto")


def load_cudart() -> Any:
    import importlib

    import runtime.cuda

    return importlib.reload(runtime.cuda).load_cudart()


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_this_onnxruntime_lacks(provider: str, one: Made) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has a GPU provider")
    with pytest.raises(MissingPiece, match="ExecutionProvider"):
        open(one, provider)


def test_what_cannot_be_handed_over(one: Made) -> None:
    with pytest.raises(UserError, match="Edge-LLM"):
        open(one, "edge-llm")
    with pytest.raises(UserError, match="provider is 'npu'"):
        load(one.root, provider="npu")


def test_a_provider_is_for_tensorrt_artefacts(one: Made, tmp_path: Path) -> None:
    import json

    copy = Path(shutil.copytree(one.root, tmp_path / "copy"))
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "onnx"}))
    with pytest.raises(UserError, match="chosen for TensorRT artefacts"):
        load(copy, provider="cpu")


def test_too_little_memory_on_the_gpu(fresh: Made, device: Fake) -> None:
    from export.build_engine import build

    build(fresh.root)
    device.cudart.capacity = 10_000
    with pytest.raises(ModelFailed, match=r"cudaErrorMemoryAllocation.*--context"):
        open(fresh, "auto")
    assert device.cudart.device == device.cudart.host == {}


def test_a_lower_context_takes_less_memory(fresh: Made, device: Fake) -> None:
    from export.build_engine import build

    build(fresh.root)
    sizes = []
    for context in (CONTEXT + 1000, 40):
        backend = open(fresh, "auto", context=context)
        sizes.append(sum(size for size, _ in device.cudart.device.values()))
        assert backend.info.context_length == min(context, CONTEXT)
        backend.close()
    assert sizes[1] < sizes[0]


def test_the_fake_device_is_as_strict_as_the_real_one() -> None:
    cudart = FakeCudart()
    address = cudart.cudaMalloc(100)[1]
    with pytest.raises(AssertionError, match="not memory that was allocated"):
        cudart.inside(address, 101, cudart.device)
    with pytest.raises(AttributeError):
        _ = Fake("11.4.0.106").module.BuilderFlag.FP16
    with pytest.raises(AttributeError):
        _ = Fake("10.3.0").module.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY


def test_tensorrt_provider_gets_profiles_and_caches(one: Made) -> None:
    import json

    from runtime.delta_ort import tensorrt_options

    plan = json.loads((one.root / "build_plan.json").read_text())
    options = tensorrt_options(one.root, plan["engines"]["decoder"]["profiles"])
    assert options["trt_engine_cache_enable"]
    assert options["trt_timing_cache_enable"]
    assert f"past_k.0:1x{CONTEXT}x1x32" in options["trt_profile_max_shapes"]
    assert "inputs_embeds:1x1x256" in options["trt_profile_min_shapes"]
