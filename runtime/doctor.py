"""`python -m runtime doctor`: what this machine can run, and the command that mends each gap."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass

from runtime.environment import environment, package_version
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
    print(f"Python {machine['python']}\n")
    print(table(["runs", "status", "detail", "to mend"], [[f.name, f.status, f.detail, f.mend] for f in findings]))
    if arguments.json:
        print_json({"environment": machine, "findings": [asdict(finding) for finding in findings]})
    return 0


def examine() -> list[Finding]:
    """Import each backend's packages and ask them what they can do."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("tokenizer", _tokenizer),
        ("onnx", _onnx),
        ("gguf", _gguf),
        ("torch", _torch),
        ("tensorrt", _tensorrt),
        ("eval and profile on digits", _digits),
    ]
    findings = []
    for name, check in checks:
        try:
            findings.append(Finding(name, "ok", check(), ""))
        except MissingPiece as missing:
            problem, _, command = missing.message.partition("; run ")
            findings.append(Finding(name, "missing", problem, command.strip("`")))
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
    return f"tensorrt {package_version('tensorrt')} (this version builds engines, it does not run them)"


def _digits() -> str:
    need_package("sklearn", "digits")
    return f"scikit-learn {package_version('scikit-learn')}"
