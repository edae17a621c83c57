"""A model that fails in its own way: a profile goes on, a server says so and ends, figures stay what they are called."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime import report, serve_command
from runtime.api import ModelFailed
from runtime.backend_fake import FakeBackend, FakeScript
from runtime.compare import _different_conditions, pair_up
from runtime.engine import Engine
from runtime.latency import Timing
from runtime.memory import DeviceMemory
from runtime.options import LoadOptions
from runtime.profiler import ProfileOptions
from runtime.runner import EngineRunner, turn
from runtime.server import ServerOptions, Service
from runtime.stats import summary


def test_a_request_that_fails_is_a_failed_request() -> None:
    backend = FakeBackend(FakeScript("abc", fail_at="step"))
    with Engine(backend) as engine:
        runner = EngineRunner(engine, 0.0)
        request = {"turns": [turn("user", "hi")], "output_tokens": 3, "reuse": "none", "sync": "none"}
        assert "RuntimeError" in runner.ask(request)["failed"]
        backend.script = FakeScript("abc")
        assert runner.ask(request)["text"] == "abc"


@pytest.mark.parametrize("where", ["loading", "warming up"])
def test_a_server_whose_model_breaks_while_loading_ends(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    closed = []

    class Broken(Engine):
        def warmup(self, requests: int = 2, seed: int = 0) -> Any:
            raise RuntimeError("CUDA error\nmany lines")

        def close(self) -> None:
            closed.append(True)
            super().close()

    def load(*_: Any, **__: Any) -> Engine:
        if where == "loading":
            raise RuntimeError("CUDA error\nmany lines")
        return Broken(FakeBackend(FakeScript("x")))

    monkeypatch.setattr(serve_command, "load", load)
    server, failure = SimpleNamespace(should_exit=False), list[Exception]()
    arguments = argparse.Namespace(artifact=Path("x"), backend="fake")
    asyncio.run(serve_command._load(arguments, LoadOptions(), Service("x", ServerOptions()), server, failure))
    assert server.should_exit
    assert isinstance(failure[0], ModelFailed)
    assert failure[0].message == "the model failed while it was loaded (RuntimeError: CUDA error)"
    assert bool(closed) is (where == "warming up")


def profile(name: str, threads: int | None = 1) -> dict[str, Any]:
    model = {"id": name, "backend": "onnx", "dtype": "fp32", "device": "cpu", "threads": threads}
    scenario = dict.fromkeys(("image_px", "image_tokens", "text_tokens", "output_tokens"), 1)
    requests = [{"ttft_ms": 1.0 + i / 10, "tpot_ms": 1.0, "e2el_ms": 2.0} for i in range(8)]
    return {"model": model, "scenario": scenario, "requests": requests}


def test_of_two_models_of_a_kind_only_the_same_one_is_compared() -> None:
    two, one = [profile("a"), profile("b")], [profile("a")]
    for before, after in ((two, one), (one, two)):
        assert {row.model for row in pair_up(before, after)} == {"a (onnx fp32)"}
    assert {row.model for row in pair_up([profile("before")], [profile("after")])} == {"after (onnx fp32)"}


def test_threads_that_nobody_knows_are_other_threads() -> None:
    host = {"host": {"cpu": "c", "usable_cores": 2}}
    values = [
        {"valid": True, "environment": host, "profiles": profiles}
        for profiles in ([profile("a")], [profile("a"), profile("s", None)])
    ]
    assert _different_conditions(*values) == ["not the same threads: 1 and 1, unknown"]


def test_what_was_not_measured_keeps_no_limit() -> None:
    known, unknown = (Timing(5.0, tpot, (), 10.0, {}, 4, 0, 0, 3) for tpot in (0.5, None))
    found = report._throughput([known, unknown], ProfileOptions(slo=(("tpot_ms", 1.0),)))
    assert found["goodput_rps"] == pytest.approx(1 / 0.02)


def test_a_model_on_the_processor_is_held_to_the_processors_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(report, "spec_bandwidth", lambda name: asked.append(name))
    monkeypatch.setattr(report, "roofline_json", lambda *_: {})
    timing = SimpleNamespace(prompt_tokens=4, completion_tokens=3)
    machine = {"host": {"gpu": "NVIDIA H200", "cpu": "AMD EPYC"}}
    for device in ("cpu", "cuda"):
        result: Any = SimpleNamespace(timings=[timing], info={"device": device}, bandwidth_gbs=1.0)
        report._roofline(result, {"throttled_s": 0.0}, [1.0], machine)
    assert asked == ["AMD EPYC", "NVIDIA H200"]


def test_memory_is_read_where_the_model_went(tmp_path: Path) -> None:
    memory = DeviceMemory("cpu", tmp_path)
    assert memory.look() == (None, "the model runs on the processor")
    memory.settle("cuda")
    assert "NVML" in memory.look()[1]


def test_gaps_of_few_requests_have_no_far_tail() -> None:
    gaps = [float(i % 7) for i in range(700)]
    assert summary(gaps)["p99"] is not None
    few = summary(gaps, independent=20)
    assert (few["n"], few["p90"], few["p99"]) == (700, None, None)
    assert few["p50"] == summary(gaps)["p50"]
