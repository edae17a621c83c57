"""What `distill check` measures: real steps forward and backward at growing batch sizes, their memory and time."""

from __future__ import annotations

import contextlib
import functools
import gc
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.batch import Batch, Normaliser
from distill.check_parts import Finding
from distill.config import TrainConfig
from distill.objective import bounded
from distill.optimizers import estimate_memory
from vlm import allocator

# a step this slow says enough; larger sizes are then calculated
SLOW_STEP = 6.0
Step = Callable[[Batch], dict[str, float]]


@dataclass(frozen=True)
class Point:
    """One batch size: the slower of two steps after a first one, and the peak memory of all three."""

    size: int
    seconds: float
    peak_bytes: int


@dataclass
class Gradients:
    """What came back to the parameters over all steps taken."""

    seen: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    steps: int = 0

    def look(self, model: nn.Module) -> None:
        self.steps += 1
        for name, parameter in model.named_parameters():
            self._note(name, parameter)

    def watch(self, model: nn.Module) -> None:
        """Look at each gradient the moment it is there, before an optimiser drops it; ask before making that one."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._note, name))

    def _note(self, name: str, parameter: torch.Tensor) -> None:
        if parameter.grad is None:
            return
        if not torch.isfinite(parameter.grad).all():
            self.broken.add(name)
        elif parameter.grad.any():
            self.seen.add(name)


class Memory:
    """Peak memory since `reset`, above what was in use when the object was made."""

    def __init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.resettable = self.device == "cpu" and _reset_peak()
        self.base = self.now()

    @property
    def method(self) -> str:
        if self.device == "cuda":
            return "torch.cuda.max_memory_allocated"
        if self.resettable:
            return "peak resident memory of the process (VmHWM), above the level before the models were loaded"
        return (
            "peak resident memory of the process (ru_maxrss, whole life), above the level before the models were loaded"
        )

    @property
    def available(self) -> int:
        """Bytes the device could still give."""
        if self.device == "cuda":
            return int(torch.cuda.mem_get_info()[0]) + int(torch.cuda.memory_reserved())
        with contextlib.suppress(OSError, StopIteration, ValueError):
            lines = Path("/proc/meminfo").read_text().splitlines()
            free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10
            return free + self.now() - self.base
        return 0

    def now(self) -> int:
        if self.device == "cuda":
            return int(torch.cuda.memory_allocated())
        return _status("VmRSS") or _maxrss()

    def reset(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        elif self.resettable:  # or the next size would start from the last one's leftovers
            allocator.give_back()
            _reset_peak()

    def peak(self) -> int:
        if self.device == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return max(0, (_status("VmHWM") if self.resettable else _maxrss()) - self.base)


def _status(name: str) -> int:
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) << 10
    return 0


def _maxrss() -> int:
    import resource
    import sys

    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else value << 10


def _reset_peak() -> bool:
    """Start the kernel's high-water mark anew; False where it cannot be."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return 0 < _status("VmHWM") <= _status("VmRSS") + (64 << 20)


