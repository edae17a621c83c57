"""What a Jetson says about itself: model, L4T and JetPack, power mode, clocks. None on anything else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from runtime.meters import read_number, read_text

# L4T release -> JetPack, from the release notes; the first two numbers decide
JETPACK = {"32.7": "4.6", "35.1": "5.0.2", "35.2": "5.1", "35.3": "5.1.1", "35.4": "5.1.2", "35.5": "5.1.3"}
JETPACK |= {"35.6": "5.1.4", "36.2": "6.0 DP", "36.3": "6.0", "36.4": "6.1 or 6.2", "38.1": "7.0 DP", "38.2": "7.0"}


def jetson(root: Path = Path("/")) -> dict[str, Any] | None:
    """Read the device tree, the L4T release, the power mode and whether clocks are locked (`jetson_clocks`)."""
    model = read_text(root / "proc/device-tree/model")
    release = read_text(root / "etc/nv_tegra_release")
    if release is None and "jetson" not in (model or "").lower():
        return None
    l4t = _l4t(release)
    mode = _power_mode(root)
    return {
        "model": model,
        "l4t": l4t,
        "jetpack": JETPACK.get(".".join(l4t.split(".")[:2])) if l4t else None,
        "nvpmodel": mode,
        "jetson_clocks": _clocks_locked(root),
        "gpu_mhz": _gpu(root, "cur_freq"),
        "gpu_max_mhz": _gpu(root, "max_freq"),
    }


def _l4t(release: str | None) -> str | None:
    match = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", release or "")
    return f"{match[1]}.{match[2]}" if match else None


def _power_mode(root: Path) -> str | None:
    """`pmode:0002` in the status file is a number; the configuration names it."""
    status = read_text(root / "var/lib/nvpmodel/status")
    match = re.search(r"pmode:(\d+)", status or "")
    if not match:
        return None
    number = int(match[1])
    names = re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", read_text(root / "etc/nvpmodel.conf") or "")
    return next((name for found, name in names if int(found) == number), str(number))


def _gpu_folder(root: Path) -> Path | None:
    folders = sorted((root / "sys/class/devfreq").glob("*"))
    return next((f for f in folders if any(part in f.name for part in ("gpu", "ga10b", "gv11b", "gpc"))), None)


def _gpu(root: Path, name: str) -> float | None:
    folder = _gpu_folder(root)
    value = None if folder is None else read_number(folder / name)
    return None if value is None else value / 1e6


def _clocks_locked(root: Path) -> bool | None:
    """`jetson_clocks` sets the lower limit of GPU and processor to the upper one."""
    pairs = []
    if (gpu := _gpu_folder(root)) is not None:
        pairs.append((read_number(gpu / "min_freq"), read_number(gpu / "max_freq")))
    cpu = root / "sys/devices/system/cpu/cpu0/cpufreq"
    pairs.append((read_number(cpu / "scaling_min_freq"), read_number(cpu / "scaling_max_freq")))
    known = [(low, high) for low, high in pairs if low is not None and high is not None]
    return all(low == high for low, high in known) if known else None
