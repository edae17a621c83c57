"""The decoder graph of an ONNX artefact and its keys and values, which never leave the device.

`GrowingCache` serves every graph: each run's outputs are the next run's inputs, so the runtime copies all of them at each
step. `SharedCache` serves graphs with ONNX Runtime's GroupQueryAttention, which writes into one buffer of full length bound
as input and output alike; what it may read follows from the attention mask.
Shape legend: L = new tokens, P = past tokens, D = hidden, K = key-value heads, E = head width, V = vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.api import Logits

SHARES = b"GroupQueryAttention"
LAST_ONLY = "num_logits_to_keep"
DTYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class Decoder(Protocol):
    """`length` tokens are in the context."""

    length: int

    def append(self, embeds_1LD: npt.NDArray[Any], start: int) -> Logits:
        """Forget the context from token `start` on, take in L more; logits_V after the last."""
        ...


class _Graph:
    """Session, names and the inputs that say where the new tokens stand."""

    def __init__(self, ort: Any, session: Any, device: str, room: int) -> None:
        self._ort, self._session, self._device = ort, session, device
        self._inputs = {node.name: node for node in session.get_inputs()}
        self._pairs = [(name, f"present{name.removeprefix('past_key_values')}") for name in self.past_names(session)]
        self._dtype = DTYPES[self._inputs["inputs_embeds"].type]
        self._mask = np.ones((1, room), np.int64)
        self._positions = np.arange(room, dtype=np.int64)[None]
        self._one = np.asarray(1, np.int64)
        self.length = 0

    @staticmethod
    def past_names(session: Any) -> list[str]:
        return [node.name for node in session.get_inputs() if node.name.startswith("past_key_values.")]

    def _bind(self, binding: Any, embeds_1LD: npt.NDArray[Any], start: int) -> int:
        total = start + embeds_1LD.shape[1]
        binding.bind_cpu_input("inputs_embeds", embeds_1LD.astype(self._dtype, copy=False))
        binding.bind_cpu_input("attention_mask", self._mask[:, :total])
        if "position_ids" in self._inputs:
            binding.bind_cpu_input("position_ids", self._positions[:, start:total])
        return total

    def _empty(self, name: str, length: int) -> npt.NDArray[Any]:
        node = self._inputs[name]
        _, heads, _, width = node.shape
        return np.zeros((1, heads, length, width), DTYPES[node.type])

    def _value(self, array: npt.NDArray[Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device)


class GrowingCache(_Graph):
    """Keys and values [1, K, P, E] that a run takes and gives back longer."""

    def __init__(self, ort: Any, session: Any, device: str, room: int) -> None:
        super().__init__(ort, session, device, room)
        self._values: list[Any] = []

    def append(self, embeds_1LD: npt.NDArray[Any], start: int) -> Logits:
        if start == 0:
            self._values = [self._value(self._empty(past, 0)) for past, _ in self._pairs]
        elif start < self.length:
            # through the host: ONNX Runtime has no view on a part of a value
            self._values = [self._value(value.numpy()[:, :, :start]) for value in self._values]
        binding = self._session.io_binding()
        total = self._bind(binding, embeds_1LD, start)
        if LAST_ONLY in self._inputs:
            binding.bind_cpu_input(LAST_ONLY, self._one)
        binding.bind_output("logits", "cpu")
        for (past, present), value in zip(self._pairs, self._values, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_output(present, self._device)
        self._session.run_with_iobinding(binding)
        logits, *self._values = binding.get_outputs()
        self.length = total
        row: Logits = logits.numpy()[0, -1].astype(np.float32, copy=False)
        return row


class SharedCache(_Graph):
    """Keys and values [1, K, room, E] bound once as input and output; forgetting costs nothing."""

    def __init__(self, ort: Any, session: Any, device: str, room: int, vocabulary: int) -> None:
        super().__init__(ort, session, device, room)
        self._logits_V = np.zeros((1, 1, vocabulary), np.float32)
        self._binding = session.io_binding()
        self._binding.bind_cpu_input(LAST_ONLY, self._one)
        for past, present in self._pairs:
            value = self._value(self._empty(past, room))
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)
        self._binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self._logits_V, "cpu"))

    def append(self, embeds_1LD: npt.NDArray[Any], start: int) -> Logits:
        total = self._bind(self._binding, embeds_1LD, start)
        self._session.run_with_iobinding(self._binding)
        self.length = total
        row: Logits = self._logits_V[0, 0]
        return row


def make_decoder(ort: Any, session: Any, path: Path, device: str, room: int, vocabulary: int) -> Decoder:
    """The cache this graph can work with; the graph file holds operators' names in plain bytes, weights lie beside it."""
    if SHARES in path.read_bytes() and any(node.name == LAST_ONLY for node in session.get_inputs()):
        return SharedCache(ort, session, device, room, vocabulary)
    return GrowingCache(ort, session, device, room)
