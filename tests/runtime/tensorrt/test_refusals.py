"""TensorRT artefacts: what is refused, and what it says."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime import load
from runtime.api import ModelFailed
from tests.fake_cuda import FakeCudart
from tests.fake_tensorrt import Fake
from vlm import engine_key
from vlm.errors import ArtifactError, MissingPiece, UserError

from .making import CONTEXT, ORIN, Made, install, opened


def test_no_engine_yet(fresh: Made, device: Fake) -> None:
    with pytest.raises(ArtifactError, match=rf"no engine was built yet; .*python -m export build {fresh.root}"):
        opened(fresh, "auto")


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
        opened(fresh, "auto")
    assert f"python -m export build {fresh.root}" in str(caught.value)


def test_an_engine_of_another_tensorrt(fresh: Made, device: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.build_engine import BuildOptions, build

    build(fresh.root, BuildOptions(version_compatible=True))
    install(Fake("10.13.3.9"), monkeypatch)
    opened(fresh, "auto").close()  # its runtime lets the engine bring its own
    shutil.rmtree(fresh.root / "engines")
    install(device, monkeypatch)
    build(fresh.root)
    install(Fake("10.13.3.9"), monkeypatch)
    with pytest.raises(ArtifactError, match=r"TensorRT: built for 10\.3\.0, this is 10\.13\.3\.9"):
        opened(fresh, "auto")


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
        opened(fresh, "auto")
    assert build(fresh.root)[1], "damage is built again"
    opened(fresh, "auto").close()


def test_what_is_missing_is_named(fresh: Made, device: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.build_engine import build
    from runtime import cuda

    build(fresh.root)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPiece, match=r"tensorrt cannot be used here.*--provider cpu"):
        opened(fresh, "auto")
    install(device, monkeypatch)
    monkeypatch.setattr(cuda, "load_cudart", load_cudart)
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPiece, match="cuda-python is not installed"):
        opened(fresh, "auto")


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
        opened(one, provider)


def test_what_cannot_be_handed_over(one: Made) -> None:
    with pytest.raises(UserError, match="Edge-LLM"):
        opened(one, "edge-llm")
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
        opened(fresh, "auto")
    assert device.cudart.device == device.cudart.host == {}


def test_a_lower_context_takes_less_memory(fresh: Made, device: Fake) -> None:
    from export.build_engine import build

    build(fresh.root)
    sizes = []
    for context in (CONTEXT + 1000, 40):
        backend = opened(fresh, "auto", context=context)
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
