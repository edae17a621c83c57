#!/usr/bin/env python3
"""Build TensorRT engines from `build_plan.json` on the device that will run them.

Needs only `tensorrt` (10.3 to 11.x), this file and `engine_key.py`, which travel inside the artefact:

    python build_engine.py [ARTEFACT] [--force] [--optimization-level 0..5] [--workspace-mb N]

Networks are strongly typed: every precision is in the ONNX files. Engines are bound to the GPU, the TensorRT version and
the plan, and lie in a folder of that key; one that is there and whole is not built again. The folder also keeps the
build log and times; timings of kernels are kept beside it for the next build.
Exit codes: 0 built, 1 TensorRT refused, 2 too little memory or a wrong option, 3 TensorRT or a GPU is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    from vlm import engine_key
except ImportError:  # inside an artefact, on a machine without this project
    import engine_key  # type: ignore[import-not-found,no-redef]

PLAN = "build_plan.json"
HARDWARE = ("none", "ampere+", "same-sm")
LEVELS = range(6)
# a builder holds the parsed weights, its own copies and the engine at once
HOST_FACTOR = 4
WORKSPACE_SHARE = 0.5
LEAST_WORKSPACE = 64 << 20


class BuildError(Exception):
    """TensorRT could not parse or build a graph."""


class Refused(Exception):
    """What was asked cannot be done on this machine."""


@dataclass(frozen=True)
class BuildOptions:
    """How to build; None takes what the plan says.

    Attributes:
        workspace_bytes: scratch memory tactics may use; None takes half of what is free.
        version_compatible: engines also run under later TensorRT releases of the same major version; slower.
        hardware_compatible: `ampere+` for every desktop GPU from compute capability 8.0 on, `same-sm` for GPUs of one
            compute capability (TensorRT 10.13 and later); slower, and no way from or to a Jetson.
        check_memory: refuse to start when memory will not do.
    """

    force: bool = False
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    version_compatible: bool | None = None
    hardware_compatible: str | None = None
    check_memory: bool = True

    def builder(self, plan: dict[str, Any]) -> dict[str, Any]:
        """The plan's builder section with these options in place."""
        asked = {
            "optimization_level": self.optimization_level,
            "version_compatible": self.version_compatible,
            "hardware_compatible": self.hardware_compatible,
        }
        return {**plan["builder"], **{name: value for name, value in asked.items() if value is not None}}


def load_tensorrt(plan: dict[str, Any]) -> Any:
    try:
        import tensorrt
    except ImportError:
        raise engine_key.Missing(
            "tensorrt is not installed; on the device run `pip install tensorrt` (a Jetson has it with JetPack)"
        ) from None
    minimum, below = plan["tensorrt"]["minimum"], plan["tensorrt"]["below"]
    if not _version(minimum) <= _version(tensorrt.__version__) < (int(below), 0):
        old = _version(tensorrt.__version__) < _version(minimum)
        why = f"too old; these graphs need {minimum} or later" if old else f"too new; this script knows up to {below}"
        raise engine_key.Missing(f"TensorRT {tensorrt.__version__} is {why}")
    return tensorrt


def read_plan(root: Path) -> dict[str, Any]:
    path = root / PLAN
    try:
        plan: dict[str, Any] = json.loads(path.read_text())
        engines = plan["engines"]
    except FileNotFoundError:
        raise Refused(f"{root} has no {PLAN}; name a folder made with `python -m export --target tensorrt`") from None
    except (ValueError, KeyError, TypeError):
        raise Refused(f"{path} is damaged; copy the whole folder again") from None
    if lacking := [e["onnx"] for e in engines.values() if not (root / e["onnx"]).is_file()]:
        raise Refused(f"{root / lacking[0]} is missing; copy the whole folder again")
    return plan


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def make_logger(trt: Any, lines: list[str]) -> Any:
    """TensorRT's own words: all of them into the log, warnings and errors also onto the screen."""
    severity = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            if level == severity.VERBOSE:
                return
            lines.append(f"{time.strftime('%H:%M:%S')} {level} {message}")
            if level in (severity.WARNING, severity.ERROR, severity.INTERNAL_ERROR):
                print(f"  {message}", file=sys.stderr)

    return Log()


