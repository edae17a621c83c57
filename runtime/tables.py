"""A profile -> the tables a person reads, CSV and JSON lines. Pure functions."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from runtime.api import STAGES
from vlm.console import table

HEADER = ["artefact", "backend", "precision", "size MB", "TTFT p50 ms", "p90", "TPOT p50 ms", "tok/s", "peak MB"]


def tables(profile: dict[str, Any]) -> str:
    """All tables, Markdown."""
    profiles = profile["profiles"]
    on_device = any(p["memory_mb"]["peak_device"] is not None for p in profiles)
    header = [*HEADER, "device MB"] if on_device else HEADER
    parts = [table(header, [_speed(p)[: len(header)] for p in profiles]), table(*_stages(profiles))]
    if follow_ups := [p for p in profiles if p["follow_up"]]:
        parts.append(table(*_follow_ups(follow_ups)))
    parts.append(table(*_limits(profiles)))
    small = [p for p in profiles if p["metrics"]["ttft_ms"]["p90"] is None]
    if small:
        parts.append(f"p90 left out: {small[0]['counts']['requests']} requests are too few (64 needed)")
    if not profile["valid"]:
        parts.insert(0, "NOT COMPARABLE or not valid: see the warnings.")
    return "\n\n".join(parts)


def markdown(profile: dict[str, Any]) -> str:
    """The tables as a document: machine, method, warnings."""
    host = profile["environment"]["host"]
    first = profile["profiles"][0]["scenario"]
    lines = [
        "# Profile",
        "",
        f"{host['cpu']}, {host['usable_cores']} of {host['cores']} cores, {host['ram_gb']} GB; {profile['created']}.",
        f"{first['image_px'][0]} x {first['image_px'][1]} pixels, {first['output_tokens']} output tokens, caches off, "
        "a different image per request, models in turns.",
        "",
        tables(profile),
        "",
        *[f"- warning: {warning}" for warning in profile["warnings"]],
    ]
    return "\n".join(lines).rstrip() + "\n"


def _speed(p: dict[str, Any]) -> list[str]:
    return [
        p["model"]["id"],
        p["model"]["backend"],
        p["model"]["dtype"],
        number(p["model"]["artifact_bytes"], 1e6, 1),
        number(p["metrics"]["ttft_ms"]["p50"]),
        number(p["metrics"]["ttft_ms"]["p90"]),
        number(p["metrics"]["tpot_ms"]["p50"]),
        number(p["throughput"]["decode_tok_s"], 1, 0),
        number(p["memory_mb"]["peak_rss"], 1, 1),
        number(p["memory_mb"]["peak_device"], 1, 1),
    ]


def _stages(profiles: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [p["model"]["id"], *[number(p["stages_ms"][s] and p["stages_ms"][s]["p50"]) for s in STAGES]] for p in profiles
    ]
    return ["stage p50 ms", *[stage.replace("_", " ") for stage in STAGES]], rows


def _follow_ups(profiles: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            p["model"]["id"],
            number(p["follow_up"]["image_ttft_ms"]["p50"]),
            number(p["follow_up"]["text_ttft_ms"]["p50"]),
            f"{p['follow_up']['ratio']:.3f}",
            number(p["follow_up"]["text_uncached_ttft_ms"]["p50"]),
            f"{p['follow_up']['prompt_tokens']['image']} / {p['follow_up']['prompt_tokens']['text']}",
        ]
        for p in profiles
    ]
    header = ["second question", "TTFT ms, image", "text", "image / text", "text, no cache", "prompt tokens"]
    return header, rows


def mbu_text(roofline: dict[str, Any]) -> str:
    """Share of the measured memory speed; where all a token reads fits the cache, memory is not the limit."""
    share = roofline.get("mbu_measured")
    if share is None:
        return "-"
    return "in cache" if roofline.get("fits_cache") else f"{100 * share:.0f} %"


def _limits(profiles: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for p in profiles:
        roofline, energy = p["roofline"] or {}, p["energy"] or {}
        rows.append(
            [
                p["model"]["id"],
                number(p["metrics"]["stop_ms"]["p50"]),
                number(p["metrics"]["stop_ms"]["max"]),
                number(p["synchronised"] and p["synchronised"]["overhead_pct"], 1, 1),
                mbu_text(roofline),
                number(energy.get("j_per_output_token"), 1, 3),
                roofline.get("remedy") or "-",
            ]
        )
    return ["limits", "stop p50 ms", "max", "stage sync %", "MBU", "J/token", "verdict"], rows


def number(value: float | None, unit: float = 1, digits: int = 2) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def request_rows(profile: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat row per measured request."""
    rows = []
    for p in profile["profiles"]:
        for index, request in enumerate(p["requests"]):
            flat = {k: v for k, v in request.items() if k != "stages_ms"}
            stages = {f"{stage}_ms": request["stages_ms"].get(stage) for stage in STAGES}
            rows.append(
                {
                    "artifact": p["artifact"],
                    "model": p["model"]["id"],
                    "backend": p["model"]["backend"],
                    "dtype": p["model"]["dtype"],
                    "request": index,
                    **flat,
                    **stages,
                }
            )
    return rows


def jsonl(profile: dict[str, Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in request_rows(profile))


def csv_text(profile: dict[str, Any]) -> str:
    rows = request_rows(profile)
    buffer = io.StringIO()
    if rows:
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return buffer.getvalue()
