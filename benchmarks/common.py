"""What every benchmark needs: who measured, peak memory of a call, both sides in turns, one JSON line at the end."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """One comparison; ratio = ours / theirs, n = rounds, spread = quartiles of the ratio of paired rounds.

    `interval`: bootstrap 95 % of the ratio, from `paired` only.
    """

    name: str
    ratio: float
    ours: float
    theirs: float
    unit: str
    n: int
    spread: tuple[float, float]
    interval: tuple[float, float] | None = None


def machine() -> dict[str, Any]:
    """Processor, cores, memory, accelerator and versions."""
    import torch

    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**20, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.is_file() else []


def peak_bytes(call: Callable[[], Any]) -> int:
    """Bytes the process grew by at most during a call, what it left behind included.

    CUDA: the allocator's peak. CPU: the kernel's high-water mark of resident memory, reset before the call.
    """
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def peak_total_bytes(call: Callable[[], Any]) -> int:
    """Most bytes in use during a call, weights and optimiser state included; same methods as `peak_bytes`."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return _status("VmHWM")


def _status(name: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith(name))


def in_turns(
    sides: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call, A B C A B C ..., each round starting with another side.

    Args:
        clock: `time.process_time` counts processor seconds, which other processes on a busy machine lengthen less.
    """
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = clock()
            sides[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                seconds[name].append(clock() - started)
    return seconds


def compare(name: str, ours: list[float], theirs: list[float], unit: str) -> Result:
    """Ratio of medians and the quartiles of the ratio of paired rounds."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    a, b = statistics.median(ours), statistics.median(theirs)
    return Result(name, a / b, a, b, unit, len(ours), (quartiles[0], quartiles[2]))


def paired(name: str, ours: list[float], theirs: list[float], unit: str) -> Result:
    """Median of the ratios of rounds that ran next to each other: what slows both sides of a round cancels.

    The interval resamples rounds (10,000 times, seed 0).
    """
    import numpy as np

    ratios_R = np.asarray(ours) / np.asarray(theirs)
    rng = np.random.default_rng(0)
    drawn_BR = ratios_R[rng.integers(0, len(ratios_R), (10_000, len(ratios_R)))]
    low, high = (float(q) for q in np.quantile(np.median(drawn_BR, axis=1), [0.025, 0.975]))
    quartiles = (float(np.quantile(ratios_R, 0.25)), float(np.quantile(ratios_R, 0.75)))
    a, b = statistics.median(ours), statistics.median(theirs)
    return Result(name, float(np.median(ratios_R)), a, b, unit, len(ours), quartiles, (low, high))


def finish(results: list[Result], settings: Mapping[str, Any], out: Path | None) -> None:
    """Print the results, one JSON line last, and keep it in a file when asked."""
    for r in results:
        low, high = r.spread
        sure = "" if r.interval is None else f", 95 % {r.interval[0]:.3f} to {r.interval[1]:.3f}"
        print(
            f"{r.name}: {r.ratio:.3f}{sure} "
            f"({r.ours:.4g} / {r.theirs:.4g} {r.unit}, n = {r.n}, quartiles {low:.3f} to {high:.3f})"
        )
    save([asdict(r) for r in results], settings, out)


def save(rows: list[dict[str, Any]], settings: Mapping[str, Any], out: Path | None) -> None:
    """One JSON line on stdout, and the same in a file when asked."""
    value = {"rows": rows, "settings": dict(settings), "machine": machine()}
    text = json.dumps(value)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(value, indent=1) + "\n")
    print(text)


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options all benchmarks share."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    made.add_argument("--out", type=Path, help="keep the JSON here too")
    return made
