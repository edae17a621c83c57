"""Plan mode without TensorRT, and building with a stand-in for each release: call order, flags, shapes, keys, refusals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export import build_engine
from export.build_engine import BuildOptions
from export.cli import main
from tests.fake_tensorrt import RELEASES, Fake
from vlm import engine_key
from vlm.errors import GateFailed, MissingPiece, UserError
from vlm.manifest import check_files, read_manifest

ORIN = {"gpu": "Orin", "sm": "8.7", "cuda": "12.6", "l4t": "36.4.3"}
DESKTOP = {"gpu": "NVIDIA GeForce RTX 4060", "sm": "8.9", "cuda": "13.0", "l4t": ""}
ENGINES = ("vision_encoder", "decoder")


@pytest.fixture
def plan(exported: Callable[..., Any], tmp_path: Path) -> Path:
    root: Path = exported("tensorrt", "fp16", "siglip", "llama").copy_to(tmp_path / "plan")
    return root


def install(version: str, monkeypatch: pytest.MonkeyPatch, facts: dict[str, str] = ORIN) -> Fake:
    fake = Fake(version)
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module)
    monkeypatch.setattr(engine_key, "device_facts", lambda: facts)
    monkeypatch.setattr(engine_key, "free_memory", lambda: (8 << 30, 4 << 30))
    return fake


def test_export_without_tensorrt_leaves_everything_and_exits_3(
    subjects: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    out, student = tmp_path / "trt", subjects("siglip", "llama").directory
    command = ["--target", "tensorrt", "--student", str(student), "--out", str(out), "--samples", "4"]
    with pytest.raises(MissingPiece, match=f"python -m export build {out}") as caught:
        main([*command, "--precision", "fp32", "--json"])
    assert caught.value.exit_code == 3
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"artefact", "verified", "bytes", "seconds", "peak_rss_bytes", "parity", "accuracy"} <= set(answer)
    assert answer["verified"]
    check_files(out, read_manifest(out))
    assert {path.name for path in out.iterdir()} >= {"onnx", "build_plan.json", "build_engine.py", "engine_key.py"}


def test_stand_alone_script_says_what_is_missing(plan: Path) -> None:
    """Inside the artefact, with nothing of this project importable."""
    code = "import sys, runpy; sys.modules['tensorrt'] = None; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(plan / "build_engine.py"), str(plan)],
        capture_output=True,
        text=True,
        check=False,
        cwd=plan,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: tensorrt is not installed; on the device run `pip install tensorrt`")


def test_stand_alone_script_builds(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy in the artefact is the program itself, and `vlm` is not needed for it."""
    install("10.3.0", monkeypatch)
    monkeypatch.setitem(sys.modules, "vlm", None)
    monkeypatch.syspath_prepend(str(plan))
    space: dict[str, Any] = {"__name__": "stand_alone", "__file__": str(plan / "build_engine.py")}
    module = type(sys)("stand_alone")
    sys.modules["stand_alone"] = module  # dataclasses look their module up
    vars(module).update(space)
    exec(compile((plan / "build_engine.py").read_text(), "build_engine.py", "exec"), vars(module))
    monkeypatch.setattr(module.engine_key, "free_memory", lambda: (8 << 30, None))
    assert module.engine_key.__file__ == str(plan / "engine_key.py")
    folder, built = module.build(plan, device=ORIN)
    assert built
    assert sorted(path.name for path in folder.iterdir()) == [
        "decoder.engine",
        "decoder.log",
        "engine.json",
        "vision_encoder.engine",
        "vision_encoder.log",
    ]
    del sys.modules["stand_alone"], sys.modules["engine_key"]


