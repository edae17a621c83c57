"""What machine and which packages: recorded with every profile, shown by `doctor`. Standard library only."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from runtime.jetson import jetson

PACKAGES = (
    "align-edge",
    "numpy",
    "pillow",
    "tokenizers",
    "torch",
    "transformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "llama-cpp-python",
    "tensorrt",
)


def package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """CPU, cores, memory, operating system, interpreter and package versions; null where unknown."""
    return {
        "host": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "usable_cores": usable_cores(),
            "ram_gb": ram_gb(),
            "os": platform.platform(),
            "governor": _first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            "gpu": gpu_name(),
        },
        "jetson": jetson(),
        "python": sys.version.split()[0],
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
    }


def gpu_name() -> str | None:
    """First NVIDIA GPU by the driver's own name; None without driver or library."""
    from runtime.meters import open_nvml

    nvml = open_nvml()
    try:
        return None if nvml is None else str(nvml[0].nvmlDeviceGetName(nvml[1]))
    except Exception:  # NVML's exceptions differ per version
        return None


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.machine()


def usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def ram_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
