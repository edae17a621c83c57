"""`python -m runtime doctor`: what this machine can run, and the command that mends each gap."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.environment import environment, package_version
from runtime.meters import RAPL_FILES, find_meter, open_nvml, unreadable_rapl
from runtime.source import need_package
from vlm.console import print_json, table
from vlm.errors import MissingPiece


@dataclass(frozen=True)
class Finding:
    """One backend or tool: `status` is `ok` or `missing`, `mend` what to type."""

    name: str
    status: str
    detail: str
    mend: str


def doctor(arguments: argparse.Namespace) -> int:
    """Print findings; the exit code is 0 whatever they are: gaps are an answer, not a failure."""
    machine, findings = environment(), examine()
    host = machine["host"]
    print(f"{host['cpu']}, {host['usable_cores']} of {host['cores']} cores, {host['ram_gb']} GB, {host['os']}")
    print(f"Python {machine['python']}")
    for line in describe_board(machine["jetson"]):
        print(line)
    print()
    print(table(["runs", "status", "detail", "to mend"], [[f.name, f.status, f.detail, f.mend] for f in findings]))
    if arguments.json:
        print_json({"environment": machine, "findings": [asdict(finding) for finding in findings]})
    return 0


def describe_board(board: dict[str, Any] | None) -> list[str]:
    """What a Jetson says about itself, and what would make its figures steadier."""
    if board is None:
        return []
    known = {
        "model": board["model"],
        "L4T": board["l4t"],
        "JetPack": board["jetpack"],
        "power mode": board["nvpmodel"],
        "GPU MHz": None if board["gpu_mhz"] is None else f"{board['gpu_mhz']:.0f} of {board['gpu_max_mhz'] or 0:.0f}",
    }
    lines = [", ".join(f"{name} {value}" for name, value in known.items() if value is not None)]
    if board["jetson_clocks"] is False:
        lines.append("clocks are not locked: figures will vary; run `sudo jetson_clocks` before profiling")
    return lines


def examine() -> list[Finding]:
    """Import each backend's packages and ask them what they can do."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("tokenizer", _tokenizer),
        ("onnx", _onnx),
        ("gguf", _gguf),
        ("torch", _torch),
        ("tensorrt", _tensorrt),
        ("serve", _serve),
        ("demo", _demo),
        ("eval and profile on digits", _digits),
        ("energy meter", _energy),
    ]
    findings = []
    for name, check in checks:
        try:
            findings.append(Finding(name, "ok", check(), ""))
        except MissingPiece as missing:
            problem, _, command = missing.message.partition("; run ")
            findings.append(Finding(name, "missing", problem, command.strip("`") or "nothing to install"))
    return findings


def _tokenizer() -> str:
    need_package("tokenizers", "tokenizer")
    need_package("jinja2", "tokenizer")
    return f"tokenizers {package_version('tokenizers')}, jinja2 {package_version('jinja2')}"


def _onnx() -> str:
    need_package("onnxruntime", "onnx")
    import onnxruntime

    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    return f"onnxruntime {onnxruntime.__version__} ({providers})"


def _gguf() -> str:
    need_package("llama_cpp", "gguf")
    import llama_cpp

    gpu = "with GPU offload" if llama_cpp.llama_supports_gpu_offload() else "CPU only"
    return f"llama-cpp-python {llama_cpp.__version__} ({gpu})"


def _torch() -> str:
    need_package("torch", "torch")
    need_package("transformers", "torch")
    import torch

    devices = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU only"
    return f"torch {torch.__version__}, transformers {package_version('transformers')} ({devices})"


def _tensorrt() -> str:
    need_package("tensorrt", "tensorrt")
    from runtime.cuda import load_cudart
    from vlm import engine_key

    load_cudart()
    try:
        device = engine_key.device_facts()
    except engine_key.Missing as error:
        raise MissingPiece(str(error)) from None
    board = f", L4T {device['l4t']}" if device["l4t"] else ""
    return (
        f"tensorrt {package_version('tensorrt')} on {device['gpu']} (sm {device['sm']}, CUDA {device['cuda']}{board})"
    )


def _serve() -> str:
    for package in ("starlette", "uvicorn", "prometheus_client"):
        need_package(package, "serve")
    return f"starlette {package_version('starlette')}, uvicorn {package_version('uvicorn')}"


def _demo() -> str:
    if importlib.util.find_spec("gradio") is None:  # importing it takes seconds
        raise MissingPiece("gradio is not installed; run `pip install 'align-edge[demo]'`")
    return f"gradio {package_version('gradio')}"


def _energy() -> str:
    meter = find_meter(nvml=open_nvml(), gpu=True)
    if meter is not None:
        return meter.source
    if unreadable_rapl():
        raise MissingPiece("the processor's energy counter is for root only; run `sudo chmod a+r " + RAPL_FILES + "`")
    if Path("/proc/driver/nvidia/version").is_file():
        need_package("pynvml", "nvml")
    raise MissingPiece("none found: no INA3221 or INA238, no RAPL, no NVML (profiles then leave energy out)")


def _digits() -> str:
    need_package("sklearn", "digits")
    return f"scikit-learn {package_version('scikit-learn')}"
