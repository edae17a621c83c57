"""A TensorRT engine and its execution contexts, one per profile and one per recorded graph, in shared scratch memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.api import ModelFailed
from runtime.cuda import Device
from vlm.errors import ArtifactError


class TrtEngine:
    """One deserialised engine.

    Attributes:
        profiles: name -> index, in the order the plan lists them.
        scratch_bytes: what its contexts need; they never run at the same time, so one buffer serves them all.
    """

    def __init__(self, trt: Any, runtime: Any, path: Path, profiles: Mapping[str, Any]) -> None:
        self._trt, self._path = trt, path
        self._engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ArtifactError(f"{path} cannot be loaded by TensorRT {trt.__version__}; build it again with --force")
        self.profiles = {name: index for index, name in enumerate(profiles)}
        if self._engine.num_optimization_profiles != len(self.profiles):
            raise ArtifactError(
                f"{path} has {self._engine.num_optimization_profiles} profiles, the plan {len(profiles)}"
            )
        self.scratch_bytes = max(self._engine.get_device_memory_size_for_profile_v2(i) for i in self.profiles.values())

    def check(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Hold the engine's tensors against what the manifest declares.

        Raises:
            ArtifactError: a name is missing or one too many.
        """
        engine, modes = self._engine, self._trt.TensorIOMode
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        have = {mode: {n for n in names if engine.get_tensor_mode(n) == mode} for mode in (modes.INPUT, modes.OUTPUT)}
        for mode, wanted in ((modes.INPUT, inputs), (modes.OUTPUT, outputs)):
            if odd := sorted(have[mode] ^ set(wanted)):
                raise ArtifactError(f"{self._path}: tensor {odd[0]!r} is not as the manifest says; build it again")

    def context(self, profile: str, device: Device, scratch: int, scratch_bytes: int) -> Context:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        made = self._engine.create_execution_context(strategy)
        if made is None:
            raise ModelFailed(f"TensorRT could not make a context of {self._path.name}; is GPU memory free?")
        made.set_device_memory(scratch, scratch_bytes)
        _must(made.set_optimization_profile_async(self.profiles[profile], device.stream), f"choose profile {profile}")
        device.sync()
        return Context(made, device)

    def close(self) -> None:
        self._engine = None


class Context:
    """One execution context; calls that change nothing are not made again."""

    def __init__(self, context: Any, device: Device) -> None:
        self._context, self._device = context, device
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def bind(self, name: str, address: int, shape: tuple[int, ...] | None = None) -> None:
        """Address of a tensor, and its shape if it is an input."""
        if shape is not None and self._shapes.get(name) != shape:
            _must(self._context.set_input_shape(name, shape), f"take {name} as {shape}")
            self._shapes[name] = shape
        if self._addresses.get(name) != address:
            _must(self._context.set_tensor_address(name, address), f"take an address for {name}")
            self._addresses[name] = address

    def enqueue(self) -> None:
        _must(self._context.execute_async_v3(self._device.stream), "run")


def _must(done: bool, what: str) -> None:
    if not done:
        raise ModelFailed(f"TensorRT did not {what}; its messages are above")
