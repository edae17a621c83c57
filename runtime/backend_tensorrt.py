"""TensorRT artefacts: engines where they were built, and the same graphs in ONNX Runtime with `--provider`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.delta import DeltaBackend
from runtime.options import LoadOptions
from runtime.source import Source, need_package, open_artifact
from vlm import engine_key
from vlm.errors import ArtifactError, MissingPiece, UserError
from vlm.manifest import Manifest

PLAN_SCHEMA = "vlm-build-plan/2"


def open_tensorrt(root: Path, options: LoadOptions, manifest: Manifest) -> DeltaBackend:
    """Artefact of format `tensorrt` -> backend.

    Raises:
        ArtifactError: a file is missing, altered or of another version, or no engine fits this machine (says why, and
            the command that builds one). MissingPiece: a package, a driver or a GPU is missing. UserError: a provider
            that cannot run this.
    """
    source = open_artifact(root, manifest, options.latents)
    if options.provider == "edge-llm":
        refuse_edge_llm()
    if options.provider == "auto":
        _need_tensorrt()
    plan = read_plan(source)
    if options.provider == "auto":
        return _open_engines(source, replace(options, device="cuda"), plan)
    from runtime.delta_ort import open_ort

    on = replace(options, device="cpu" if options.provider == "cpu" else "cuda")
    runner = open_ort(source, on, plan, options.provider)
    return DeltaBackend(source, on, runner, f"ort-{options.provider}")


def _need_tensorrt() -> None:
    try:
        need_package("tensorrt", "tensorrt")
    except MissingPiece as error:
        raise MissingPiece(f"{error.message}, or run its graphs without it: `--provider cpu`") from None


def read_plan(source: Source) -> dict[str, Any]:
    path = source.path_of("build_plan")
    plan: dict[str, Any] = json.loads(path.read_text())
    if plan.get("schema") != PLAN_SCHEMA:
        raise ArtifactError(
            f"{path} has schema {plan.get('schema')!r}, this version reads {PLAN_SCHEMA!r}; export again"
        )
    return plan


def _open_engines(source: Source, options: LoadOptions, plan: dict[str, Any]) -> DeltaBackend:
    import tensorrt as trt

    from runtime.cuda import load_cudart
    from runtime.trt_runner import TrtRunner

    build = f"`python -m export build {source.root}` (or `python {source.root / 'build_engine.py'}`)"
    try:
        device = engine_key.device_facts()
        folder, record = engine_key.find(source.root, plan, trt.__version__, device)
    except engine_key.Missing as error:
        raise MissingPiece(f"{error}; or run its graphs without one: `--provider cpu`") from None
    except engine_key.Unfit as error:
        raise ArtifactError(f"{source.root}: {error}; build for this machine with {build}") from None
    if record["pair_id"] != plan["pair_id"]:
        raise ArtifactError(
            f"{folder} was built from another plan than {source.root} has now; build again with {build}"
        )
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    if record["parts"]["builder"]["version_compatible"]:
        runtime.engine_host_code_allowed = True  # such an engine carries the runtime it was built with
    runner = TrtRunner(source, options, plan, folder, trt, runtime, load_cudart())
    backend = DeltaBackend(source, options, runner, "tensorrt")
    size = sum(entry["bytes"] for entry in record["files"].values())
    backend.info = replace(backend.info, artifact_bytes=size + source.path_of("embed_tokens").stat().st_size)
    return backend


def refuse_edge_llm() -> None:
    """TensorRT Edge-LLM cannot take over a LLaVA decoder by what it documents; says so instead of trying.

    Its Python API (0.11.1, `LLM`, `chat`, `generate_stream`) loads checkpoints of the families it lists and takes
    messages or text, no embeddings, so the visual tokens of a LLaVA student have no way in.

    Raises:
        UserError: always.
    """
    raise UserError(
        "TensorRT Edge-LLM documents no way to take a LLaVA decoder: it loads its own model families and accepts no "
        "embeddings; leave --provider out, or serve one of its models there and name the server's address here"
    )
