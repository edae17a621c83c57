"""Measurements -> `vlm-profile/1`. Pure functions over plain values; what was not measured is null, never 0."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np

from runtime.api import STAGES
from runtime.energy import energy_json, thermal_json
from runtime.environment import environment, package_version
from runtime.latency import Timing
from runtime.profiler import WARM_CV, Measured, ProfileOptions, Session
from runtime.roofline import last_level_cache, roofline_json, spec_bandwidth
from runtime.stats import drift_percent_per_minute, summary, variation
from runtime.workload import Workload

SCHEMA = "vlm-profile/1"
DRIFT_FROM = 5.0
UNSTABLE_FROM = 0.05


def report(session: Session, options: ProfileOptions, workload: Workload) -> dict[str, Any]:
    """The whole profile; `valid` is false when the models did not do the same work or a cache answered for one."""
    results = session.results
    faults = _not_comparable(results) + [fault for result in results for fault in _faults(result)]
    warnings = faults + [f"{artifact} was left out: {reason}" for artifact, reason in session.skipped.items()]
    machine = environment()
    profiles = [_profile(result, options, workload, session, machine) for result in results]
    for result, profile in zip(results, profiles, strict=True):
        warnings += _remarks(result, profile)
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "tool_version": package_version("align-edge"),
        "valid": not faults,
        "warnings": warnings,
        "environment": machine,
        "profiles": profiles,
        "skipped": session.skipped,
    }


def _not_comparable(results: Sequence[Measured]) -> list[str]:
    """Work that differs between models: a faster one may just have done less."""
    warnings = []
    for name in ("prompt_tokens", "image_tokens", "completion_tokens"):
        values = {getattr(t, name) for result in results for t in result.timings} - {None}
        if len(values) > 1:
            warnings.append(f"not comparable: {name} differs ({', '.join(map(str, sorted(values)))})")
    ids = {result.info["weights_sha256"] for result in results} - {None}
    if len(ids) > 1:
        warnings.append("not comparable: the artefacts were made of different students")
    return warnings


def _faults(result: Measured) -> list[str]:
    """Reasons not to believe the numbers of one model."""
    found = []
    if result.failures:
        total = len(result.failures) + len(result.timings)
        found.append(f"{result.artifact}: {len(result.failures)} of {total} requests failed ({result.failures[0]})")
    if cached := sum(t.cached_tokens or 0 for t in result.timings):
        found.append(
            f"{result.artifact}: {cached} prompt tokens came from a cache that could not be switched off; "
            "start that server without prefix caching"
        )
    return found


def _remarks(result: Measured, profile: dict[str, Any]) -> list[str]:
    name, found = result.artifact, []
    if result.info["verified"] is False:
        found.append(f"{name} did not pass its checks at export; its answers may differ")
    if result.warm_cv >= WARM_CV:
        found.append(
            f"{name}: TTFT still varied by {100 * result.warm_cv:.0f} % after {result.warm_runs} "
            "warm-up requests; other work on this machine?"
        )
    if any(t.cached_tokens is None for t in result.timings):
        found.append(f"{name}: the server does not say what it cached; every image was new, the text was not")
    if result.timings and result.timings[0].completion_tokens is None:
        found.append(f"{name}: the server does not count its tokens; TPOT is unknown")
    stability = profile["stability"]
    if stability["verdict"] != "stable":
        found.append(f"{name}: {stability['text']}")
    return found


def _profile(
    result: Measured, options: ProfileOptions, workload: Workload, session: Session, machine: dict[str, Any]
) -> dict[str, Any]:
    timings, info = result.timings, result.info
    tpots = [t.tpot_ms for t in timings if t.tpot_ms is not None]
    thermal = _thermal(session, result, tpots)
    energy, note = _energy(session, result)
    return {
        "schema": SCHEMA,
        "artifact": result.artifact,
        "model": _model(info),
        "scenario": _scenario(result, options, workload),
        "warmup": {
            "cold_load_s": result.load_s,
            "cold_ttft_ms": result.cold_ttft_ms,
            "runs": result.warm_runs,
            "cv_last5": result.warm_cv,
        },
        "counts": {
            "requests": len(timings) + len(result.failures),
            "failed": len(result.failures),
            "cancelled": len(result.stop_ms),
            "not_cancelled": result.not_stopped,
            "cached_tokens": _sum(t.cached_tokens for t in timings),
        },
        "metrics": {
            "ttft_ms": summary([t.ttft_ms for t in timings if t.ttft_ms is not None]),
            "tpot_ms": summary(tpots),
            "itl_ms": summary([gap for t in timings for gap in t.itl_ms], independent=len(timings)),
            "e2el_ms": summary([t.e2el_ms for t in timings]),
            "stop_ms": summary(result.stop_ms),
        },
        "stages_ms": stage_summaries(timings),
        "synchronised": _synchronised(result),
        "follow_up": _follow_up(result),
        "throughput": _throughput(timings, options),
        "memory_mb": {
            "peak_rss": None if result.peak_rss is None else result.peak_rss / 1e6,
            "peak_device": None if result.peak_device is None else result.peak_device / 1e6,
            "method": result.memory_method,
            "device_method": result.device_method,
        },
        "energy": energy,
        "energy_note": note,
        "thermal": thermal,
        "stability": _stability(tpots, thermal),
        "roofline": _roofline(result, thermal, tpots, machine),
        "requests": [_request_json(t, at) for t, at in zip(timings, result.started_s, strict=False)],
    }


def _request_json(t: Timing, started_s: float) -> dict[str, Any]:
    return {
        "started_s": started_s,
        "ttft_ms": t.ttft_ms,
        "tpot_ms": t.tpot_ms,
        "e2el_ms": t.e2el_ms,
        "prompt_tokens": t.prompt_tokens,
        "image_tokens": t.image_tokens,
        "completion_tokens": t.completion_tokens,
        "cached_tokens": t.cached_tokens,
        "stages_ms": t.stages_ms,
    }


def _model(info: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": info["name"],
        "weights_sha256": info["weights_sha256"],
        "backend": info["backend"],
        "device": info["device"],
        "dtype": info["precision"],
        "artifact_bytes": info["artifact_bytes"],
        "decode_weight_bytes": info["decoder_weight_bytes"],
        "lm_head_bytes": info["lm_head_bytes"],
        "kv_bytes_per_token": info["kv_bytes_per_token"],
        "n_ctx": info["context_length"] or None,
        "threads": info["threads"] or None,
        "verified": info["verified"],
    }


def _scenario(result: Measured, options: ProfileOptions, workload: Workload) -> dict[str, Any]:
    first = result.timings[0] if result.timings else None
    images = first.image_tokens if first else None
    return {
        "name": "single_stream",
        "cache": "off",
        "concurrency": 1,
        "images": workload.name,
        "image_px": list(workload.size),
        "image_tokens": images,
        "text_tokens": None
        if not first or first.prompt_tokens is None or images is None
        else first.prompt_tokens - images,
        "output_tokens": options.output_tokens,
        "sampling": "greedy, end-of-sequence ignored",
        "question": options.question,
        "seed": options.seed,
        "sync": "none",
        "order": "interleaved",
    }


def stage_summaries(timings: Sequence[Timing]) -> dict[str, Any]:
    """Summary per stage over the requests it happened in; null for a stage that never did."""
    per_stage = {stage: [t.stages_ms[stage] for t in timings if stage in t.stages_ms] for stage in STAGES}
    return {stage: summary(values) if values else None for stage, values in per_stage.items()}


def _synchronised(result: Measured) -> dict[str, Any] | None:
    """The stages with the device waited for at every border, and what that waiting costs."""
    ours = [t.e2el_ms for t in result.stages]
    plain = [t.e2el_ms for t in result.stages_plain]
    if not ours or not plain:
        return None
    overhead = 100 * (float(np.median(ours)) / float(np.median(plain)) - 1)
    return {"n": len(ours), "stages_ms": stage_summaries(result.stages), "overhead_pct": overhead}


def _follow_up(result: Measured) -> dict[str, Any] | None:
    """TTFT of a second question: about an image, about text of the same length, and of that text without caches."""
    rounds = [r for r in result.follow_ups if r.image.ttft_ms and r.text.ttft_ms and r.text_cold.ttft_ms]
    if not rounds:
        return None
    ratios = [(r.image.ttft_ms or 0.0) / (r.text.ttft_ms or 1.0) for r in rounds]
    last = rounds[-1]
    return {
        "n": len(rounds),
        "image_ttft_ms": summary([r.image.ttft_ms or 0.0 for r in rounds]),
        "text_ttft_ms": summary([r.text.ttft_ms or 0.0 for r in rounds]),
        "text_uncached_ttft_ms": summary([r.text_cold.ttft_ms or 0.0 for r in rounds]),
        "ratio": float(np.median(ratios)),
        "ratio_quartiles": [float(q) for q in np.quantile(ratios, [0.25, 0.75])],
        "prompt_tokens": {"image": last.image.prompt_tokens, "text": last.text.prompt_tokens},
        "cached_tokens": {"image": last.image.cached_tokens, "text": last.text.cached_tokens},
        "cached_images": last.image.cached_images,
    }


def _throughput(timings: Sequence[Timing], options: ProfileOptions) -> dict[str, Any]:
    """Rates over all requests: generated token ids, never requested lengths; the first token is not in the decode rate."""
    total_s = sum(t.e2el_ms for t in timings) / 1000
    counted = [t for t in timings if t.completion_tokens is not None and t.ttft_ms is not None]
    decode_s = sum(t.e2el_ms - (t.ttft_ms or 0.0) for t in counted) / 1000
    prefill_s = sum(t.stages_ms.get("prefill", 0.0) for t in timings) / 1000
    decoded = sum((t.completion_tokens or 1) - 1 for t in counted)
    tokens = _sum(t.completion_tokens for t in timings)
    prompts = _sum(t.prompt_tokens for t in timings)
    # what was not measured was not met
    kept = sum(
        all(getattr(t, name, None) is not None and getattr(t, name) <= limit for name, limit in options.slo)
        for t in timings
    )
    return {
        "output_tok_s": tokens / total_s if total_s and tokens is not None else None,
        "decode_tok_s": decoded / decode_s if decode_s else None,
        "prefill_tok_s": prompts / prefill_s if prefill_s and prompts is not None else None,
        "requests_s": len(timings) / total_s if total_s else None,
        "images_s": len(timings) / total_s if total_s else None,  # one image per request
        "goodput_rps": kept / total_s if options.slo and total_s else None,
        "slo": dict(options.slo),
    }


def _energy(session: Session, result: Measured) -> tuple[dict[str, Any] | None, str]:
    if session.recorder is None:
        return None, "not asked for"
    tokens = _sum(t.completion_tokens for t in result.timings) or 0
    n = len(result.windows)
    return energy_json(session.recorder, result.windows, session.idle_w, n, tokens, n)


def _thermal(session: Session, result: Measured, tpots: Sequence[float]) -> dict[str, Any]:
    times = [at for at, t in zip(result.started_s, result.timings, strict=False) if t.tpot_ms is not None]
    seen = thermal_json(session.recorder.heat if session.recorder else [])
    return {**seen, "tpot_drift_pct_per_min": drift_percent_per_minute(times, tpots)}


def _stability(tpots: Sequence[float], thermal: dict[str, Any]) -> dict[str, Any]:
    """Whether the run can be trusted as a steady state."""
    cv, drift = variation(tpots), thermal["tpot_drift_pct_per_min"]
    name, text = "stable", ""
    if thermal["throttled_s"]:
        name, text = "throttled", f"throttled for {thermal['throttled_s']:.0f} s ({', '.join(thermal['reasons'])})"
    elif cv > UNSTABLE_FROM:
        name, text = "unstable", f"TPOT varies by {100 * cv:.0f} %; lock the clocks, stop other work"
    elif drift is not None and abs(drift) > DRIFT_FROM and len(tpots) >= 30:
        name, text = "drifting", f"TPOT drifts by {drift:+.0f} % a minute; let it run longer, look at the temperature"
    return {"verdict": name, "tpot_cv": cv, "text": text}


def _roofline(
    result: Measured, thermal: dict[str, Any], tpots: Sequence[float], machine: dict[str, Any]
) -> dict[str, Any] | None:
    if not tpots or not result.timings[0].prompt_tokens:
        return None
    board = machine.get("jetson") or {}
    context = float(np.mean([(t.prompt_tokens or 0) + (t.completion_tokens or 0) / 2 for t in result.timings]))
    # a board has one memory for both sides
    gpu = machine["host"]["gpu"] if result.info["device"] == "cuda" else None
    device = str(board.get("model") or gpu or machine["host"]["cpu"])
    return roofline_json(
        result.info,
        context,
        float(np.median(tpots)),
        result.bandwidth_gbs,
        spec_bandwidth(device),
        last_level_cache(),
        variation(tpots),
        thermal["throttled_s"],
    )


def _sum(values: Any) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
