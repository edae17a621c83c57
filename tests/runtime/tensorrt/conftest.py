"""Artefacts made once, and the three ways to run them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.delta import DeltaBackend
from tests.fake_tensorrt import Fake

from .making import Made, install, make, opened


@pytest.fixture(scope="session")
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


@pytest.fixture(params=("ort", "graphs", "eager"))
def backend(made: Made, device: Fake, request: pytest.FixtureRequest) -> Iterator[DeltaBackend]:
    """The same artefact three ways: ONNX Runtime, engines with recorded graphs, engines that cannot be recorded."""
    from export.build_engine import build

    device.cudart.records = request.param != "eager"
    if request.param != "ort":
        build(made.root)
    ready = opened(made, "cpu" if request.param == "ort" else "auto")
    yield ready
    ready.close()
    assert device.cudart.device == device.cudart.host == device.cudart.graphs == {}, "memory was not given back"


@pytest.fixture
def one(once: Callable[[str], Made]) -> Made:
    return once("fp32")


@pytest.fixture
def fresh(one: Made, tmp_path: Path) -> Made:
    """A copy without engines."""
    ignore = shutil.ignore_patterns("engines")
    return dataclasses.replace(one, root=Path(shutil.copytree(one.root, tmp_path / "artefact", ignore=ignore)))
