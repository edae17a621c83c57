"""`python -m runtime profile`: measure, tabulate, write the files asked for."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.clock import SystemClock
from runtime.energy import Recorder
from runtime.html_report import html_report
from runtime.meters import HeatProbe, find_meter, open_nvml
from runtime.options import LoadOptions
from runtime.profiler import ProfileOptions, Profiler
from runtime.report import report
from runtime.tables import csv_text, jsonl, markdown, tables
from runtime.workload import make_workload
from vlm.console import note, print_json
from vlm.errors import ToolError, UserError
from vlm.files import write_atomic
from vlm.manifest import read_manifest

WRITERS: dict[str, Callable[[dict[str, Any]], str]] = {
    ".json": lambda value: json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    ".jsonl": jsonl,
    ".csv": csv_text,
    ".md": markdown,
    ".html": html_report,
}


def profile(arguments: argparse.Namespace, options: LoadOptions) -> int:
    """Tables on stdout, `vlm-profile/1` to `--out` and, with `--json`, to the last line."""
    scenario = ProfileOptions(
        backend=arguments.backend,
        requests=arguments.requests,
        output_tokens=arguments.output_tokens,
        question=arguments.question,
        seed=arguments.seed,
        extra=arguments.extra,
        slo=parse_slo(arguments.slo),
        load=options,
    )
    for path in arguments.out:
        _check_target(path)
    workload = make_workload(arguments.image, arguments.seed)
    nvml = open_nvml()
    meter = find_meter(
        nvml=nvml,
        gpu=options.device == "cuda" or (options.provider == "auto" and any(map(_runs_engines, arguments.artifacts))),
    )
    recorder = Recorder(SystemClock(), meter, HeatProbe(Path("/"), *(nvml or (None, None))))
    session = Profiler(scenario, workload, recorder=recorder).run(arguments.artifacts)
    result = report(session, scenario, workload)
    print(tables(result))
    for warning in result["warnings"]:
        note(f"warning: {warning}")
    for path in arguments.out:
        try:
            write_atomic(path, WRITERS[path.suffix](result))
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}); choose another --out") from None
        note(f"wrote {path}")
    if arguments.json:
        print_json(result)
    return 0


def _runs_engines(artifact: Any) -> bool:
    """TensorRT takes the GPU without being told so."""
    try:
        return read_manifest(Path(artifact)).format == "tensorrt"
    except (ToolError, OSError):  # a checkpoint, a server, or something that loading will name
        return False


def _check_target(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; name a file, e.g. {path / 'profile.json'}")
    if path.suffix not in WRITERS:
        raise UserError(f"--out {path}: the ending says what to write; known: {', '.join(WRITERS)}")


def parse_slo(text: str) -> tuple[tuple[str, float], ...]:
    """`ttft_ms=200,tpot_ms=50` -> limits by metric.

    Raises:
        UserError: written in another way.
    """
    if not text:
        return ()
    found = [re.fullmatch(r"\s*(\w+)=(\d+(?:\.\d+)?)\s*", part) for part in text.split(",")]
    if not all(found):
        raise UserError(f"slo is {text!r}; write ttft_ms=200,tpot_ms=50")
    return tuple((match[1], float(match[2])) for match in found if match)
