"""A stand-in for the `tensorrt` module of one release: records calls, and executes engines with ONNX Runtime.

It has the names our code may use and lacks those the release lacks (read from the wheels of 10.3.0, 10.13.3.9 and
11.4.0; `scripts/tensorrt-names` reads them again): touching or setting anything else raises AttributeError. An "engine"
holds the path of its graph, its profiles and its builder options; a context checks shapes against its profile, addresses
against their alignment and their memory, and runs on the stream of `tests.fake_cuda`.
"""

from __future__ import annotations

import ctypes
import enum
import json
import types
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.fake_cuda import FakeCudart

RELEASES = ("10.3.0", "10.13.3.9", "11.4.0.106")
SCRATCH = 4096
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class TensorIOMode(enum.IntEnum):
    NONE, INPUT, OUTPUT = range(3)


class Strategy(enum.IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class CreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def __init__(self, min_severity: Severity = Severity.WARNING) -> None:
        super().__init__()


class Fake:
    """Settings of one stand-in.

    Attributes:
        calls: (name, *arguments) of everything a builder is asked for.
        parses, builds, timing_fits: make a step fail.
        cudart: where engines run.
    """

    def __init__(self, version: str, cudart: FakeCudart | None = None) -> None:
        self.version = version
        self.major, self.minor = (int(part) for part in version.split(".")[:2])
        self.calls: list[tuple[Any, ...]] = []
        self.parses = self.builds = self.timing_fits = True
        self.cudart = cudart or FakeCudart()
        self.executions: list[str] = []
        self.module = self._module()

    def _module(self) -> types.ModuleType:
        old = self.major < 11
        flags = ["VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "REFIT", "TF32"]
        flags += ["FP16", "BF16", "INT8", "OBEY_PRECISION_CONSTRAINTS"] if old else []
        levels = ["NONE", "AMPERE_PLUS"] + (["SAME_COMPUTE_CAPABILITY"] if (self.major, self.minor) > (10, 3) else [])
        module = types.ModuleType("tensorrt")
        contents: dict[str, Any] = {
            "__version__": self.version,
            "ILogger": ILogger,
            "Logger": Logger,
            "Builder": lambda logger: Builder(self, logger),
            "OnnxParser": lambda network, logger: OnnxParser(self, network),
            "Runtime": lambda logger: Runtime(self),
            "NetworkDefinitionCreationFlag": CreationFlag,
            "MemoryPoolType": MemoryPoolType,
            "BuilderFlag": enum.IntEnum("BuilderFlag", flags),
            "HardwareCompatibilityLevel": enum.IntEnum("HardwareCompatibilityLevel", levels),
            "TensorIOMode": TensorIOMode,
            "ExecutionContextAllocationStrategy": Strategy,
        }
        for name, value in contents.items():
            setattr(module, name, value)
        return module


class Builder:
    __slots__ = ("_fake", "logger")

    def __init__(self, fake: Fake, logger: Any) -> None:
        self._fake, self.logger = fake, logger

    @property
    def platform_has_fast_fp16(self) -> bool:
        if self._fake.major >= 11:
            raise AttributeError("platform_has_fast_fp16")
        return True

    def create_network(self, flags: int = 0) -> Network:
        self._fake.calls.append(("create_network", flags))
        return Network(flags)

    def create_builder_config(self) -> BuilderConfig:
        self._fake.calls.append(("create_builder_config",))
        return BuilderConfig(self._fake)

    def create_optimization_profile(self) -> Profile:
        return Profile(self._fake)

    def build_serialized_network(self, network: Network, config: BuilderConfig) -> bytes | None:
        self._fake.calls.append(("build_serialized_network", network.path))
        self.logger.log(Severity.INFO, f"building {network.path}")
        if not self._fake.builds:
            self.logger.log(Severity.ERROR, "out of tactics")
            return None
        assert network.flags & 2 or self._fake.major >= 11, "types in the graph count in strongly typed networks only"
        assert config.workspace, "no workspace"
        content = {
            "onnx": network.path,
            "profiles": [profile.shapes for profile in config.profiles],
            "version": self._fake.version,
            "flags": sorted(int(flag) for flag in config.flags),
        }
        return json.dumps(content).encode()


class Network:
    __slots__ = ("flags", "path")

    def __init__(self, flags: int) -> None:
        self.flags, self.path = flags, ""


class OnnxParser:
    __slots__ = ("_fake", "_network", "num_errors")

    def __init__(self, fake: Fake, network: Network) -> None:
        self._fake, self._network, self.num_errors = fake, network, 0

    def parse_from_file(self, path: str) -> bool:
        self._fake.calls.append(("parse_from_file", path))
        self._network.path = path
        self.num_errors = 0 if self._fake.parses else 1
        return self._fake.parses

    def get_error(self, index: int) -> str:
        assert index < self.num_errors
        return "node 3 is unsupported"


class Profile:
    __slots__ = ("_fake", "shapes")

    def __init__(self, fake: Fake) -> None:
        self._fake, self.shapes = fake, {}

    def set_shape(self, name: str, low: Sequence[int], best: Sequence[int], high: Sequence[int]) -> None:
        assert all(0 < a <= b <= c for a, b, c in zip(low, best, high, strict=True)), (name, low, best, high)
        self._fake.calls.append(("set_shape", name, tuple(low), tuple(best), tuple(high)))
        self.shapes[name] = [list(low), list(best), list(high)]


class TimingCache:
    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data or b"timings"


class BuilderConfig:
    __slots__ = ("_cache", "_fake", "_level", "_optimization", "flags", "profiles", "workspace")

    def __init__(self, fake: Fake) -> None:
        self._fake, self.flags, self.profiles, self.workspace = fake, set(), [], 0

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self._fake.calls.append(("set_memory_pool_limit", pool, size))
        self.workspace = size

    def set_flag(self, flag: Any) -> None:
        self._fake.calls.append(("set_flag", flag.name))
        self.flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._fake.calls.append(("clear_flag", flag.name))

    @property
    def builder_optimization_level(self) -> int:
        return self._optimization

    @builder_optimization_level.setter
    def builder_optimization_level(self, level: int) -> None:
        self._fake.calls.append(("builder_optimization_level", level))
        self._optimization = level

    @property
    def hardware_compatibility_level(self) -> Any:
        return self._level

    @hardware_compatibility_level.setter
    def hardware_compatibility_level(self, level: Any) -> None:
        self._fake.calls.append(("hardware_compatibility_level", level.name))
        self._level = level

    @property
    def int8_calibrator(self) -> None:
        if self._fake.major >= 11:
            raise AttributeError("int8_calibrator")

    def create_timing_cache(self, data: bytes) -> TimingCache:
        self._fake.calls.append(("create_timing_cache", data))
        return TimingCache(data)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        self._fake.calls.append(("set_timing_cache", ignore_mismatch))
        fits = self._fake.timing_fits or not cache.data
        if fits:
            self._cache = cache
        return fits

    def get_timing_cache(self) -> TimingCache:
        return self._cache

    def add_optimization_profile(self, profile: Profile) -> int:
        self._fake.calls.append(("add_optimization_profile",))
        self.profiles.append(profile)
        return len(self.profiles) - 1


class Runtime:
    __slots__ = ("_fake", "engine_host_code_allowed")

    def __init__(self, fake: Fake) -> None:
        self._fake, self.engine_host_code_allowed = fake, False

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        try:
            content = json.loads(data)
        except ValueError:
            return None
        carries = 1 in content["flags"] and self.engine_host_code_allowed
        return Engine(self._fake, content) if content["version"] == self._fake.version or carries else None


class Engine:
    def __init__(self, fake: Fake, content: dict[str, Any]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.fake, self.profiles = fake, content["profiles"]
        self.session = onnxruntime.InferenceSession(content["onnx"], options, providers=["CPUExecutionProvider"])
        self.name = content["onnx"].rpartition("/")[2]
        self.inputs = {port.name: port for port in self.session.get_inputs()}
        self.outputs = {port.name: port for port in self.session.get_outputs()}
        self.num_optimization_profiles = len(self.profiles)
        self.num_io_tensors = len(self.inputs) + len(self.outputs)

    @property
    def device_memory_size(self) -> int:
        if self.fake.major >= 11:
            raise AttributeError("device_memory_size")
        return SCRATCH

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        assert 0 <= index < len(self.profiles)
        return SCRATCH * (index + 1)

    def create_execution_context(self, strategy: Strategy = Strategy.STATIC) -> Context:
        return Context(self, strategy)


class Context:
    __slots__ = ("__weakref__", "_addresses", "_engine", "_profile", "_ran", "_scratch", "_shapes", "_strategy")

    def __init__(self, engine: Engine, strategy: Strategy) -> None:
        self._engine, self._strategy = engine, strategy
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._profile, self._scratch, self._ran = 0, strategy != Strategy.USER_MANAGED, None

    def set_device_memory(self, memory: int, size: int) -> None:
        self._engine.fake.cudart.inside(memory, size, self._engine.fake.cudart.device)
        assert memory % 256 == 0
        self._scratch = size >= SCRATCH * len(self._engine.profiles)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert stream in self._engine.fake.cudart.queues
        self._profile = profile
        return profile < len(self._engine.profiles)

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        low, _, high = self._engine.profiles[self._profile][name]
        if not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0, f"{name} at {address} is not aligned"
        assert name in {**self._engine.inputs, **self._engine.outputs}
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, cudart = self._engine, self._engine.fake.cudart
        if not self._scratch or set(self._addresses) != {*engine.inputs, *engine.outputs}:
            return False
        if set(self._shapes) != set(engine.inputs):
            return False
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        assert stream_handle in cudart.queues, "not a stream, or the default one"
        recording = stream_handle in cudart.capturing
        assert not recording or self._ran == shapes, "recorded before a first run with these shapes"
        alive = weakref.ref(self)

        def work() -> None:
            context = alive()
            assert context is not None or not recording, "the context of a recorded graph is gone"
            assert context is None or context._shapes == shapes or not recording, "a recorded graph's context changed"
            engine.fake.executions.append(engine.name)
            feed = {}
            for name, port in engine.inputs.items():
                dtype = np.dtype(TYPES[port.type])
                nbytes = int(np.prod(shapes[name])) * dtype.itemsize
                cudart.inside(addresses[name], nbytes, cudart.device)
                feed[name] = np.frombuffer(ctypes.string_at(addresses[name], nbytes), dtype).reshape(shapes[name])
            for name, value in zip(engine.outputs, engine.session.run(None, feed), strict=True):
                cudart.inside(addresses[name], value.nbytes, cudart.device)
                ctypes.memmove(addresses[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)

        cudart.put(stream_handle, work)
        if not recording:
            self._ran = shapes
        return True
