"""A stand-in for cuda-python's runtime that holds real memory and keeps CUDA's promises, no more.

Work on a stream happens when somebody waits for it, never before: host memory that is overwritten too early, or read too
early, shows. Device memory starts as NaN. Every address is checked against what was allocated. Recording collects work
instead of doing it.
"""

from __future__ import annotations

import ctypes
import enum
import types
from collections.abc import Callable
from typing import Any

import numpy as np


class cudaError_t(enum.IntEnum):  # noqa: N801 - CUDA's own names
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(enum.IntEnum):  # noqa: N801
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):  # noqa: N801
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


OK = cudaError_t.cudaSuccess
Work = Callable[[], None]


class Stream(int):
    """A handle; like cuda-python's, it turns into an int."""


class FakeCudart:
    """The module.

    Attributes:
        capacity: device bytes that can be taken.
        records: whether streams can be captured.
        calls: names in order.
    """

    cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode = cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode
    cudaStreamNonBlocking = 1

    def __init__(self, capacity: int = 1 << 30, records: bool = True) -> None:
        self.capacity, self.records = capacity, records
        self.calls: list[str] = []
        self.device: dict[int, tuple[int, Any]] = {}
        self.host: dict[int, tuple[int, Any]] = {}
        self.queues: dict[int, list[Work]] = {}
        self.capturing: dict[int, list[Work]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self._serial = 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cuda") and isinstance(getattr(type(self), name, None), types.FunctionType):
            object.__getattribute__(self, "calls").append(name)
        return object.__getattribute__(self, name)

    def _next(self) -> int:
        self._serial += 1
        return self._serial

    @staticmethod
    def _block(size: int) -> tuple[int, Any]:
        raw = np.full(size + 256, 0xFF, np.uint8)
        return -(-raw.ctypes.data // 256) * 256, raw

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if size + sum(n for n, _ in self.device.values()) > self.capacity:
            return cudaError_t.cudaErrorMemoryAllocation, None
        address, raw = self._block(size)
        self.device[address] = (size, raw)
        return OK, address

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        address, raw = self._block(size)
        self.host[address] = (size, raw)
        return OK, address

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        del self.device[address]
        return (OK,)

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        del self.host[address]
        return (OK,)

    def inside(self, address: int, nbytes: int, table: dict[int, tuple[int, Any]]) -> None:
        assert any(start <= address and address + nbytes <= start + size for start, (size, _) in table.items()), (
            f"{nbytes} bytes at {address} are not memory that was allocated"
        )

    def put(self, stream: int, work: Work) -> None:
        self.capturing.get(stream, self.queues[stream]).append(work)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        handle = Stream(self._next())
        self.queues[handle] = []
        return OK, handle

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        del self.queues[stream]
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        if stream in self.capturing:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        work, self.queues[stream] = self.queues[stream], []
        for piece in work:
            piece()
        return (OK,)

    def cudaMemcpyAsync(self, to: int, source: int, count: int, kind: int, stream: int) -> tuple[Any, ...]:
        tables = {1: (self.device, self.host), 2: (self.host, self.device), 3: (self.device, self.device)}[int(kind)]
        self.inside(to, count, tables[0])
        self.inside(source, count, tables[1])
        self.put(stream, lambda: ctypes.memmove(to, source, count) and None)
        return (OK,)

    def cudaMemcpy2DAsync(
        self, to: int, to_pitch: int, source: int, pitch: int, width: int, height: int, kind: int, stream: int
    ) -> tuple[Any, ...]:
        assert int(kind) == 3
        if width > min(to_pitch, pitch):
            return (cudaError_t.cudaErrorInvalidValue,)
        for row in range(height):
            self.cudaMemcpyAsync(to + row * to_pitch, source + row * pitch, width, 3, stream)
            self.calls.pop()
        return (OK,)

    def cudaMemsetAsync(self, address: int, value: int, count: int, stream: int) -> tuple[Any, ...]:
        self.inside(address, count, self.device)
        self.put(stream, lambda: ctypes.memset(address, value, count) and None)
        return (OK,)

    def cudaMemset2DAsync(
        self, address: int, pitch: int, value: int, width: int, height: int, stream: int
    ) -> tuple[Any, ...]:
        for row in range(height):
            self.cudaMemsetAsync(address + row * pitch, value, width, stream)
            self.calls.pop()
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:
        if not self.records:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        self.capturing[stream] = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        handle = self._next()
        self.graphs[handle] = self.capturing.pop(stream)
        return OK, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        handle = self._next()
        self.graphs[handle] = list(self.graphs[graph])
        return OK, handle

    def cudaGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        del self.graphs[graph]
        return (OK,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Any, ...]:
        del self.graphs[graph]
        return (OK,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any, ...]:
        for piece in self.graphs[graph]:
            self.put(stream, piece)
        return (OK,)

    def cudaGetErrorName(self, error: int) -> tuple[Any, ...]:
        return OK, cudaError_t(error).name.encode()
