"""What this machine lets anybody read: memory, heat, power, clocks, memory speed. Absent is None, never 0."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from demo.catalogue import size_text
from runtime.api import Done, ModelInfo
from runtime.clock import Clock, SystemClock
from runtime.energy import MIN_SAMPLES, Recorder
from runtime.environment import cpu_name, gpu_name
from runtime.jetson import jetson
from runtime.latency import Timing
from runtime.meters import HeatProbe, Meter, find_meter, open_nvml, read_text
from runtime.roofline import device_bandwidth, host_bandwidth, last_level_cache, roofline_json, spec_bandwidth

KEPT_S = 0.5  # several pages may ask in the same moment
ROOM_BYTES = 1 << 30  # measuring the memory's speed takes two buffers of 128 MiB a thread
IN_CACHE = "in cache"
NO_METER = "no power or energy meter on this machine, or no right to read it"


@dataclass(frozen=True)
class Reading:
    """One look at the machine."""

    device: str
    memory_total: int | None = None
    memory_free: int | None = None
    own_memory: int | None = None
    celsius: float | None = None
    watts: float | None = None
    power_source: str = ""
    clock_mhz: dict[str, float] = field(default_factory=dict)
    throttled: bool | None = None
    reasons: tuple[str, ...] = ()
    power_mode: str | None = None


@dataclass(frozen=True)
class Figure:
    """A number, or None and the reason why there is none; `instead` is shown in its place."""

    value: float | None
    reason: str = ""
    instead: str = "n/a"


@dataclass(frozen=True)
class Cost:
    """What one answer took of the machine: share of the memory's speed (0..1), joules."""

    mbu: Figure
    joules: Figure


