"""Where time comes from: the monotonic clock of the machine, or one that a test moves by hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now_ns(self) -> int: ...

    def wait_ns(self, duration_ns: int) -> None: ...


class SystemClock:
    now_ns = staticmethod(time.perf_counter_ns)

    def wait_ns(self, duration_ns: int) -> None:
        time.sleep(duration_ns / 1e9)


class VirtualClock:
    """Stands still unless told to wait: makes every duration in a test exact."""

    def __init__(self, start_ns: int = 0) -> None:
        self._now_ns = start_ns

    def now_ns(self) -> int:
        return self._now_ns

    def wait_ns(self, duration_ns: int) -> None:
        self._now_ns += duration_ns
