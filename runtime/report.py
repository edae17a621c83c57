"""Measurements -> `vlm-profile/1` and the tables a person reads. Pure functions over plain values."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from runtime.api import STAGES
from runtime.environment import environment, package_version
from runtime.latency import Timing
from runtime.profiler import WARM_CV, Measured, ProfileOptions, Session
from runtime.stats import drift_percent_per_minute, summary
from runtime.workload import Workload
from vlm.console import table

SCHEMA = "vlm-profile/1"


def report(session: Session, options: ProfileOptions, workload: Workload) -> dict[str, Any]:
    """The whole profile; `valid` is false when the artefacts did not do the same work."""
    results = session.results
    warnings = _not_comparable(results)
    valid = not warnings
    warnings += [f"{artifact} was left out: {reason}" for artifact, reason in session.skipped.items()]
    profiles = [_profile(result, options, workload) for result in results]
    for result in results:
        if result.info["verified"] is False:
            warnings.append(f"{result.artifact} did not pass its checks at export; its answers may differ")
        if result.warm_cv >= WARM_CV:
            warnings.append(
                f"{result.artifact}: TTFT still varied by {100 * result.warm_cv:.0f} % after {result.warm_runs} "
                "warm-up requests; other work on this machine?"
            )
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "tool_version": package_version("align-edge"),
        "valid": valid,
        "warnings": warnings,
        "environment": environment(),
        "profiles": profiles,
        "skipped": session.skipped,
    }


def _not_comparable(results: Sequence[Measured]) -> list[str]:
    reasons = []
    for name in ("image_tokens", "prompt_tokens"):
        counts = {getattr(t, name) for result in results for t in result.timings}
        if len(counts) > 1:
            reasons.append(f"not comparable: {name} differs ({', '.join(map(str, sorted(counts)))})")
    return reasons


def _profile(result: Measured, options: ProfileOptions, workload: Workload) -> dict[str, Any]:
    timings, info = result.timings, result.info
    first = timings[0]
    tpots = [t.tpot_ms for t in timings if t.tpot_ms is not None]
    return {
        "schema": SCHEMA,
        "artifact": result.artifact,
        "model": {
            "id": info["name"],
            "weights_sha256": info["weights_sha256"],
            "backend": info["backend"],
            "device": info["device"],
            "dtype": info["precision"],
            "artifact_bytes": info["artifact_bytes"],
            "decode_weight_bytes": info["decoder_weight_bytes"],
            "lm_head_bytes": info["lm_head_bytes"],
            "kv_bytes_per_token": info["kv_bytes_per_token"],
            "n_ctx": info["context_length"],
            "threads": info["threads"],
            "verified": info["verified"],
        },
        "scenario": {
            "name": "single_stream",
            "cache": "off",
            "concurrency": 1,
            "images": workload.name,
            "image_px": list(workload.size),
            "image_tokens": first.image_tokens,
            "text_tokens": (first.prompt_tokens or 0) - (first.image_tokens or 0),
            "output_tokens": options.output_tokens,
            "sampling": "greedy, end-of-sequence ignored",
            "question": options.question,
            "seed": options.seed,
            "sync": "after vision_encode",
            "order": "interleaved",
        },
        "warmup": {
            "cold_load_s": result.load_s,
            "cold_ttft_ms": result.cold_ttft_ms,
            "runs": result.warm_runs,
            "cv_last5": result.warm_cv,
        },
        "counts": {
            "requests": len(timings),
            "failed": 0,
            "cancelled": 0,
            "cached_tokens": sum(t.cached_tokens or 0 for t in timings),
        },
        "metrics": {
            "ttft_ms": summary([t.ttft_ms for t in timings if t.ttft_ms is not None]),
            "tpot_ms": summary(tpots),
            "itl_ms": summary([gap for t in timings for gap in t.itl_ms]),
            "e2el_ms": summary([t.e2el_ms for t in timings]),
        },
        "stages_ms": _stages(timings),
        "throughput": _throughput(timings),
        "memory_mb": {
            "peak_rss": None if result.peak_rss is None else result.peak_rss / 1e6,
            "peak_device": None,
            "method": result.memory_method,
        },
        "energy": None,
        "thermal": {"tpot_drift_pct_per_min": drift_percent_per_minute(result.started_s, tpots)},
        "roofline": None,
        "requests": [{"ttft_ms": t.ttft_ms, "tpot_ms": t.tpot_ms, "e2el_ms": t.e2el_ms} for t in timings],
    }


def _stages(timings: Sequence[Timing]) -> dict[str, Any]:
    """Summary per stage over the requests it happened in; null for a stage that never did."""
    per_stage = {stage: [t.stages_ms[stage] for t in timings if stage in t.stages_ms] for stage in STAGES}
    return {stage: summary(values) if values else None for stage, values in per_stage.items()}


def _throughput(timings: Sequence[Timing]) -> dict[str, Any]:
    """Rates over all requests: generated token ids, never requested lengths; the first token is not in the decode rate."""
    total_s = sum(t.e2el_ms for t in timings) / 1000
    decode_s = sum(t.e2el_ms - t.ttft_ms for t in timings if t.ttft_ms is not None) / 1000
    prefill_s = sum(t.stages_ms.get("prefill", 0.0) for t in timings) / 1000
    decoded = sum((t.completion_tokens or 1) - 1 for t in timings)
    return {
        "output_tok_s": sum(t.completion_tokens or 0 for t in timings) / total_s if total_s else None,
        "decode_tok_s": decoded / decode_s if decode_s else None,
        "prefill_tok_s": sum(t.prompt_tokens or 0 for t in timings) / prefill_s if prefill_s else None,
        "requests_s": len(timings) / total_s if total_s else None,
        "images_s": len(timings) / total_s if total_s else None,  # one image per request
        "goodput_rps": None,
    }


def tables(profile: dict[str, Any]) -> str:
    """Comparison table and stage table, Markdown."""
    profiles = profile["profiles"]
    rows = [
        [
            p["model"]["id"],
            p["model"]["backend"],
            p["model"]["dtype"],
            _mb(p["model"]["artifact_bytes"], 1e6),
            _ms(p["metrics"]["ttft_ms"]["p50"]),
            _ms(p["metrics"]["ttft_ms"]["p90"]),
            _ms(p["metrics"]["tpot_ms"]["p50"]),
            "-" if p["throughput"]["decode_tok_s"] is None else f"{p['throughput']['decode_tok_s']:.0f}",
            _mb(p["memory_mb"]["peak_rss"], 1),
        ]
        for p in profiles
    ]
    header = ["artefact", "backend", "precision", "size MB", "TTFT p50 ms", "p90", "TPOT p50 ms", "tok/s", "peak MB"]
    stage_rows = [
        [p["model"]["id"], *[_ms(p["stages_ms"][s] and p["stages_ms"][s]["p50"]) for s in STAGES]] for p in profiles
    ]
    stages = table(["stage p50 ms", *[stage.replace("_", " ") for stage in STAGES]], stage_rows)
    text = f"{table(header, rows)}\n\n{stages}"
    small = [p for p in profiles if p["metrics"]["ttft_ms"]["p90"] is None]
    if small:
        text += f"\n\np90 left out: {small[0]['counts']['requests']} requests are too few (64 needed)"
    return text


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mb(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.1f}"