class Instruments:
    """The machine's meters, shared by all pages.

    Args:
        root: where `sys` and `proc` are; a recorded tree stands in for a board.
    """

    def __init__(self, root: Path = Path("/"), clock: Clock | None = None, gpu: bool = False) -> None:
        self.clock: Clock = clock or SystemClock()
        self._root, self._gpu = root, gpu
        self._nvml = open_nvml() if root == Path("/") else None
        # the card and the answers poll from different threads, and a counter remembers what it last read
        self._card_meter, self._meter = self._find_meter(), self._find_meter()
        self._probe = HeatProbe(root, *(self._nvml or (None, None)))
        self._board = jetson(root) or {}
        self._device = str(self._board.get("model") or (gpu_name() if gpu else None) or cpu_name())
        self._lock = threading.Lock()
        self._last: tuple[int, Reading] | None = None
        self._last_joules: tuple[int, float] | None = None
        self._gbs: dict[tuple[str, int], Figure] = {}

    def look(self) -> Reading:
        """The newest reading, at most KEPT_S old."""
        with self._lock:
            now = self.clock.now_ns()
            if self._last is None or now - self._last[0] > KEPT_S * 1e9:
                self._last = now, self._look(now)
            return self._last[1]

    def recorder(self, heat: bool = False) -> Recorder:
        """Of energy, not started. With `heat` also of temperatures, for runs of minutes."""
        probe = HeatProbe(self._root, *(self._nvml or (None, None))) if heat else None
        return Recorder(self.clock, self._find_meter() if heat else self._meter, probe)

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Energy from here to the end of the block."""
        recorder = self.recorder()
        recorder.start()
        try:
            yield recorder
        finally:
            recorder.stop()

    def wants_bandwidth(self, info: ModelInfo) -> bool:
        """True while the memory's speed would tell something about this model and is not known yet."""
        return info.decoder_weight_bytes is not None and (info.device, info.threads) not in self._gbs

    def measure_bandwidth(self, info: ModelInfo) -> None:
        """Half a second of copies on the device the model runs on; nothing else should run meanwhile."""
        self._gbs[info.device, info.threads] = self._bandwidth(info)

    def cost(self, info: ModelInfo, timing: Timing, done: Done, recorder: Recorder | None) -> Cost:
        """What one answer took; every figure that cannot be had says why."""
        return Cost(self._mbu(info, timing), self._joules(done, recorder))

    def _mbu(self, info: ModelInfo, timing: Timing) -> Figure:
        if info.decoder_weight_bytes is None:
            return Figure(None, "this model does not say how many bytes a token reads")
        if timing.tpot_ms is None or timing.prompt_tokens is None:
            return Figure(None, "needs two tokens or more")
        bandwidth = self._gbs.get((info.device, info.threads), Figure(None, "memory speed not measured yet"))
        context = timing.prompt_tokens + (timing.completion_tokens or 0) / 2
        found = roofline_json(
            asdict(info),
            context,
            timing.tpot_ms,
            bandwidth.value,
            spec_bandwidth(self._device),
            last_level_cache(self._root),
            0.0,
            None,
        )
        if found is None or found["mbu_measured"] is None:
            return Figure(None, bandwidth.reason)
        measured = f"{found['achieved_gbs']:.1f} of {bandwidth.value:.1f} GB/s"
        if found["fits_cache"]:
            sizes = f"{size_text(found['bytes_per_token'])} a token, a cache of {size_text(found['last_level_cache_bytes'])}"
            return Figure(None, f"not limited by memory: {sizes} ({measured})", IN_CACHE)
        return Figure(found["mbu_measured"], measured)

    def _joules(self, done: Done, recorder: Recorder | None) -> Figure:
        if recorder is None or recorder.meter is None:
            return Figure(None, NO_METER)
        joules, seconds, samples = recorder.curve.between([(done.received_ns, done.spans[-1].end_ns)])
        if joules is None or samples < MIN_SAMPLES:
            return Figure(None, f"too short: {samples} samples of {recorder.meter.source}, {MIN_SAMPLES} needed")
        return Figure(joules, f"{recorder.meter.source}, {joules / seconds:.1f} W on average, idle power included")

    def _bandwidth(self, info: ModelInfo) -> Figure:
        if info.device == "remote":
            return Figure(None, "the model runs on another machine")
        free = _memory(self._root)[1]
        if free is not None and free < ROOM_BYTES:
            return Figure(None, "too little free memory to measure its speed")
        value = device_bandwidth() if info.device == "cuda" else host_bandwidth(info.threads)
        return Figure(value, "" if value else "memory speed cannot be measured on this device")

    def _find_meter(self) -> Meter | None:
        return find_meter(self._root, self._nvml, self._gpu)

    def _look(self, now_ns: int) -> Reading:
        heat = self._probe.look()
        total, free = _memory(self._root)
        meter = self._card_meter
        return Reading(
            device=self._device,
            memory_total=total,
            memory_free=free,
            own_memory=_own_memory(),
            celsius=heat.celsius,
            watts=None if meter is None else self._watts(meter, now_ns),
            power_source="" if meter is None else meter.source,
            clock_mhz=heat.clock_mhz,
            throttled=heat.throttled,
            reasons=heat.reasons,
            power_mode=self._board.get("nvpmodel"),
        )

    def _watts(self, meter: Meter, now_ns: int) -> float | None:
        """Of a counter: mean power since the last look."""
        if (joules := meter.joules()) is None:
            return meter.watts()
        before, self._last_joules = self._last_joules, (now_ns, joules)
        if before is None or now_ns <= before[0]:
            return None
        return (joules - before[1]) / ((now_ns - before[0]) / 1e9)


def _memory(root: Path) -> tuple[int | None, int | None]:
    """Bytes in total and bytes free for programs."""
    text = read_text(root / "proc/meminfo")
    return _kilobytes(text, "MemTotal"), _kilobytes(text, "MemAvailable")


def _own_memory(proc: Path = Path("/proc")) -> int | None:
    """Resident bytes of this process and of those it started, which run the models."""
    pids = ["self"]
    for path in (proc / "self/task").glob("*/children"):
        pids += (read_text(path) or "").split()
    found = [_kilobytes(read_text(proc / pid / "status"), "VmRSS") for pid in pids]
    return sum(each or 0 for each in found) if found[0] is not None else None


def _kilobytes(text: str | None, name: str) -> int | None:
    for line in (text or "").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
