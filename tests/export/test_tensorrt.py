"""Plan mode without TensorRT, and the build script against a recording stand-in for the library.

The stand-in has only the names that every version from 10.3 to 11 has; anything else raises AttributeError, as the
real module would.
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export import build_engine
from export.cli import main
from vlm.errors import GateFailed, MissingPiece, UserError
from vlm.manifest import check_files, read_manifest

DEVICE = {"gpu": "Orin", "sm": "8.7", "cuda": "12060", "l4t": "R36"}


class Fake:
    """Records calls; only the names given exist, and only the settings given can be assigned."""

    def __init__(self, calls: list[tuple[Any, ...]], methods: dict[str, Any], settings: tuple[str, ...] = ()) -> None:
        object.__setattr__(self, "_calls", calls)
        object.__setattr__(self, "_methods", methods)
        object.__setattr__(self, "_settings", settings)

    def __getattr__(self, name: str) -> Any:
        if name not in self._methods:
            raise AttributeError(name)
        result = self._methods[name]
        if not callable(result):
            return result

        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls.append((name, *args, *kwargs.values()))
            return result(*args, **kwargs)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._settings:
            raise AttributeError(name)
        self._calls.append((name, value))


def fake_tensorrt(version: str, parses: bool = True) -> tuple[types.ModuleType, list[tuple[Any, ...]]]:
    calls: list[tuple[Any, ...]] = []
    cache = Fake(calls, {"serialize": lambda: b"timings"})
    config = Fake(
        calls,
        {
            "set_memory_pool_limit": lambda *_: None,
            "create_timing_cache": lambda _: cache,
            "set_timing_cache": lambda *_, **__: True,
            "get_timing_cache": lambda: cache,
            "add_optimization_profile": lambda _: 0,
        },
        ("builder_optimization_level",),
    )
    builder = Fake(
        calls,
        {
            "create_network": lambda _: "network",
            "create_builder_config": lambda: config,
            "create_optimization_profile": lambda: Fake(calls, {"set_shape": lambda *_: None}),
            "build_serialized_network": lambda *_: b"engine bytes",
        },
    )
    parser = Fake(
        calls, {"parse_from_file": lambda _: parses, "num_errors": 1, "get_error": lambda _: "node 3 is unsupported"}
    )
    module = types.ModuleType("tensorrt")
    logger: Any = type("Logger", (), {"WARNING": 2, "__init__": lambda self, _level: None})
    contents: dict[str, Any] = {
        "__version__": version,
        "Logger": logger,
        "Builder": lambda _: builder,
        "OnnxParser": lambda *_: parser,
        "NetworkDefinitionCreationFlag": types.SimpleNamespace(STRONGLY_TYPED=1),
        "MemoryPoolType": types.SimpleNamespace(WORKSPACE="workspace"),
    }
    for name, value in contents.items():
        setattr(module, name, value)
    return module, calls


@pytest.fixture
def plan(exported: Callable[..., Any], tmp_path: Path) -> Path:
    root: Path = exported("tensorrt", "fp16", "siglip", "llama").copy_to(tmp_path / "plan")
    return root


def _without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)


def test_export_without_tensorrt_leaves_everything_and_exits_3(
    subjects: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _without_tensorrt(monkeypatch)
    out = tmp_path / "trt"
    student = subjects("siglip", "llama").directory
    command = [
        "--target",
        "tensorrt",
        "--student",
        str(student),
        "--out",
        str(out),
        "--samples",
        "4",
        "--precision",
        "fp32",
        "--json",
    ]
    with pytest.raises(MissingPiece, match=f"python -m export build {out}") as caught:
        main(command)
    assert caught.value.exit_code == 3
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"artefact", "verified", "bytes", "seconds", "peak_rss_bytes", "parity", "accuracy"} <= set(answer)
    assert answer["verified"]
    check_files(out, read_manifest(out))


def test_stand_alone_script_says_what_is_missing(plan: Path) -> None:
    code = "import sys, runpy; sys.modules['tensorrt'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(plan / "build_engine.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert "tensorrt is not installed" in done.stderr


@pytest.mark.parametrize("version", ["10.3.0", "11.4.1"])
def test_build_uses_only_what_every_version_has(plan: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    module, calls = fake_tensorrt(version)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(build_engine, "device_facts", lambda: DEVICE)
    assert main(["build", str(plan)]) == 0
    names = [call[0] for call in calls]
    assert names.count("add_optimization_profile") == 3  # vision, prefill, decode
    assert ("create_network", 1 << 1) in calls
    assert ("set_memory_pool_limit", "workspace", 1 << 30) in calls
    assert ("builder_optimization_level", 3) in calls
    manifest = read_manifest(plan)
    check_files(plan, manifest)
    assert [e.path for e in manifest.files if e.role == "engine"] == [
        "engines/vision_encoder.engine",
        "engines/decoder.engine",
    ]
    assert (plan / "engines" / "timing.cache").read_bytes() == b"timings"


def test_too_old_a_version_is_named(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = fake_tensorrt("8.6.1")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(MissingPiece, match=r"8\.6\.1 is too old"):
        main(["build", str(plan)])
    assert calls == []


def test_second_build_reuses_engines_until_something_changes(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = fake_tensorrt("10.3.0")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    build_engine.build(plan, device=DEVICE)
    built = len(calls)
    build_engine.build(plan, device=DEVICE)
    assert len(calls) == built
    build_engine.build(plan, device={**DEVICE, "gpu": "another"})
    assert len(calls) > built
    assert ("create_timing_cache", b"timings") in calls


def test_profiles_cover_every_input_and_never_an_empty_cache(plan: Path) -> None:
    value = json.loads((plan / "build_plan.json").read_text())
    declared = read_manifest(plan).io["decoder"]["inputs"]
    for profile in value["engines"]["decoder"]["profiles"].values():
        assert set(profile) == {name for name, _, _ in declared}
        for low, best, high in profile.values():
            assert all(1 <= a <= b <= c for a, b, c in zip(low, best, high, strict=True))
        rows = [shape[1] for shape in profile["past_k.0"]]
        new = [shape[1] for shape in profile["inputs_embeds"]]
        total = [shape[3] for shape in profile["attention_bias"]]
        assert total == [a + b for a, b in zip(rows, new, strict=True)]


def test_refused_graph_is_a_failed_gate(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = fake_tensorrt("10.3.0", parses=False)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(build_engine, "device_facts", lambda: DEVICE)
    with pytest.raises(GateFailed, match="node 3 is unsupported"):
        main(["build", str(plan)])


def test_only_tensorrt_artefacts_have_engines(exported: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="gguf artefact"):
        main(["build", str(exported("gguf", "f16", "siglip", "llama").root)])
