"""`load`: artefact or checkpoint directory -> Engine, by the format the manifest states, never by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.api import Backend
from runtime.engine import Engine
from runtime.options import LoadOptions, options_from
from vlm.errors import UserError

BACKENDS = ("torch", "onnx", "gguf", "tensorrt", "fake")


def load(artifact: str | Path, backend: str = "auto", **options: Any) -> Engine:
    """Check an artefact's files, load it and start its worker.

    Args:
        artifact: directory with a manifest.json, or a LLaVA checkpoint directory (PyTorch).
        backend: one of BACKENDS, or `auto`: the manifest's format, `torch` for a checkpoint.
        options: fields of `runtime.options.LoadOptions` (threads, device, context, queue_size).

    Raises:
        UserError: unknown backend or option, or the backend does not run this format.
        ArtifactError: a file is missing, truncated or altered (named).
        MissingPiece: a package is not installed; the message has the pip command.
    """
    chosen = options_from(options)
    if backend not in ("auto", *BACKENDS):
        raise UserError(f"unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
    if backend == "fake":
        return Engine(_fake(Path(artifact)), queue_size=chosen.queue_size)
    raise UserError(f"backend {backend!r} is not available yet")


def _fake(artifact: Path) -> Backend:
    from runtime.backend_fake import FakeBackend

    return FakeBackend(name=artifact.name)


Opener = Callable[[Path, LoadOptions], Backend]