@pytest.mark.parametrize("version", RELEASES)
def test_every_release_gets_the_same_calls_in_order(
    plan: Path, monkeypatch: pytest.MonkeyPatch, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = install(version, monkeypatch)
    assert main(["build", str(plan), "--json"]) == 0
    names = [call[0] for call in fake.calls if call[0] != "set_shape"]
    config = ["create_builder_config", "set_memory_pool_limit", "builder_optimization_level"]
    timing = ["create_timing_cache", "set_timing_cache"]
    before = ["create_network", "parse_from_file", *config, *timing]
    assert names == [
        *before,
        *["add_optimization_profile"] * 3,  # 1, 2 and 4 images
        "build_serialized_network",
        *before,
        *["add_optimization_profile"] * 2,  # prefill and decode
        "build_serialized_network",
    ]
    assert fake.calls.count(("create_network", 1 << 1)) == 2
    assert ("builder_optimization_level", 3) in fake.calls
    assert not [call for call in fake.calls if call[0] in ("set_flag", "hardware_compatibility_level")]
    # the second graph starts from what the first one measured
    assert [call[1] for call in fake.calls if call[0] == "create_timing_cache"] == [b"", b"timings"]
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["built"]
    assert set(answer["seconds"]) == set(ENGINES)
    folder = Path(answer["engines"])
    assert folder.parent == plan / "engines"
    for name in ENGINES:
        assert "building" in (folder / f"{name}.log").read_text()
    check_files(plan, read_manifest(plan))


def test_profiles_are_those_of_the_plan(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install("10.3.0", monkeypatch)
    build_engine.build(plan)
    shapes = [call[1:] for call in fake.calls if call[0] == "set_shape"]
    assert [s for s in shapes if s[0] == "pixel_values"] == [("pixel_values", *[(n, 3, 32, 32)] * 3) for n in (1, 2, 4)]
    assert [s[1:] for s in shapes if s[0] == "inputs_embeds"] == [
        ((1, 1, 256), (1, 80, 256), (1, 512, 256)),
        ((1, 1, 256), (1, 1, 256), (1, 1, 256)),
    ]
    assert [s[1:] for s in shapes if s[0] == "past_v.1"] == [
        ((1, 1, 2, 64), (1, 1, 2, 64), (1, 1024, 2, 64)),
        ((1, 1, 2, 64), (1, 80, 2, 64), (1, 1024, 2, 64)),
    ]
    assert [s[1:] for s in shapes if s[0] == "attention_bias"] == [
        ((1, 1, 1, 2), (1, 1, 80, 81), (1, 1, 512, 1536)),
        ((1, 1, 1, 2), (1, 1, 1, 81), (1, 1, 1, 1025)),
    ]
    value = json.loads((plan / "build_plan.json").read_text())
    assert value["cache"] == {
        "reserved_rows": 1,
        "row_bytes": 256,
        "in_place_every": 1,
        "max_rows": 1025,
        "prefill_rows": 512,
        "decode_buckets": [128, 256, 512, 1024],
        "note": value["cache"]["note"],
    }


def test_options_reach_the_builder(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install("10.13.3.9", monkeypatch, DESKTOP)
    wanted = ["--optimization-level", "5", "--workspace-mb", "256", "--version-compatible"]
    assert main(["build", str(plan), *wanted, "--hardware-compatible", "ampere+"]) == 0
    assert fake.calls.count(("builder_optimization_level", 5)) == 2
    assert fake.calls.count(("set_flag", "VERSION_COMPATIBLE")) == 2
    assert fake.calls.count(("hardware_compatibility_level", "AMPERE_PLUS")) == 2
    assert [c[2] for c in fake.calls if c[0] == "set_memory_pool_limit"] == [256 << 20] * 2
    fake.calls.clear()
    assert main(["build", str(plan), "--hardware-compatible", "same-sm"]) == 0
    assert fake.calls.count(("hardware_compatibility_level", "SAME_COMPUTE_CAPABILITY")) == 2
    assert len(list((plan / "engines").glob("*/engine.json"))) == 2


def test_float32_means_float32(exported: Callable[..., Any], plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 is TensorRT's default for float32 products; the gate of an fp32 artefact is far finer."""
    fake = install("10.3.0", monkeypatch)
    build_engine.build(plan)
    assert not [call for call in fake.calls if call[0] == "clear_flag"]
    value = json.loads((plan / "build_plan.json").read_text())
    value["builder"]["tf32"] = False
    (plan / "build_plan.json").write_text(json.dumps(value))
    build_engine.build(plan)
    assert fake.calls.count(("clear_flag", "TF32")) == 2


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda root: (root / "build_plan.json").unlink(), r"has no build_plan\.json"),
        (lambda root: (root / "build_plan.json").write_text("{"), "damaged"),
        (lambda root: (root / "onnx" / "decoder.onnx").unlink(), r"decoder\.onnx is missing"),
    ],
)
def test_an_incomplete_copy_is_refused_by_the_script(
    harm: Callable[[Path], Any],
    said: str,
    plan: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install("10.3.0", monkeypatch)
    harm(plan)
    assert build_engine.main([str(plan)]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_level_this_release_lacks(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("10.3.0", monkeypatch, DESKTOP)
    with pytest.raises(UserError, match=r"TensorRT 10\.3\.0 has no level `same-sm`"):
        main(["build", str(plan), "--hardware-compatible", "same-sm"])
    install("10.3.0", monkeypatch, ORIN)
    with pytest.raises(UserError, match="does not reach a Jetson"):
        main(["build", str(plan), "--hardware-compatible", "ampere+"])


def test_workspace_follows_free_memory(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install("10.3.0", monkeypatch)
    weights = max(e["weight_bytes"] for e in json.loads((plan / "build_plan.json").read_text())["engines"].values())
    for free, expected in (((8 << 30, 2 << 30), ((2 << 30) - 4 * weights) // 2), ((5 * weights, None), 64 << 20)):
        monkeypatch.setattr(engine_key, "free_memory", lambda free=free: free)
        fake.calls.clear()
        build_engine.build(plan, BuildOptions(force=True))
        assert {c[2] for c in fake.calls if c[0] == "set_memory_pool_limit"} == {expected}


def test_too_little_memory_is_said_before_the_work(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install("10.3.0", monkeypatch)
    monkeypatch.setattr(engine_key, "free_memory", lambda: (1 << 20, 1 << 20))
    with pytest.raises(UserError, match=r"needs about .* MB of memory .*--no-memory-check"):
        main(["build", str(plan)])
    assert fake.calls == []
    assert main(["build", str(plan), "--no-memory-check"]) == 0


def test_second_build_reuses_engines_until_something_changes(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install("10.3.0", monkeypatch)
    first, _ = build_engine.build(plan)
    count = len(fake.calls)
    assert (build_engine.build(plan), len(fake.calls)) == ((first, False), count)
    assert build_engine.build(plan, BuildOptions(force=True)) == (first, True)
    folders = {first}
    changes: list[tuple[dict[str, str], BuildOptions]] = [
        ({"gpu": "another"}, BuildOptions()),
        ({"sm": "8.9"}, BuildOptions()),
        ({"cuda": "12.8"}, BuildOptions()),
        ({"l4t": "36.5"}, BuildOptions()),
        ({}, BuildOptions(optimization_level=4)),
        ({}, BuildOptions(version_compatible=True)),
    ]
    for facts, options in changes:
        folders.add(build_engine.build(plan, options, {**ORIN, **facts})[0])
    install("10.13.3.9", monkeypatch)
    folders.add(build_engine.build(plan)[0])
    value = json.loads((plan / "build_plan.json").read_text())
    value["engines"]["decoder"]["graph_sha256"] = "0" * 64
    (plan / "build_plan.json").write_text(json.dumps(value))
    folders.add(build_engine.build(plan)[0])
    value["engines"]["decoder"]["profiles"]["decode"]["inputs_embeds"][2][1] += 1
    (plan / "build_plan.json").write_text(json.dumps(value))
    folders.add(build_engine.build(plan)[0])
    assert len(folders) == 1 + len(changes) + 3
    caches = sorted(path.name for path in (plan / "engines").glob("timing-*"))
    assert caches == ["timing-10.13-sm8.7.cache", "timing-10.3-sm8.7.cache", "timing-10.3-sm8.9.cache"]


def test_a_timing_cache_of_another_build_is_started_over(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install("10.3.0", monkeypatch)
    build_engine.build(plan)
    fake.calls.clear()
    fake.timing_fits = False
    build_engine.build(plan, BuildOptions(force=True))
    assert [c for c in fake.calls if "timing_cache" in c[0]] == [
        ("create_timing_cache", b"timings"),
        ("set_timing_cache", False),
        ("create_timing_cache", b""),
        ("set_timing_cache", False),
    ] * 2


def test_a_stopped_build_goes_on(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install("10.3.0", monkeypatch)
    real = build_engine.build_one

    def stopped(trt: Any, root: Path, engine: dict[str, Any], *rest: Any) -> bytes:
        if "decoder" in engine["onnx"]:
            raise KeyboardInterrupt
        return real(trt, root, engine, *rest)

    monkeypatch.setattr(build_engine, "build_one", stopped)
    with pytest.raises(KeyboardInterrupt):
        build_engine.build(plan)
    with pytest.raises(engine_key.Unfit, match=r"decoder\.engine is not built"):
        engine_key.find(plan, json.loads((plan / "build_plan.json").read_text()), "10.3.0", ORIN)
    monkeypatch.setattr(build_engine, "build_one", real)
    fake.calls.clear()
    build_engine.build(plan)
    assert [Path(c[1]).stem for c in fake.calls if c[0] == "build_serialized_network"] == ["decoder"]


def test_of_several_engines_those_asked_for_last_are_taken(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order their folders' names give; asking for finished ones again makes them the last."""
    install("10.3.0", monkeypatch)
    wanted = json.loads((plan / "build_plan.json").read_text())
    options = [build_engine.BuildOptions(optimization_level=level) for level in (1, 3, 5)]
    for number, option in enumerate([*options, options[0], options[1]]):
        folder, _ = build_engine.build(plan, option)
        os.utime(folder / engine_key.RECORD, (number, number))  # builds of this test take less than a tick of the clock
        build_engine.build(plan, option)
        assert engine_key.find(plan, wanted, "10.3.0", ORIN)[0] == folder
        os.utime(folder / engine_key.RECORD, (number, number))
        assert engine_key.find(plan, wanted, "10.3.0", ORIN)[0] == folder


@pytest.mark.parametrize(
    ("version", "said"),
    [("8.6.1", r"8\.6\.1 is too old"), ("12.0.0", r"12\.0\.0 is too new"), ("10.2.0", "10.3 or later")],
)
def test_a_release_outside_the_plan_is_named(
    plan: Path, monkeypatch: pytest.MonkeyPatch, version: str, said: str
) -> None:
    fake = install(version, monkeypatch)
    with pytest.raises(MissingPiece, match=said):
        main(["build", str(plan)])
    assert fake.calls == []


def test_a_full_disk_is_one_line(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("10.3.0", monkeypatch)
    real = build_engine.write

    def full(path: Path, data: bytes) -> None:
        if path.suffix == ".engine":
            raise OSError(28, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(build_engine, "write", full)
    with pytest.raises(UserError, match=r"vision_encoder\.engine: No space left on device; the same command goes on"):
        main(["build", str(plan)])
    assert build_engine.main([str(plan)]) == 2
    monkeypatch.setattr(build_engine, "write", real)
    assert main(["build", str(plan)]) == 0


def test_refusals_of_tensorrt_are_failed_gates(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install("10.3.0", monkeypatch)
    fake.parses = False
    with pytest.raises(GateFailed, match="node 3 is unsupported"):
        main(["build", str(plan)])
    fake.parses, fake.builds = True, False
    with pytest.raises(GateFailed, match=r"could not build onnx/vision_encoder\.onnx"):
        main(["build", str(plan)])
    (log,) = (plan / "engines").glob("*/vision_encoder.log")
    assert "out of tactics" in log.read_text()
    assert not list((plan / "engines").glob("*/engine.json"))


def test_only_tensorrt_artefacts_have_engines(exported: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="gguf artefact"):
        main(["build", str(exported("gguf", "f16", "siglip", "llama").root)])


def test_no_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(engine_key.ctypes, "CDLL", missing)
    with pytest.raises(engine_key.Missing, match=r"libcuda\.so\.1"):
        engine_key.device_facts()
    host, gpu = engine_key.free_memory()
    assert gpu is None
    assert host is None or host > 0


def test_l4t_is_read(tmp_path: Path) -> None:
    release = tmp_path / "nv_tegra_release"
    release.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
    assert engine_key.l4t(release) == "36.4.3"
    assert engine_key.l4t(tmp_path / "none") == ""


@pytest.mark.parametrize(
    ("options", "machine", "fits"),
    [
        ({}, {}, True),
        ({}, {"gpu": "NVIDIA RTX A2000", "sm": "8.6"}, False),
        ({"hardware_compatible": "ampere+"}, {"gpu": "NVIDIA RTX A2000", "sm": "8.6"}, True),
        ({"hardware_compatible": "ampere+"}, {"gpu": "Tesla T4", "sm": "7.5"}, False),
        ({"hardware_compatible": "ampere+"}, {"gpu": "Orin", "sm": "8.7", "l4t": "36.4.3"}, False),
        ({"hardware_compatible": "same-sm"}, {"gpu": "NVIDIA GeForce RTX 4090"}, True),
        ({"hardware_compatible": "same-sm"}, {"gpu": "NVIDIA RTX A2000", "sm": "8.6"}, False),
        ({"version_compatible": True}, {"tensorrt": "10.13.3.9"}, True),
        ({"version_compatible": True}, {"tensorrt": "10.1.0"}, False),
        ({"version_compatible": True}, {"tensorrt": "11.4.0"}, False),
        ({}, {"tensorrt": "10.3.1"}, False),
    ],
)
def test_what_an_engines_own_options_allow(options: dict[str, Any], machine: dict[str, str], fits: bool) -> None:
    built = {"graphs": {}, "profiles": {}, "builder": options, "tensorrt": "10.3.0", **DESKTOP}
    assert (engine_key.differences(built, {**built, "builder": {}, **machine}) == []) == fits
