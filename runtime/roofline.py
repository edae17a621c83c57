"""How close decoding comes to the memory's speed, what holds it back, and what would help.

At batch 1 every token reads the decoder's weights and the context's keys and values once, so
tokens/s <= bandwidth / bytes per token; MBU (model bandwidth utilisation) = achieved / possible.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.meters import read_text

COPY_BYTES = 128 << 20
BOUND_FROM = 0.6
UNSTABLE_FROM = 0.05
# GB/s from the makers' data sheets, first match of a part of the device's name
SPEC_GBS: tuple[tuple[str, float], ...] = (
    ("Orin Nano Engineering Reference Developer Kit Super", 102.4),
    ("Orin Nano", 68.0),
    ("Orin NX", 102.4),
    ("AGX Orin", 204.8),
    ("AGX Thor", 273.0),
    ("AGX Xavier", 136.5),
    ("Xavier NX", 59.7),
    ("RTX 4060", 272.0),
    ("RTX 4090", 1008.0),
    ("A100", 2039.0),
    ("H100", 3350.0),
    ("H200", 4800.0),
)


@dataclass(frozen=True)
class Verdict:
    """`name` is one of bandwidth_bound, launch_bound, cache_resident, unstable, throttled, unknown."""

    name: str
    text: str


def spec_bandwidth(device: str) -> float | None:
    """Data-sheet GB/s of a device by name; None if it is not in the table."""
    return next((value for part, value in SPEC_GBS if part.lower() in device.lower()), None)


def host_bandwidth(threads: int, seconds: float = 0.5, clock: Callable[[], float] = time.perf_counter) -> float:
    """GB/s of plain copies by `threads` threads, bytes read plus bytes written."""
    together = threading.Barrier(threads)

    def run(_: int) -> tuple[int, float, float]:
        source, target = np.ones(COPY_BYTES, np.uint8), np.empty(COPY_BYTES, np.uint8)
        np.copyto(target, source)  # the pages exist from now on
        together.wait()
        copied, started = 0, clock()
        while clock() - started < seconds:
            np.copyto(target, source)
            copied += 2 * COPY_BYTES
        return copied, started, clock()

    with ThreadPoolExecutor(threads) as pool:
        done = list(pool.map(run, range(threads)))
    wall = max(stopped for _, _, stopped in done) - min(started for _, started, _ in done)
    return sum(copied for copied, _, _ in done) / wall / 1e9


def device_bandwidth(seconds: float = 0.5) -> float | None:
    """GB/s of copies on the CUDA device through PyTorch; None without it."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    source = torch.ones(4 * COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    copied, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(8):
            target.copy_(source)
        torch.cuda.synchronize()
        copied += 16 * source.numel()
    return copied / (time.perf_counter() - started) / 1e9


def last_level_cache(root: Path = Path("/")) -> int | None:
    """Bytes of the largest cache one core reaches."""
    best = None
    for index in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*"):
        size, kind = read_text(index / "size"), read_text(index / "type")
        if size and kind != "Instruction" and size[:-1].isdecimal() and size[-1] in "KM":
            value = int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
            best = value if best is None else max(best, value)
    return best


def roofline_json(
    model: dict[str, Any],
    mean_context: float,
    tpot_ms: float | None,
    measured_gbs: float | None,
    spec_gbs: float | None,
    cache_bytes: int | None,
    tpot_cv: float,
    throttled_s: float | None,
) -> dict[str, Any] | None:
    """The `roofline` section; None where the artefact does not say how many bytes a token reads."""
    weights, kv = model.get("decoder_weight_bytes"), model.get("kv_bytes_per_token")
    if weights is None or tpot_ms is None:
        return None
    per_token = weights + (kv or 0) * mean_context
    achieved = per_token / (tpot_ms / 1000) / 1e9
    mbu = achieved / measured_gbs if measured_gbs else None
    head = model.get("lm_head_bytes")
    share = head / weights if head else None
    fits = cache_bytes is not None and per_token <= cache_bytes and model.get("device") == "cpu"
    found = verdict(mbu, fits, tpot_cv, throttled_s, share, str(model.get("device")), str(model.get("backend")))
    return {
        "bytes_per_token": per_token,
        "achieved_gbs": achieved,
        "bw_measured_gbs": measured_gbs,
        "bw_spec_gbs": spec_gbs,
        "mbu_measured": mbu,
        "mbu_spec": achieved / spec_gbs if spec_gbs else None,
        "bound_tok_s": measured_gbs * 1e9 / per_token if measured_gbs else None,
        "lm_head_share": share,
        "last_level_cache_bytes": cache_bytes,
        "fits_cache": fits,
        "prefill_mfu": None,
        "verdict": found.name,
        "remedy": found.text,
    }


def verdict(
    mbu: float | None,
    fits_cache: bool,
    tpot_cv: float,
    throttled_s: float | None,
    head: float | None,
    device: str,
    backend: str = "",
) -> Verdict:
    """One line in the manner of trtexec: what bounds decoding, and what to do about it."""
    if throttled_s:
        return Verdict("throttled", f"throttled for {throttled_s:.0f} s: cool the board or choose a lower power mode")
    if tpot_cv > UNSTABLE_FROM:
        return Verdict("unstable", f"unstable: TPOT varies by {100 * tpot_cv:.0f} %; lock the clocks, stop other work")
    if mbu is None:
        return Verdict("unknown", "bandwidth not measured on this device")
    percent = f"{100 * mbu:.0f} % of measured bandwidth"
    if fits_cache:
        return Verdict(
            "cache_resident", f"{percent}: weights fit the processor's cache, so memory speed is not the limit here"
        )
    if mbu >= BOUND_FROM:
        share = "" if head is None else f" (the output head alone is {100 * head:.0f} % of them)"
        return Verdict("bandwidth_bound", f"bandwidth-bound ({percent}): fewer bytes per token help{share}")
    help_ = "fewer, larger operators or more threads help"
    if device == "cuda":  # PyTorch here and llama.cpp replay their steps as CUDA graphs already
        help_ = "use CUDA graphs" if backend not in ("torch", "gguf") else "fewer, larger kernels help"
    return Verdict("launch_bound", f"launch-bound ({percent}): {help_}; smaller weights will not")
