"""Buffers that have a shape while a graph is traced, and get their values one at a time while it is written.

A traced graph needs only the shapes of its weights. So the modules of `export.graph` register placeholders without
storage, and the writer asks for each real tensor when its turn comes: peak memory is one matrix, not one model.
Importing this module imports torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SERIAL = itertools.count(1)


@dataclass(frozen=True)
class Held:
    """One tensor to come: `read()` gives its values; `element` is an onnx_ir type name if torch has no such type."""

    read: Callable[[], Any]
    element: str | None = None


def hold(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    read: Callable[[], Any],
    element: str | None = None,
) -> None:
    """Register buffer `name` as a stride-0 placeholder whose values `read` will give.

    Placeholders carry different values, because the exporter merges constants that look the same.
    """
    top = 120 if dtype in (torch.int8, torch.uint8) else 2000
    seed = torch.full((1,) * len(shape), 1 + next(_SERIAL) % top, dtype=dtype)
    module.register_buffer(name, seed.expand(*shape))
    vars(module).setdefault("held", {})[name] = Held(read, element)


def held_tensors(module: nn.Module) -> dict[str, Held]:
    """Full buffer name -> the tensor to come, over all submodules."""
    found: dict[str, Held] = {}
    for prefix, part in module.named_modules():
        for name, item in vars(part).get("held", {}).items():
            found[f"{prefix}.{name}" if prefix else name] = item
    return found


def release(module: nn.Module) -> None:
    """Forget where values come from: torch keeps every traced module, and with it would keep the whole student."""
    for part in module.modules():
        for name in ("held", "recipe", "sources"):
            vars(part).pop(name, None)


def fill(model: Any, module: nn.Module) -> None:
    """Replace the placeholders in a traced onnx_ir model by lazily read tensors."""
    import onnx_ir as ir

    waiting = held_tensors(module)
    for name, value in model.graph.initializers.items():
        if name not in waiting:
            continue
        item = waiting.pop(name)
        element = value.const_value.dtype if item.element is None else ir.DataType[item.element]
        value.const_value = ir.LazyTensor(
            _reader(item, element), dtype=element, shape=value.const_value.shape, name=name
        )
        value.dtype = element
    if waiting:
        raise RuntimeError(f"the traced graph lost the weights {sorted(waiting)[:3]}")


def _reader(item: Held, element: Any) -> Callable[[], Any]:
    import numpy as np
    import onnx_ir as ir

    def read() -> Any:
        values = item.read()
        array = values.detach().numpy() if isinstance(values, Tensor) else values
        return ir.Tensor(np.ascontiguousarray(array), dtype=element)

    return read
