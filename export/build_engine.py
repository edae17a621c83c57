#!/usr/bin/env python3
"""Build TensorRT engines from `build_plan.json` on the device that will run them.

Needs only `tensorrt` (10.3 to 11.x) and this file, which also travels inside the artefact:

    python build_engine.py [ARTEFACT] [--force]

Networks are strongly typed: every precision is in the ONNX files. Engines are bound to the GPU, the TensorRT version
and the plan; the key next to each engine says which, and an engine whose key still fits is not built again.
Exit codes: 0 built, 1 TensorRT refused, 3 TensorRT or a GPU is missing.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

PLAN = "build_plan.json"
SM_MAJOR, SM_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


class BuildError(Exception):
    """TensorRT could not parse or build a graph."""


class Missing(Exception):
    """This machine lacks TensorRT or a GPU."""


def load_tensorrt(minimum: str) -> Any:
    try:
        import tensorrt
    except ImportError:
        raise Missing("tensorrt is not installed; on the device run `pip install tensorrt`") from None
    if _version(tensorrt.__version__) < _version(minimum):
        raise Missing(f"TensorRT {tensorrt.__version__} is too old; these graphs need {minimum} or later")
    return tensorrt


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def device_facts() -> dict[str, str]:
    """Name, compute capability and driver of GPU 0, from the driver library itself."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise Missing("no CUDA driver (libcuda.so.1); run this on the device with the GPU") from None
    name, version, device = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        raise Missing("the CUDA driver finds no GPU")
    cuda.cuDeviceGetName(name, 256, device)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    capability = []
    for attribute in (SM_MAJOR, SM_MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(str(value.value))
    release = Path("/etc/nv_tegra_release")
    l4t = release.read_text().splitlines()[0] if release.is_file() else ""
    return {"gpu": name.value.decode(), "sm": ".".join(capability), "cuda": str(version.value), "l4t": l4t}


def engine_key(
    plan: dict[str, Any], engine: dict[str, Any], trt_version: str, device: dict[str, str]
) -> dict[str, Any]:
    """Everything an engine depends on, and the hash of it."""
    parts = {
        "graph": engine["graph_sha256"],
        "profiles": engine["profiles"],
        "builder": plan["builder"],
        "tensorrt": trt_version,
        **device,
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return {**parts, "key": digest}


def build_one(trt: Any, root: Path, plan: dict[str, Any], engine: dict[str, Any]) -> bytes:
    """Parse one ONNX file and return the serialised engine."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # required by 10.x, accepted and ignored by 11.x, where every network is strongly typed
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    # by path, so that the external data file beside it is found
    if not parser.parse_from_file(str(root / engine["onnx"])):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise BuildError(f"TensorRT cannot parse {engine['onnx']}: {errors}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan["builder"]["workspace_bytes"])
    config.builder_optimization_level = plan["builder"]["optimization_level"]
    cache_file = root / plan["timing_cache"]
    old = cache_file.read_bytes() if cache_file.is_file() else b""
    cache = config.create_timing_cache(old)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        # measured by another version or on another GPU: start over
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    for shapes in engine["profiles"].values():
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in shapes.items():
            profile.set_shape(name, low, best, high)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"TensorRT refuses a profile of {engine['onnx']}")
    serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        raise BuildError(f"TensorRT could not build {engine['onnx']}; its messages are above")
    write(cache_file, bytes(config.get_timing_cache().serialize()))
    return bytes(serialised)


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def build(root: Path, force: bool = False, device: dict[str, str] | None = None) -> list[Path]:
    """Build every engine of the plan that is missing or whose key no longer fits; returns all engine files."""
    plan = json.loads((root / PLAN).read_text())
    trt = load_tensorrt(plan["tensorrt"]["minimum"])
    facts = device or device_facts()
    built = []
    for name, engine in plan["engines"].items():
        target, key_file = root / engine["engine"], root / f"{engine['engine']}.json"
        key = engine_key(plan, engine, trt.__version__, facts)
        built.append(target)
        if not force and target.is_file() and key_file.is_file() and json.loads(key_file.read_text()) == key:
            print(f"{name}: up to date", file=sys.stderr)
            continue
        print(f"{name}: building (minutes on a small board)", file=sys.stderr, flush=True)
        data = build_one(trt, root, plan, engine)
        key_file.unlink(missing_ok=True)  # a key must never describe an older engine
        write(target, data)
        write(key_file, json.dumps(key, indent=1).encode())
    return built


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the TensorRT engines of this artefact.")
    parser.add_argument("artefact", nargs="?", type=Path, default=Path(__file__).parent)
    parser.add_argument("--force", action="store_true", help="build even if the key of an engine still fits")
    arguments = parser.parse_args()
    try:
        for path in build(arguments.artefact, arguments.force):
            print(path)
    except (BuildError, Missing) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, Missing) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
