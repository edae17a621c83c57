"""What a TensorRT engine is bound to, and which of an artefact's engines fit this machine. Stdlib only.

This file also travels inside the artefact beside `build_engine.py`, so it imports nothing of ours.

Engines live in `engines/KEY/`, where KEY is a hash over the graphs, the profiles, the builder's options, the TensorRT
version, the GPU's name and compute capability, CUDA and, on a Jetson, L4T (which JetPack installs). So one artefact can
carry the engines of several devices, and an engine that was moved is refused before TensorRT sees it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
from pathlib import Path
from typing import Any

FOLDER = "engines"
RECORD = "engine.json"
SM_MAJOR, SM_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
LABELS = {
    "graphs": "graphs",
    "profiles": "profiles",
    "builder": "builder options",
    "tensorrt": "TensorRT",
    "gpu": "GPU",
    "sm": "compute capability",
    "cuda": "CUDA of the driver",
    "l4t": "L4T (JetPack)",
}


class Missing(Exception):
    """This machine lacks TensorRT, a driver or a GPU."""


class Unfit(Exception):
    """The artefact has no engine for this machine; says what each one was built for."""


def device_facts() -> dict[str, str]:
    """Name, compute capability and driver of GPU 0, from the driver library itself.

    Raises:
        Missing: no driver or no GPU.
    """
    cuda = _driver()
    name, version, device = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    if cuda.cuDeviceGet(ctypes.byref(device), 0):
        raise Missing("the CUDA driver finds no GPU")
    cuda.cuDeviceGetName(name, 256, device)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    capability = []
    for attribute in (SM_MAJOR, SM_MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(str(value.value))
    driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return {"gpu": name.value.decode(), "sm": ".".join(capability), "cuda": driver, "l4t": l4t()}


def _driver() -> Any:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise Missing("no CUDA driver (libcuda.so.1); run this on the device with the GPU") from None
    if cuda.cuInit(0):
        raise Missing("the CUDA driver finds no GPU")
    return cuda


def l4t(release: Path = Path("/etc/nv_tegra_release")) -> str:
    """`36.4.3` on a Jetson, empty elsewhere."""
    text = release.read_text() if release.is_file() else ""
    match = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", text)
    return f"{match[1]}.{match[2]}" if match else ""


def free_memory() -> tuple[int | None, int | None]:
    """Bytes free for a new process on the host and on the GPU, None where nobody says."""
    host = gpu = None
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = meminfo.read_text().splitlines()
        host = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    try:
        cuda = _driver()
    except Missing:
        return host, None
    context, device = ctypes.c_void_p(), ctypes.c_int()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    if cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0:
        cuda.cuCtxSetCurrent(context)
        if cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0:
            gpu = free.value
    return host, gpu


def parts_of(plan: dict[str, Any], builder: dict[str, Any], version: str, device: dict[str, str]) -> dict[str, Any]:
    """Everything the engines of a plan depend on."""
    engines = plan["engines"]
    return {
        "graphs": {name: engine["graph_sha256"] for name, engine in engines.items()},
        "profiles": {name: engine["profiles"] for name, engine in engines.items()},
        "builder": builder,
        "tensorrt": version,
        **device,
    }


def digest(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def differences(built: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line per part in which engines and machine disagree beyond what the engines' own options allow."""
    options = built.get("builder", {})
    found = []
    for name, label in LABELS.items():
        was, here = built.get(name), now[name]
        if name == "builder" or was == here or _allowed(name, options, built, now):
            continue
        plain = isinstance(was, str) and isinstance(here, str)
        found.append(f"{label}: built for {was or 'none'}, this is {here or 'none'}" if plain else f"other {label}")
    return found


def _allowed(name: str, options: dict[str, Any], built: dict[str, Any], now: dict[str, Any]) -> bool:
    if name == "tensorrt" and options.get("version_compatible"):
        was, here = (tuple(map(int, parts["tensorrt"].split(".")[:3])) for parts in (built, now))
        return was[0] == here[0] and was <= here
    if name not in ("gpu", "sm") or built.get("l4t") or now["l4t"]:
        return False  # no compatibility level reaches from or to a Jetson
    level = options.get("hardware_compatible")
    if level == "same-sm":
        return name == "gpu"
    return bool(level == "ampere+" and float(now["sm"]) >= 8.0)


def find(root: Path, plan: dict[str, Any], version: str, device: dict[str, str]) -> tuple[Path, dict[str, Any]]:
    """The folder of the engines that fit this machine, whole and unaltered, and their record; of several, those built last.

    Raises:
        Unfit: there is none; says what is there and why it does not fit.
    """
    now = parts_of(plan, plan["builder"], version, device)
    reasons = []
    records = (root / FOLDER).glob(f"*/{RECORD}")
    for path in sorted(records, key=lambda record: (-record.stat().st_mtime_ns, record.parent.name)):
        try:
            record = json.loads(path.read_text())
            lacking = [
                f"{name}.engine is not built" for name in plan["engines"] if f"{name}.engine" not in record["files"]
            ]
            found = differences(record["parts"], now) or lacking or damage(path.parent, record["files"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            found = [f"its {RECORD} is damaged ({type(error).__name__})"]
        if not found:
            return path.parent, record
        reasons.append(f"{path.parent.name} ({'; '.join(found)})")
    raise Unfit("no engine was built yet" if not reasons else f"no engine fits: {', '.join(reasons)}")


def damage(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with the first listed file that is not as it was written."""
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return [f"{name} is missing"]
        if path.stat().st_size != entry["bytes"]:
            return [f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"]
        if sha256(path) != entry["sha256"]:
            return [f"{name} was altered"]
    return []


def sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()