def stepper(
    config: TrainConfig,
    student: nn.Module,
    loss: Callable[[nn.Module, Batch, Normaliser], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    optimizer: torch.optim.Optimizer,
    gradients: Gradients,
) -> Step:
    """One training step on a batch: forward, backward, clipping, optimiser. Returns the terms, loss and norm."""
    device = next(student.parameters()).device.type

    def step(batch: Batch) -> dict[str, float]:
        with torch.autocast(device, torch.bfloat16, enabled=config.bf16):
            total, values = loss(student, batch, Normaliser.of(batch))
        total.backward()
        gradients.look(student)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        terms = bounded({name: float(value) for name, value in values.items()})
        return {"loss": float(total.detach()), **terms, "gradient norm": float(norm)}

    return step


def sizes(batch_size: int) -> Iterator[int]:
    """1, 2, 4 ... and the configured size itself."""
    size = 1
    while size < batch_size:
        yield size
        size *= 2
    yield batch_size


def measure(step: Step, batch_of: Callable[[int], Batch], batch_size: int, memory: Memory) -> tuple[list[Point], str]:
    """Steps at growing sizes until the configured one, a slow step or the memory's end; and why it stopped early."""
    points: list[Point] = []
    for size in sizes(batch_size):
        if len(points) >= 2:
            needed = line(points, "peak_bytes")(size)
            if memory.available and needed > 0.85 * memory.available:
                return points, f"batch size {size} would come near the {_giga(memory.available)} available"
            if points[-1].seconds > SLOW_STEP:
                return points, f"a step takes {points[-1].seconds:.0f} s at batch size {points[-1].size}"
        memory.reset()
        try:
            batch = batch_of(size)
            step(batch)
            times = []
            for _ in range(2):
                started = time.perf_counter()
                step(batch)
                times.append(time.perf_counter() - started)
        except torch.OutOfMemoryError:
            return points, f"out of memory at batch size {size}"
        points.append(Point(size, max(times), memory.peak()))
    return points, ""


def line(points: Sequence[Point], name: str) -> Callable[[int], float]:
    """Measured values where there are, a straight line through the two largest sizes beyond."""
    known = {point.size: float(getattr(point, name)) for point in points}

    def value(size: int) -> float:
        if size in known:
            return known[size]
        if len(points) < 2:
            return known[points[-1].size] * size / points[-1].size
        one, other = points[-2:]
        slope = (known[other.size] - known[one.size]) / (other.size - one.size)
        return known[other.size] + max(slope, 0.0) * (size - other.size)

    return value


def gradient_findings(student: nn.Module, gradients: Gradients, has_images: bool) -> list[Finding]:
    """Non-finite gradients, and parameters that should train and get nothing."""
    found = []
    trainable = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    if gradients.broken:
        found.append(
            Finding(
                "finite gradients", "fail", f"not finite: {_some(sorted(gradients.broken))}; lower lr or use float32"
            )
        )
    else:
        found.append(Finding("finite gradients", "ok", f"{len(trainable)} tensors over {gradients.steps} steps"))
    idle = [name for name in trainable if name not in gradients.seen | gradients.broken]
    unused = unused_tower(student)
    expected = [name for name in idle if unused(name)]
    idle = [name for name in idle if not unused(name)]
    if not has_images:
        visual = [name for name in idle if re.search(r"vision|projector|visual", name)]
        idle = [name for name in idle if name not in visual]
        if visual:
            found.append(
                Finding("visual gradients", "warn", "the data has no image, so tower and projector do not train")
            )
    if idle:
        text = f"{len(idle)} of {len(trainable)} tensors that should train get no gradient: {_some(idle)}"
        found.append(Finding("every parameter learns", "fail", f"{text}; freeze them or mend the model"))
    else:
        aside = f", {len(expected)} behind the tower's feature layer aside" if expected else ""
        found.append(Finding("every parameter learns", "ok", f"all that should train get a gradient{aside}"))
    return found


def unused_tower(model: Any) -> Callable[[str], bool]:
    """Whether a parameter lies behind the tower's feature layer: the model does not use it, by design."""
    config = model.config
    layers = getattr(config, "vision_feature_layer", None)
    if layers is None or not hasattr(config, "vision_config"):
        return lambda _: False
    total = int(getattr(config.vision_config, "num_hidden_layers", 0))
    chosen = [layers] if isinstance(layers, int) else list(layers)
    used = max(layer if layer >= 0 else total + 1 + layer for layer in chosen)

    def unused(name: str) -> bool:
        if "vision" not in name:
            return False
        number = re.search(r"\.layers\.(\d+)\.", name)
        return bool(re.search(r"post_layernorm|\.head\.", name)) or (number is not None and int(number[1]) >= used)

    return unused


def _some(names: Sequence[str], count: int = 3) -> str:
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")


def _giga(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


@dataclass(frozen=True)
class Disk:
    """Bytes the run's folder will take at most while training, and in the end."""

    checkpoint: int
    kept: int
    student: int
    free: int
    best: int = 0

    @property
    def peak(self) -> int:
        # a new checkpoint is written before the oldest goes, a better student before the one it replaces
        return self.checkpoint * (self.kept + 1) + 2 * self.best + self.student

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "peak": self.peak}


def disk(config: TrainConfig, student: nn.Module, kept: int) -> Disk:
    """Sizes calculated from the parameters: float32 weights and the optimiser's state a checkpoint."""
    total = sum(p.numel() for p in student.parameters())
    kept_weights = total if not config.lora.r else sum(p.numel() for p in student.parameters() if p.requires_grad)
    width = {"float32": 4, "float16": 2, "bfloat16": 2}[config.save_dtype]
    saves = -(-config.steps // config.save_every)
    place = config.out.absolute()
    while not place.exists():
        place = place.parent
    return Disk(
        4 * kept_weights + estimate_memory(student, config).state,
        min(kept, saves),
        width * total,
        shutil.disk_usage(place).free,
        4 * kept_weights if config.eval_every and config.keep_best != "none" else 0,
    )
