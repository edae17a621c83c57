"""The few CUDA runtime calls a model needs, through cuda-python: memory, one stream, graphs. No torch.

Addresses are plain integers. Everything taken here is given back by `close`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.api import ModelFailed
from vlm.errors import MissingPiece

ALIGNMENT = 256  # what TensorRT asks of every address
U8 = npt.NDArray[np.uint8]


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def load_cudart() -> Any:
    """cuda-python's runtime module, under its present or its earlier name.

    Raises:
        MissingPiece: not installed, or no CUDA driver behind it.
    """
    try:
        from cuda.bindings import runtime as cudart
    except ImportError:
        try:
            from cuda import cudart
        except ImportError:
            raise MissingPiece("cuda-python is not installed; run `pip install 'align-edge[tensorrt]'`") from None
    return cudart


class Device:
    """GPU 0 and one stream of its own."""

    def __init__(self, cudart: Any) -> None:
        self._rt = cudart
        self._memory: list[int] = []
        self._pinned: list[int] = []
        self._graphs: list[Any] = []
        self._kinds = cudart.cudaMemcpyKind
        self._stream = self._call("cudaStreamCreateWithFlags", cudart.cudaStreamNonBlocking)
        self.stream = int(self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._rt, name)(*arguments)
        if int(error) != 0:
            said = self._rt.cudaGetErrorName(error)[1]
            text = said.decode() if isinstance(said, bytes) else str(said)
            mend = "; load with a smaller --context" if "MemoryAllocation" in text else ""
            raise ModelFailed(f"{name} failed ({text}){mend}")
        return values[0] if values else None

    def malloc(self, nbytes: int) -> int:
        """Zeroed device memory: rows nobody wrote yet are read under a mask, and must be numbers."""
        address = int(self._call("cudaMalloc", max(nbytes, ALIGNMENT)))
        self._memory.append(address)
        self._call("cudaMemsetAsync", address, 0, max(nbytes, ALIGNMENT), self._stream)
        return address

    def pinned(self, nbytes: int) -> U8:
        """Page-locked host memory, which copies need to run beside the host."""
        address = int(self._call("cudaMallocHost", max(nbytes, ALIGNMENT)))
        self._pinned.append(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * max(nbytes, ALIGNMENT)).from_address(address))

    def upload(self, device: int, host: U8, nbytes: int, offset: int = 0) -> None:
        """host[offset:offset + nbytes] -> device + offset, in stream order."""
        source = host.ctypes.data + offset
        self._call("cudaMemcpyAsync", device + offset, source, nbytes, self._kinds.cudaMemcpyHostToDevice, self._stream)

    def download(self, host: U8, device: int, nbytes: int) -> None:
        self._call(
            "cudaMemcpyAsync", host.ctypes.data, device, nbytes, self._kinds.cudaMemcpyDeviceToHost, self._stream
        )

    def copy_rows(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        """`height` pieces of `width` bytes, each a pitch apart, in one call."""
        kind = self._kinds.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", to, to_pitch, source, source_pitch, width, height, kind, self._stream)

    def clear_rows(self, at: int, pitch: int, width: int, height: int) -> None:
        self._call("cudaMemset2DAsync", at, pitch, 0, width, height, self._stream)

    def sync(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)

    def record(self, work: Callable[[], None]) -> Any:
        """What `work` puts on the stream, as a graph that can be launched; nothing of it runs now.

        Raises:
            ModelFailed: something in it cannot be recorded.
        """
        self._call(
            "cudaStreamBeginCapture", self._stream, self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )
        try:
            work()
        except BaseException:
            self._rt.cudaStreamEndCapture(self._stream)  # leaves the stream usable; the first error is the one to tell
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        executable = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        self._graphs.append(executable)
        return executable

    def launch(self, graph: Any) -> None:
        self._call("cudaGraphLaunch", graph, self._stream)

    def close(self) -> None:
        self.sync()
        for graph in self._graphs:
            self._call("cudaGraphExecDestroy", graph)
        for address in self._memory:
            self._call("cudaFree", address)
        for address in self._pinned:
            self._call("cudaFreeHost", address)
        self._graphs, self._memory, self._pinned = [], [], []
        self._call("cudaStreamDestroy", self._stream)
