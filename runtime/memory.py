"""Peak memory of a model, on the host and on the accelerator, and how each was read. Absent is None, never 0."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from runtime.jetson import jetson


class DeviceMemory:
    """Most memory the accelerator has held for this process; made before the model is loaded, asked after every request.

    PyTorch knows its own peak. For other libraries NVML's figure for this process is looked at after every request. A
    Jetson has one memory for both sides and NVML says nothing there: what is available to all fell by so much.
    """

    def __init__(self, device: str, root: Path = Path("/"), nvml: tuple[Any, Any] | None = None) -> None:
        self._root, self._nvml = root, nvml
        self.settle(device)
        self._available = available_bytes(root)
        self._peak: int | None = None

    def settle(self, device: str) -> None:
        """The model is loaded, and may have chosen its device itself."""
        self._on = device == "cuda"
        self._board = self._on and jetson(self._root) is not None

    def look(self) -> tuple[int | None, str]:
        """Bytes so far and the method; (None, why not) where nothing tells."""
        if not self._on:
            return None, "the model runs on the processor"
        if (held := torch_bytes()) is not None:
            return held, "torch.cuda.max_memory_allocated"
        if self._board:
            now = available_bytes(self._root)
            fell = None if now is None or self._available is None else max(self._available - now, 0)
            return self._larger(fell), "fall of MemAvailable since before loading, sampled after each request"
        return self._larger(self._process_bytes()), "NVML, this process, sampled after each request"

    def _larger(self, value: int | None) -> int | None:
        if value is not None:
            self._peak = max(value, self._peak or 0)
        return self._peak

    def _process_bytes(self) -> int | None:
        if self._nvml is None:
            return None
        nvml, handle = self._nvml
        try:
            found = [p.usedGpuMemory for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
        except Exception:  # NotSupported is an exception of its own per version
            return None
        return int(found[0]) if found and found[0] is not None else None


def torch_bytes() -> int | None:
    """Most bytes PyTorch held on the GPU; None where it is not in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated())


def available_bytes(root: Path = Path("/")) -> int | None:
    """MemAvailable of the kernel."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def peak_rss() -> tuple[int | None, str]:
    """Largest resident memory this process has had, in bytes, and how it was read.

    VmHWM first: `ru_maxrss` of a child also counts what its parent held before exec.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024, "VmHWM of a process that loads one model"
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None, "not available on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "ru_maxrss of a process that loads one model"
