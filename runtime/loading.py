"""`load`: artefact or checkpoint directory -> Engine, by the format the manifest states, never by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image as Pillow

from runtime.api import Backend, StreamBackend
from runtime.engine import Engine
from runtime.options import LoadOptions, options_from
from vlm.errors import UserError
from vlm.manifest import NAME, read_manifest

BACKENDS = ("torch", "onnx", "gguf", "tensorrt", "openai", "fake")
ADDRESSES = ("http://", "https://")


def load(artifact: str | Path, backend: str = "auto", **options: Any) -> Engine:
    """Check an artefact's files, load it and start its worker.

    Args:
        artifact: directory with a manifest.json, a LLaVA checkpoint directory (PyTorch), or the address of an
            OpenAI-compatible server.
        backend: one of BACKENDS, or `auto`: the manifest's format, `torch` for a checkpoint, `openai` for an address.
        options: fields of `runtime.options.LoadOptions` (threads, device, context, queue_size, ...).

    Raises:
        UserError: unknown backend or option, or the backend does not run this format.
        ArtifactError: a file is missing, truncated or altered (named).
        MissingPiece: a package is not installed; the message has the pip command.
    """
    chosen = options_from(options)
    if backend not in ("auto", *BACKENDS):
        raise UserError(f"unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
    Pillow.preinit()  # its decoders load on first use otherwise: the first request would pay for it
    if backend == "fake":
        return engine_of(_fake(Path(artifact), chosen), chosen)
    is_address = str(artifact).startswith(ADDRESSES)
    if is_address != (backend == "openai") and backend != "auto":
        raise UserError(f"backend openai takes an address and nothing else does; got {artifact}; use `--backend auto`")
    if is_address:
        from runtime.backend_openai import open_url

        return engine_of(open_url(str(artifact), chosen), chosen)
    return engine_of(open_backend(Path(artifact), backend, chosen), chosen)


def engine_of(backend: Backend | StreamBackend, options: LoadOptions) -> Engine:
    """A backend that is loaded -> its engine."""
    return Engine(
        backend,
        queue_size=options.queue_size,
        image_cache_bytes=options.image_cache_mb << 20,
        prefill_chunk=options.prefill_chunk,
    )


def open_backend(root: Path, backend: str, options: LoadOptions) -> Backend:
    """Artefact or checkpoint directory -> its backend, without an engine; raises what `load` raises."""
    if not root.is_dir():
        raise UserError(f"{root} is not a directory; name an artefact or a checkpoint directory")
    is_artifact = (root / NAME).is_file()
    format_ = read_manifest(root).format if is_artifact else "checkpoint"
    if options.provider != "auto":
        _check_provider(root, options, format_)
    if options.kv != "f32" and format_ != "gguf":
        raise UserError(f"{root}: the type of keys and values is chosen for GGUF artefacts only; leave --kv out")
    if backend == "torch" or (backend == "auto" and not is_artifact and (root / "config.json").is_file()):
        if is_artifact:
            raise UserError(f"{root} is an artefact, backend torch runs checkpoints; use `--backend auto`")
        from runtime.backend_torch import open_torch

        return open_torch(root, options)
    manifest = read_manifest(root)
    if backend not in ("auto", manifest.format):
        raise UserError(
            f"{root} has format {manifest.format!r}, backend {backend!r} cannot run it; use `--backend auto`"
        )
    if manifest.format == "onnx":
        from runtime.backend_onnx import open_onnx

        return open_onnx(root, options, manifest)
    if manifest.format == "gguf":
        from runtime.backend_gguf import open_gguf

        return open_gguf(root, options, manifest)
    from runtime.backend_tensorrt import open_tensorrt

    return open_tensorrt(root, options, manifest)


def _check_provider(root: Path, options: LoadOptions, kind: str) -> None:
    if kind == "tensorrt":
        return
    if kind != "onnx" or options.provider != "tensorrt":
        raise UserError(
            f"{root}: a provider is chosen for TensorRT artefacts, and tensorrt for ONNX artefacts only; leave --provider out"
        )
    if options.device != "cuda":
        raise UserError(f"provider {options.provider} needs a GPU; add `--device cuda`")


def _fake(artifact: Path, options: LoadOptions) -> Backend:
    from runtime.backend_fake import FakeBackend, FakeScript

    return FakeBackend(FakeScript(context_length=options.context), artifact.name)