def configure(trt: Any, config: Any, builder: dict[str, Any], workspace: int) -> None:
    """Set the builder's options; precision is none of them."""
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    config.builder_optimization_level = builder["optimization_level"]
    if not builder["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and ten bits of mantissa are not float32
    if builder["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    level = builder["hardware_compatible"]
    if level == "ampere+":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif level == "same-sm":
        if not hasattr(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY"):
            raise Refused(f"TensorRT {trt.__version__} has no level `same-sm`; leave --hardware-compatible out")
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY


def build_one(
    trt: Any, root: Path, engine: dict[str, Any], builder: dict[str, Any], workspace: int, timings: Path, log: list[str]
) -> bytes:
    """Parse one ONNX file and return the serialised engine."""
    logger = make_logger(trt, log)
    maker = trt.Builder(logger)
    # required by 10.x, accepted and ignored by 11.x, where every network is strongly typed
    network = maker.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    # by path, so that the external data file beside it is found
    if not parser.parse_from_file(str(root / engine["onnx"])):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise BuildError(f"TensorRT {trt.__version__} cannot parse {engine['onnx']}: {errors}")
    config = maker.create_builder_config()
    configure(trt, config, builder, workspace)
    old = timings.read_bytes() if timings.is_file() else b""
    cache = config.create_timing_cache(old)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        # damaged, or measured by another build of TensorRT: start over
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    for name, shapes in engine["profiles"].items():
        profile = maker.create_optimization_profile()
        for port, (low, best, high) in shapes.items():
            profile.set_shape(port, low, best, high)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"TensorRT refuses profile {name} of {engine['onnx']}; its messages are above")
    serialised = maker.build_serialized_network(network, config)
    if serialised is None:
        raise BuildError(f"TensorRT could not build {engine['onnx']}; its messages are above")
    write(timings, bytes(config.get_timing_cache().serialize()))
    return bytes(serialised)


def check_memory(plan: dict[str, Any], options: BuildOptions) -> int:
    """The workspace to allow.

    Raises:
        Refused: the larger graph does not fit while it is built.
    """
    host, gpu = engine_key.free_memory()
    weights = max(engine["weight_bytes"] for engine in plan["engines"].values())
    need = HOST_FACTOR * weights
    if options.check_memory and host is not None and host < need:
        raise Refused(
            f"building needs about {need / 1e6:.0f} MB of memory ({HOST_FACTOR} times the weights), {host / 1e6:.0f} MB "
            "are free; stop other programs or add swap, or try with --no-memory-check"
        )
    if options.workspace_bytes is not None:
        return options.workspace_bytes
    free = min(n for n in (host, gpu, 1 << 40) if n is not None)  # on a Jetson both are the same memory
    return max(int(WORKSPACE_SHARE * max(free - need, 0)), LEAST_WORKSPACE)


def write(path: Path, data: bytes) -> None:
    """The whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def build(root: Path, options: BuildOptions | None = None, device: dict[str, str] | None = None) -> tuple[Path, bool]:
    """The folder with every engine of the plan for this machine, and whether it was built now.

    A build that was stopped goes on with the engines it has finished.

    Raises:
        Missing: no TensorRT or no GPU. Refused: an option or the memory. BuildError: TensorRT's own word.
    """
    options = options or BuildOptions()
    plan = read_plan(root)
    trt = load_tensorrt(plan)
    builder = options.builder(plan)
    parts = engine_key.parts_of(plan, builder, trt.__version__, device or engine_key.device_facts())
    if parts["l4t"] and builder["hardware_compatible"] != "none":
        raise Refused("--hardware-compatible does not reach a Jetson; leave it out")
    folder = root / engine_key.FOLDER / engine_key.digest(parts)
    done = _finished(folder, parts)
    if not options.force and set(done) == {f"{name}.engine" for name in plan["engines"]}:
        print(f"{folder.name}: up to date", file=sys.stderr)
        with contextlib.suppress(OSError):  # read-only, or somebody else's
            os.utime(folder / engine_key.RECORD)  # the runtime takes what was asked for last
        return folder, False
    workspace = check_memory(plan, options)
    major_minor = ".".join(map(str, _version(trt.__version__)))
    timings = root / engine_key.FOLDER / f"timing-{major_minor}-sm{parts['sm']}.cache"
    record: dict[str, Any] = {
        "parts": parts,
        "pair_id": plan["pair_id"],
        "workspace_bytes": workspace,
        "files": {} if options.force else done,
        "seconds": {},
    }
    for name, engine in plan["engines"].items():
        if f"{name}.engine" in record["files"]:
            print(f"{name}: finished by an earlier run", file=sys.stderr)
            continue
        print(f"{name}: building (minutes on a small board)", file=sys.stderr, flush=True)
        started, log = time.monotonic(), [f"{name}, workspace {workspace} bytes, {json.dumps(builder)}"]
        try:
            data = build_one(trt, root, engine, builder, workspace, timings, log)
        finally:
            write(folder / f"{name}.log", ("\n".join(log) + "\n").encode())
        target = folder / f"{name}.engine"
        with contextlib.suppress(FileNotFoundError):  # a record must never describe an older engine
            (folder / engine_key.RECORD).unlink()
        write(target, data)
        record["files"][target.name] = {"bytes": len(data), "sha256": engine_key.sha256(target)}
        record["seconds"][name] = round(time.monotonic() - started, 3)
        write(folder / engine_key.RECORD, json.dumps(record, indent=1).encode())
        print(f"{name}: {len(data) / 1e6:.1f} MB in {record['seconds'][name]:.0f} s", file=sys.stderr)
    return folder, True


def _finished(folder: Path, parts: dict[str, Any]) -> dict[str, Any]:
    """Entries of the engines in a folder that are whole."""
    try:
        record = json.loads((folder / engine_key.RECORD).read_text())
    except (OSError, ValueError):
        return {}
    files: dict[str, Any] = record.get("files", {}) if record.get("parts") == parts else {}
    return {name: entry for name, entry in files.items() if not engine_key.damage(folder, {name: entry})}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="build even if engines for this machine are there")
    parser.add_argument(
        "--optimization-level", type=int, choices=LEVELS, metavar="0..5", help="how long to search (default: 3)"
    )
    parser.add_argument("--workspace-mb", type=int, metavar="N", help="scratch memory (default: half of what is free)")
    parser.add_argument(
        "--version-compatible", action="store_true", help="also for later TensorRT of the same major version; slower"
    )
    parser.add_argument("--hardware-compatible", choices=HARDWARE, help="also for other desktop GPUs; slower")
    parser.add_argument("--no-memory-check", action="store_true", help="start although memory looks too small")


def options_of(arguments: argparse.Namespace) -> BuildOptions:
    megabytes = arguments.workspace_mb
    if megabytes is not None and megabytes < 1:
        raise Refused(f"--workspace-mb is {megabytes}; give 1 or more")
    return BuildOptions(
        force=arguments.force,
        optimization_level=arguments.optimization_level,
        workspace_bytes=None if megabytes is None else megabytes << 20,
        version_compatible=arguments.version_compatible or None,
        hardware_compatible=arguments.hardware_compatible,
        check_memory=not arguments.no_memory_check,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the TensorRT engines of this artefact.")
    parser.add_argument("artefact", nargs="?", type=Path, default=Path(__file__).parent)
    add_options(parser)
    arguments = parser.parse_args(argv)
    try:
        folder, _ = build(arguments.artefact, options_of(arguments))
    except (BuildError, Refused, engine_key.Missing) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, engine_key.Missing) else 2 if isinstance(error, Refused) else 1
    except OSError as error:
        print(f"error: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    print(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
