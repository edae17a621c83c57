"""`python -m runtime profile`: measure, tabulate, write the JSON."""

from __future__ import annotations

import argparse
import json

from runtime.options import LoadOptions
from runtime.profiler import ProfileOptions, measure
from runtime.report import report, tables
from runtime.workload import make_workload
from vlm.console import note, print_json
from vlm.errors import UserError
from vlm.files import write_atomic


def profile(arguments: argparse.Namespace, options: LoadOptions) -> int:
    """Tables on stdout, `vlm-profile/1` to `--out` and, with `--json`, to the last line."""
    scenario = ProfileOptions(
        backend=arguments.backend,
        requests=arguments.requests,
        output_tokens=arguments.output_tokens,
        question=arguments.question,
        seed=arguments.seed,
        load=options,
    )
    if arguments.out and arguments.out.is_dir():
        raise UserError(f"--out {arguments.out} is a folder; name a file, e.g. {arguments.out / 'profile.json'}")
    workload = make_workload(arguments.image, arguments.seed)
    result = report(measure(arguments.artifacts, scenario, workload), scenario, workload)
    print(tables(result))
    for warning in result["warnings"]:
        note(f"warning: {warning}")
    if arguments.out:
        try:
            write_atomic(arguments.out, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {arguments.out} ({error.strerror}); choose another --out") from None
        note(f"wrote {arguments.out}")
    if arguments.json:
        print_json(result)
    return 0
