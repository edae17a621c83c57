"""argv -> one of the commands. Only parsing here; each command lives in its own module."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from runtime.loading import BACKENDS
from runtime.options import Latents, LoadOptions
from vlm.console import Parser, natural, seconds

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str]) -> int:
    """Parse and run; the return value is the exit code."""
    # Pillow's warning about a size that our own limit refuses anyway, in one line
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    arguments = parser().parse_args(argv)
    command: Command = arguments.run
    return command(arguments)


def parser() -> Parser:
    root = Parser(
        prog="python -m runtime",
        description="Run an exported student: ask it, time it, score it, see what this machine can run.",
        epilog="example:\n  python -m runtime ask artifacts/student-onnx --image cat.png 'What is this?'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    _ask(commands)
    _profile(commands)
    _compare(commands)
    _eval(commands)
    _serve(commands)
    _doctor(commands)
    return root


def load_options(arguments: argparse.Namespace) -> LoadOptions:
    names = ("threads", "device", "context", "provider", "prefill_chunk", "kv", "latents")
    return LoadOptions(**{name: getattr(arguments, name) for name in names})


def _add(commands: argparse._SubParsersAction[Parser], name: str, text: str, example: str, run: Command) -> Parser:
    command = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:\n  python -m runtime {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return command


def _loading(command: Parser) -> None:
    defaults = LoadOptions()
    command.add_argument("--backend", default="auto", help=f"auto (by format) or {', '.join(BACKENDS)}")
    command.add_argument("--device", default=defaults.device, help="cpu or cuda (default: %(default)s)")
    command.add_argument(
        "--threads", type=int, default=defaults.threads, help="CPU threads, for every backend (default: %(default)s)"
    )
    command.add_argument(
        "--context", type=int, default=defaults.context, help="upper limit on the context (default: %(default)s tokens)"
    )
    command.add_argument(
        "--prefill-chunk",
        type=int,
        default=defaults.prefill_chunk,
        metavar="N",
        help="prompt tokens between two looks at a cancel; fewer stop sooner (default: %(default)s)",
    )
    command.add_argument(
        "--provider",
        default=defaults.provider,
        help="TensorRT artefacts: cpu, cuda or tensorrt runs the graphs in ONNX Runtime (default: the engines); "
        "ONNX artefacts on a GPU: tensorrt for the vision encoder (default: CUDA)",
    )
    command.add_argument(
        "--kv", default=defaults.kv, help="GGUF: keys and values in f32, f16 or q8_0 (default: %(default)s, as PyTorch)"
    )
    command.add_argument(
        "--latents",
        default=defaults.latents,
        choices=get_args(Latents),
        help="models with latent tokens say them (emit) or find them in the prompt (prefill); default: %(default)s",
    )


def _ask(commands: argparse._SubParsersAction[Parser]) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from runtime.ask import ask

        return ask(arguments, load_options(arguments))

    example = "ask artifacts/student-onnx --image cat.png 'What is this?'"
    command = _add(commands, "ask", "Ask one question; the answer streams to stdout, timings to stderr.", example, run)
    command.add_argument("artifact", metavar="ARTEFACT", help="artefact or checkpoint directory")
    command.add_argument("question", help="what to ask")
    command.add_argument("--image", type=Path, action="append", default=[], metavar="F", help="may be given repeatedly")
    command.add_argument("--max-new-tokens", type=int, default=128, help="(default: %(default)s)")
    command.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (default)")
    command.add_argument("--min-p", type=float, default=0.0, help="0 keeps all tokens (default)")
    command.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is off (default)")
    command.add_argument("--json-schema", default="", metavar="JSON", help="hold the answer to this schema (GGUF only)")
    command.add_argument("--grammar", default="", metavar="GBNF", help="hold the answer to this grammar (GGUF only)")
    command.add_argument("--seed", type=natural, default=0, help="of sampling (default: %(default)s)")
    command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    command.add_argument("--deadline", type=seconds, metavar="S", help="end the answer after so many seconds")
    _loading(command)


def _profile(commands: argparse._SubParsersAction[Parser]) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from runtime.profile_command import profile

        return profile(arguments, load_options(arguments))

    example = "profile artifacts/student-onnx artifacts/student-gguf --out profile.json"
    command = _add(commands, "profile", "Time artefacts side by side, a different image per request.", example, run)
    command.add_argument("artifacts", metavar="ARTEFACT", nargs="+", help="directories, or addresses of servers")
    command.add_argument(
        "--out",
        type=Path,
        action="append",
        default=[],
        metavar="F",
        help="also write .json, .jsonl (requests), .csv, .md or .html, by its ending; repeatable",
    )
    command.add_argument("--requests", type=int, default=64, help="per artefact; p90 needs 64 (default: %(default)s)")
    command.add_argument("--output-tokens", type=int, default=32, help="length of every answer (default: %(default)s)")
    command.add_argument("--image", type=Path, metavar="F", help="noise goes over this photo (default: over digits)")
    command.add_argument("--question", default="Read the top row.", help="(default: %(default)s)")
    command.add_argument("--seed", type=natural, default=0, help="of the images (default: %(default)s)")
    command.add_argument(
        "--extra", type=natural, default=16, help="rounds of stages, follow-up, stop; 0 for none (default: %(default)s)"
    )
    command.add_argument("--slo", default="", metavar="LIMITS", help="goodput within e.g. ttft_ms=200,tpot_ms=50")
    _loading(command)


def _compare(commands: argparse._SubParsersAction[Parser]) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from runtime import compare, evaluate_compare

        if evaluate_compare.is_evaluation(arguments.before):
            return evaluate_compare.compare(arguments)
        return compare.compare(arguments)

    example = "compare before.json after.json --fail-if ttft_ms.p50+5%"
    text = "Two profiles: ratios with intervals. Two evaluations: the difference with a paired test."
    command = _add(commands, "compare", text, example, run)
    command.add_argument("before", type=Path, metavar="A", help="profile (.json), or run directory of eval")
    command.add_argument("after", type=Path, metavar="B", help="the same kind")
    command.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="METRIC+P%",
        help="exit 1 if ttft_ms, tpot_ms or e2el_ms (.p50, .p90, .mean) got slower by more than P percent beyond doubt; "
        "for evaluations: `worse`",
    )


def _eval(commands: argparse._SubParsersAction[Parser]) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from runtime.evaluate import EvalOptions, evaluate
        from runtime.tasks.base import TaskOptions

        task = TaskOptions(arguments.data, arguments.images, arguments.split, arguments.samples, arguments.seed)
        names = ("out", "fresh", "mode", "missing", "concurrency", "batch", "max_new_tokens", "judge")
        options = EvalOptions(**{name: getattr(arguments, name) for name in names})
        return evaluate(arguments, load_options(arguments), task, options)

    example = "eval artifacts/student-gguf --task gqa --data ~/data/gqa"
    command = _add(commands, "eval", "Score answers on a benchmark; killed runs go on where they were.", example, run)
    command.add_argument("artifact", metavar="ARTEFACT", help="artefact, checkpoint directory, or address of a server")
    command.add_argument("--task", default="digits", help="see docs/evaluation.md for the list (default: %(default)s)")
    command.add_argument("--data", type=Path, metavar="D", help="folder or file in the benchmark's own layout")
    command.add_argument("--images", type=Path, metavar="D", help="folder of the images (default: beside the data)")
    command.add_argument("--split", default="", help="(default: the benchmark's usual one)")
    command.add_argument("--samples", type=natural, default=0, help="draw so many (default: all; digits 200)")
    command.add_argument("--seed", type=natural, default=0, help="of the draw, or of digits (default: %(default)s)")
    command.add_argument("--out", type=Path, metavar="D", help="run directory (default: runs/eval/TASK-NAME-DIGEST)")
    command.add_argument("--fresh", action="store_true", help="forget answers kept from an earlier run")
    command.add_argument("--mode", default="", help="strict or official reading of replies (default: the task's)")
    command.add_argument(
        "--missing", choices=("refuse", "wrong"), default="refuse", help="what to do about images that are not there"
    )
    command.add_argument("--max-new-tokens", type=natural, default=0, help="longest answer (default: the task's)")
    command.add_argument("--batch", type=int, default=1, help="questions at once, PyTorch only (default: 1)")
    command.add_argument("--concurrency", type=int, default=1, help="requests in flight at a server (default: 1)")
    command.add_argument(
        "--judge", default="", metavar="URL", help="server that decides MME-Reasoning's open questions"
    )
    _loading(command)


def _serve(commands: argparse._SubParsersAction[Parser]) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from dataclasses import replace

        from runtime.serve_command import serve

        caches = {"queue_size": arguments.queue, "image_cache_mb": arguments.image_cache_mb}
        return serve(arguments, replace(load_options(arguments), **caches))

    example = "serve artifacts/student-gguf --port 8080"
    command = _add(commands, "serve", "OpenAI-compatible HTTP server for one artefact.", example, run)
    command.add_argument("artifact", type=Path, metavar="ARTEFACT", help="artefact or checkpoint directory")
    command.add_argument("--host", default="127.0.0.1", help="another needs an API key (default: %(default)s)")
    command.add_argument("--port", type=natural, default=8080, help="0 takes a free one (default: %(default)s)")
    command.add_argument("--api-key", default="", metavar="KEY", help="better: the variable ALIGN_EDGE_API_KEY")
    command.add_argument("--name", default="", help="model name clients see (default: the folder's)")
    command.add_argument("--queue", type=int, default=8, help="requests that may wait (default: %(default)s)")
    command.add_argument(
        "--deadline", type=seconds, default=300.0, metavar="S", help="per answer (default: %(default)s)"
    )
    command.add_argument("--max-new-tokens", type=int, default=2048, help="longest answer (default: %(default)s)")
    command.add_argument("--max-images", type=int, default=8, help="per conversation (default: %(default)s)")
    command.add_argument(
        "--image-cache-mb", type=int, default=256, help="kept image embeddings; 0 for none (default: %(default)s)"
    )
    command.add_argument("--max-body-mb", type=natural, default=16, help="per request (default: %(default)s)")
    _loading(command)


def _doctor(commands: argparse._SubParsersAction[Parser]) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from runtime.doctor import doctor

        return doctor(arguments)

    _add(commands, "doctor", "What this machine can run, and the command that mends each gap.", "doctor", run)
