"""`python -m distill report`: one self-contained HTML page about a run, written at the end of training too."""

from __future__ import annotations

import argparse
import html
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vlm.console import Parser, natural, note, print_json
from vlm.errors import ToolError, UserError
from vlm.files import read_json, write_atomic
from vlm.load import PROVENANCE

# what two runs of one method in a comparison do not share
OF_ONE_SEED = ("seed", "out", "resume")

PAGE = "report.html"
CONTROLS = "controls.json"


@dataclass(frozen=True)
class Record:
    """A run's folder as it lies on disk; everything but its configuration may still be missing."""

    name: str
    out: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    irs: dict[str, Any] | None
    result: dict[str, Any]
    facts: dict[str, Any]

    def last(self, name: str) -> float | None:
        """The newest value of a logged quantity."""
        from distill.report import series

        found = series(self.metrics, name)
        return found[-1][1] if found else None


def main(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m distill report",
        description="Write RUN/report.html: curves, IRS, answers, the recipe, the machine. It needs no other file.",
        epilog="examples:\n  python -m distill report runs/mine\n"
        "  python -m distill report runs/mine --compare_to runs/sft runs/kd\n"
        "  python -m distill report runs/mine --compare_to runs/compare   (every run of a comparison, by objective)\n"
        "  python -m distill report runs/mine --samples 20                (answer other samples; loads the models)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, of one training or of stages")
    parser.add_argument(
        "--compare_to", "--compare-to", type=Path, nargs="+", metavar="RUN", help="runs beside it, or a folder of runs"
    )
    parser.add_argument("--samples", type=natural, default=0, metavar="N", help="answer N samples anew")
    parser.add_argument("--json", action="store_true", help="print what the page says as one JSON line at the end")
    args = parser.parse_args(list(argv))
    stages = read(args.run)
    others = controls(args.compare_to) if args.compare_to else None
    if args.samples:
        from distill.__main__ import quiet

        quiet()
        _collect(stages[-1], args.samples)
        stages = read(args.run)
    path = write(args.run, stages, others)
    print(f"report: {path}")
    if args.json:
        print_json({"report": str(path), "stages": [_summary(stage) for stage in stages]})
    return 0


def finish(out: Path) -> None:
    """The report of a run that has just ended. Whatever goes wrong here costs the report, not the run."""
    try:
        for stage in read(out):
            if (stage.out / "student" / PROVENANCE).is_file() and not stage.facts:
                _collect(stage)
        note(f"report: {write(out, read(out))}")
    except ToolError as error:
        note(f"no report: {error.message}; the student is whole, try `python -m distill report {out}`")
    except Exception as error:  # a picture must never make a finished training look failed
        note(f"no report: {type(error).__name__}: {error}; the student is whole, try `python -m distill report {out}`")


def _collect(stage: Record, shown: int = 0) -> None:
    from distill.report_data import SHOWN, collect
    from distill.stored import config_from_json

    if not (stage.out / "student" / PROVENANCE).is_file():
        raise UserError(f"{stage.out} has no student yet; finish it with `python -m distill train --resume`")
    collect(stage.out, config_from_json(stage.config), shown or SHOWN)


def read(run: Path) -> list[Record]:
    """The trainings a folder holds: one, or the started ones of its stages.

    Raises:
        UserError: it holds none.
    """
    from distill.stages import PLAN, read_plan

    if (run / PLAN).is_file():
        found = [_record(stage.config.out, stage.name) for stage in read_plan(run) if _is_run(stage.config.out)]
        if found:
            return found
    if not _is_run(run):
        raise UserError(f"{run} holds no run; name the folder given to `python -m distill train --out`")
    return [_record(run, "")]


def _is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / "model.safetensors").exists()


def _record(out: Path, name: str) -> Record:
    from distill.report import read_metrics
    from distill.report_data import FACTS

    metrics = out / "metrics.jsonl"
    return Record(
        name,
        out,
        read_json(out / "config.json"),
        read_metrics(metrics) if metrics.is_file() else [],
        _json(out / "irs.json"),
        _json(out / "student" / PROVENANCE) or {},
        _json(out / FACTS) or {},
    )


