"""Samples of a meter over time -> joules in a window, watts at rest, seconds throttled."""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.clock import Clock
from runtime.meters import Heat, HeatProbe, Meter

POLL_NS = 20_000_000
MIN_WINDOW_S = 10.0
MIN_SAMPLES = 20
S = 1e9
Window = tuple[int, int]


@dataclass
class Curve:
    """Joules used since the first sample: of a counter its own reading, of a power meter the trapezoids under it."""

    times_ns: list[int] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    _watts: list[float] = field(default_factory=list)

    def add_watts(self, t_ns: int, watts: float) -> None:
        if self.times_ns:
            seconds = (t_ns - self.times_ns[-1]) / S
            self.joules.append(self.joules[-1] + (watts + self._watts[-1]) / 2 * seconds)
        else:
            self.joules.append(0.0)
        self.times_ns.append(t_ns)
        self._watts.append(watts)

    def add_joules(self, t_ns: int, joules: float) -> None:
        self.times_ns.append(t_ns)
        self.joules.append(joules)

    def at(self, t_ns: int) -> float | None:
        """Joules at a moment, with power (or the counter) on a straight line between samples; None outside them."""
        right = bisect.bisect_left(self.times_ns, t_ns)
        if right == len(self.times_ns):
            return None
        if self.times_ns[right] == t_ns:
            return self.joules[right]
        if right == 0:
            return None
        t0, t1 = self.times_ns[right - 1], self.times_ns[right]
        j0, j1 = self.joules[right - 1], self.joules[right]
        part = (t_ns - t0) / (t1 - t0)
        if not self._watts:
            return j0 + (j1 - j0) * part
        w0, w1 = self._watts[right - 1], self._watts[right]
        return j0 + (w0 + (w1 - w0) * part / 2) * (t_ns - t0) / S

    def between(self, windows: Sequence[Window]) -> tuple[float | None, float, int]:
        """Joules over all windows (None where a sample is missing), their seconds, and the samples inside them."""
        total, seconds, samples = 0.0, 0.0, 0
        for start, stop in windows:
            first, last = self.at(start), self.at(stop)
            if first is None or last is None:
                return None, 0.0, 0
            total += last - first
            seconds += (stop - start) / S
            samples += bisect.bisect_right(self.times_ns, stop) - bisect.bisect_left(self.times_ns, start)
        return total, seconds, samples


@dataclass
class Recorder:
    """Polls a meter and a heat probe; by hand in tests, on a thread of its own otherwise."""

    clock: Clock
    meter: Meter | None
    probe: HeatProbe | None
    curve: Curve = field(default_factory=Curve)
    heat: list[tuple[int, Heat]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def poll(self) -> None:
        if self.meter is not None:
            watts, joules, now = self.meter.watts(), self.meter.joules(), self.clock.now_ns()
            if joules is not None:
                self.curve.add_joules(now, joules)
            elif watts is not None:
                self.curve.add_watts(now, watts)

    def look(self) -> None:
        """Temperatures and clocks: a few times a second is enough."""
        if self.probe is not None:
            self.heat.append((self.clock.now_ns(), self.probe.look()))

    def start(self) -> None:
        if self.meter is None and self.probe is None:
            return

        def run() -> None:
            while not self._stop.wait(POLL_NS / S):
                self.poll()
                if not self.heat or self.clock.now_ns() - self.heat[-1][0] >= 10 * POLL_NS:
                    self.look()

        self.poll()
        self.look()
        self._thread = threading.Thread(target=run, daemon=True, name="meters")
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self.poll()
            self.look()
            self._thread = None


def idle_watts(curve: Curve, window: Window) -> float | None:
    """Mean power while nothing ran; None with fewer than two samples."""
    joules, seconds, samples = curve.between([window])
    return joules / seconds if joules is not None and seconds > 0 and samples >= 2 else None


def energy_json(
    recorder: Recorder, windows: Sequence[Window], idle_w: float | None, requests: int, tokens: int, images: int
) -> tuple[dict[str, Any] | None, str]:
    """The `energy` section of a profile, or None and the reason.

    `net` says whether the energy of an idle machine over the same time was taken off.
    """
    if recorder.meter is None:
        return None, "no power or energy meter on this machine (or no right to read it)"
    joules, seconds, samples = recorder.curve.between(windows)
    if joules is None:
        return None, f"{recorder.meter.source} gave no reading over the whole run"
    if seconds < MIN_WINDOW_S or samples < MIN_SAMPLES:
        return None, (
            f"too short for a figure: {seconds:.1f} s and {samples} samples of {recorder.meter.source}, "
            f"{MIN_WINDOW_S:.0f} s and {MIN_SAMPLES} needed; ask for more --requests"
        )
    used = joules - (idle_w or 0.0) * seconds
    return {
        "source": recorder.meter.source,
        "samples": samples,
        "window_s": seconds,
        "idle_w": idle_w,
        "mean_w": joules / seconds,
        "j_per_request": used / requests if requests else None,
        "j_per_output_token": used / tokens if tokens else None,
        "j_per_image": used / images if images else None,
        "net": idle_w is not None,
    }, ""


def thermal_json(heat: Sequence[tuple[int, Heat]]) -> dict[str, Any]:
    """The `thermal` section: temperatures, seconds throttled (null where nothing would tell), clocks."""
    degrees = [look.celsius for _, look in heat if look.celsius is not None]
    known = any(look.throttled is not None for _, look in heat)
    throttled_ns = sum(t - before for (before, _), (t, look) in itertools.pairwise(heat) if look.throttled)
    clocks: dict[str, float | None] = {"gpu_min": None, "gpu_mean": None, "emc": None, "cpu_mean": None}
    series = {
        name: [look.clock_mhz[name] for _, look in heat if name in look.clock_mhz] for name in ("gpu", "emc", "cpu")
    }
    if series["gpu"]:
        clocks.update(gpu_min=min(series["gpu"]), gpu_mean=sum(series["gpu"]) / len(series["gpu"]))
    if series["emc"]:
        clocks["emc"] = series["emc"][-1]
    if series["cpu"]:
        clocks["cpu_mean"] = sum(series["cpu"]) / len(series["cpu"])
    return {
        "start_c": degrees[0] if degrees else None,
        "max_c": max(degrees) if degrees else None,
        "throttled_s": throttled_ns / S if known else None,
        "reasons": list(dict.fromkeys(reason for _, look in heat for reason in look.reasons)),
        "clock_mhz": clocks,
    }