def _json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def controls(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """One column for each run named; runs of a comparison are averaged over their seeds.

    Raises:
        UserError: a folder holds no finished run.
    """
    columns: list[dict[str, Any]] = []
    for folder in folders:
        if _is_run(folder) or (folder / "stages.json").is_file():
            columns.append(_summary(read(folder)[-1], folder.name))
            continue
        inside = sorted(path.parent.parent for path in folder.glob(f"*/student/{PROVENANCE}"))
        # the sweep of a comparison trains on a seed of its own and only chooses the learning rate
        runs = [read(path)[-1] for path in inside if _is_run(path) and not path.name.startswith("sweep-")]
        if not runs:
            raise UserError(f"{folder} holds no finished run; name runs, or the folder of `python -m distill compare`")
        groups: dict[str, list[dict[str, Any]]] = {}
        for run in runs:
            key = json.dumps({k: v for k, v in run.config.items() if k not in OF_ONE_SEED}, sort_keys=True, default=str)
            groups.setdefault(key, []).append(_summary(run, run.out.name))
        columns += [_averaged(group) for group in groups.values()]
    return columns


def _averaged(group: list[dict[str, Any]]) -> dict[str, Any]:
    if len(group) == 1:
        return group[0]
    first = group[0]
    scores = [one["exact_match"] for one in group if one["exact_match"] is not None]
    value = {
        **first,
        # a comparison's folders are called METHOD-Nsteps-lrX-seedS
        "name": f"{re.sub(r'-[0-9]+steps-.*$', '', first['name'])}, {len(group)} seeds",
        "interval": None,
        "n": first["n"],
        "answers": {},
    }
    value["seed"] = ", ".join(str(one["seed"]) for one in group)
    for key in ("seconds", "visual_gain", *(name for name in first if name.startswith("held out "))):
        known = [one[key] for one in group if one.get(key) is not None]
        value[key] = statistics.fmean(known) if known else None
    value["exact_match"] = statistics.fmean(scores) if scores else None
    value["spread"] = statistics.stdev(scores) if len(scores) > 1 else None
    return value


def _summary(record: Record, name: str = "") -> dict[str, Any]:
    """The figures of a run that stand in a column of their own."""
    config, result = record.config, record.result
    terms = {f"held out {term}": record.last(f"eval_{term}") for term in ("sft", "kd", "iva", "tpa", "concept", "traj")}
    return {
        "name": name or record.name or record.out.name,
        "objective": config["objective"],
        "steps": config["steps"],
        "batch": config["batch_size"] * config["accumulate"],
        "lr": config["lr"],
        "seed": config["seed"],
        "exact_match": result.get("exact_match"),
        "interval": result.get("interval"),
        "n": result.get("n") or None,
        "spread": None,
        **terms,
        "visual_gain": record.last("visual_gain"),
        "seconds": result.get("seconds"),
        "answers": {sample_key(sample): sample["student"] for sample in record.facts.get("samples", [])},
    }


def sample_key(sample: dict[str, Any]) -> str:
    """The same question about the same picture in two reports."""
    return f"{sample['question']} {sample['image'] or ''}"


def write(run: Path, stages: Sequence[Record], others: list[dict[str, Any]] | None = None) -> Path:
    """Write RUN/report.html.

    Args:
        others: columns of other runs; None keeps those the report had before.
    """
    stored = run / CONTROLS
    if others is None:
        others = read_json(stored).get("columns", []) if stored.is_file() else []
    else:
        write_atomic(stored, json.dumps({"columns": others}) + "\n")
    path = run / PAGE
    write_atomic(path, page(run, stages, others))
    return path


def page(run: Path, stages: Sequence[Record], others: Sequence[dict[str, Any]] = ()) -> str:
    """The whole page; no script, no file beside it, nothing from the network."""
    from distill import report_parts

    last = stages[-1]
    data = last.result.get("data") or last.facts.get("data") or {}
    title = f"{run.name}: {' → '.join(stage.config['objective'] for stage in stages)}"
    own = _summary(last, run.name if len(stages) == 1 else f"{run.name}, {last.name}")
    body = [
        f"<h1>{html.escape(run.name)}</h1>",
        report_parts.headline(stages, own, data),
        report_parts.columns([own, *others]) if others else "",
        *(report_parts.stage(number, stage, len(stages)) for number, stage in enumerate(stages, 1)),
        report_parts.samples(last, others),
        report_parts.data(last.facts.get("data") or data),
        report_parts.pairs("Environment", last.facts.get("environment") or last.result.get("tools") or {}),
        *(report_parts.recipe(stage) for stage in stages),
    ]
    style = (Path(str(resources.files("distill"))) / "assets" / "report.css").read_text()
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    return f"<!doctype html>\n<html lang=en><head>{head}<style>{style}</style></head>\n<body><main>{''.join(body)}</main></body></html>\n"
