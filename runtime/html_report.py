"""A profile -> one self-contained HTML page with inline SVG: nothing is loaded from anywhere, no script runs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from runtime.api import STAGES
from runtime.tables import mbu_text, number

COLOURS = ("#2f6db5", "#c8553d", "#3c8d5a", "#8a5fb0", "#b8862b", "#4a9aa8", "#a0506f", "#6b6b6b")
STAGE_COLOURS = dict(
    zip(STAGES, ("#9aa3ad", "#b8862b", "#8a5fb0", "#c8553d", "#2f6db5", "#3c8d5a", "#4a9aa8"), strict=True)
)
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 260, 64, 40, 14, 24
STYLE = """
:root{color-scheme:light dark;--ink:#1c2026;--soft:#5b6470;--line:#d4d9df;--ground:#fff;--bad:#a32020}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#9aa3ad;--line:#3a4048;--ground:#16191d;--bad:#ff8a80}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--ground);max-width:1080px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}p,figcaption{color:var(--soft);margin:.2rem 0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{border-bottom:1px solid var(--line);padding:.3rem .7rem;text-align:right}th:first-child,td:first-child{text-align:left}
th.text,td.text{text-align:left;white-space:normal;min-width:18rem}figure{margin:1rem 0}svg{width:100%;max-width:760px;height:auto}
svg text{fill:var(--ink);font:12px system-ui,sans-serif}svg .axis{stroke:var(--line)}ul.key{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem}
.key i{display:inline-block;width:.8em;height:.8em;margin-right:.4em;border-radius:2px}.bad{color:var(--bad);font-weight:600}
"""


def html_report(profile: dict[str, Any]) -> str:
    """The whole page."""
    profiles = profile["profiles"]
    host = profile["environment"]["host"]
    machine = f"{host['cpu']}, {host['usable_cores']} of {host['cores']} cores, {host['ram_gb']} GB, {host['os']}"
    scenario = profiles[0]["scenario"]
    method = (
        f"{scenario['images']}: a different image per request, {scenario['image_px'][0]} × {scenario['image_px'][1]} pixels, "
        f"{scenario['output_tokens']} output tokens, caches off, models in turns. {profile['created']}"
    )
    verdict = "" if profile["valid"] else '<p class="bad">Not comparable or not valid: see the warnings.</p>'
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in profile["warnings"])
    parts = [
        f"<h1>Latency profile</h1><p>{escape(machine)}</p><p>{escape(method)}</p>{verdict}",
        f"<h2>Speed</h2>{_speed(profiles)}",
        f"<h2>Where the time goes</h2>{_stage_bars(profiles)}",
        f"<h2>Time to first token</h2>{_distribution(profiles, 'ttft_ms', 'TTFT in ms')}",
        f"<h2>Time per token over the run</h2>{_over_time(profiles)}",
        f"<h2>First token against speed</h2>{_pareto(profiles)}",
        f"<h2>Limits</h2>{_limits(profiles)}",
        f"<h2>Warnings</h2><ul>{warnings}</ul>" if warnings else "",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Latency profile</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _name(p: dict[str, Any]) -> str:
    return f"{p['model']['id']} · {p['model']['backend']} {p['model']['dtype']}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = ()) -> str:
    head = "".join(
        f'<th scope="col"{" class=text" if i in text_columns else ""}>{escape(cell)}</th>'
        for i, cell in enumerate(header)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=text' if i in text_columns else ''}>{escape(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _key(names: Sequence[str], colours: Sequence[str]) -> str:
    items = "".join(f'<li><i style="background:{c}"></i>{escape(n)}</li>' for n, c in zip(names, colours, strict=False))
    return f'<ul class="key">{items}</ul>'


def _speed(profiles: Sequence[dict[str, Any]]) -> str:
    on_device = any(p["memory_mb"]["peak_device"] is not None for p in profiles)
    header = ["model", "TTFT p50 ms", "p90", "p99", "TPOT p50 ms", "p90", "tokens/s", "size MB", "peak MB"]
    header += ["device MB"] * on_device + ["requests"]
    rows = []
    for p in profiles:
        ttft, tpot, memory = p["metrics"]["ttft_ms"], p["metrics"]["tpot_ms"], p["memory_mb"]
        rows.append(
            [
                _name(p),
                *[number(ttft[q]) for q in ("p50", "p90", "p99")],
                *[number(tpot[q]) for q in ("p50", "p90")],
                number(p["throughput"]["decode_tok_s"], 1, 0),
                number(p["model"]["artifact_bytes"], 1e6, 1),
                number(memory["peak_rss"], 1, 0),
                *[number(memory["peak_device"], 1, 0)] * on_device,
                str(p["counts"]["requests"]),
            ]
        )
    return _table(header, rows) + "<p>A dash: not measured, or too few requests for that percentile.</p>"


def _limits(profiles: Sequence[dict[str, Any]]) -> str:
    header = ["model", "stop p50 ms", "second question: image / text", "MBU", "J/token", "verdict"]
    rows = []
    for p in profiles:
        roofline, energy, follow = p["roofline"] or {}, p["energy"] or {}, p["follow_up"] or {}
        rows.append(
            [
                _name(p),
                number(p["metrics"]["stop_ms"]["p50"]),
                number(follow.get("ratio")),
                mbu_text(roofline),
                number(energy.get("j_per_output_token"), 1, 3),
                roofline.get("remedy") or p["energy_note"] or "-",
            ]
        )
    return _table(header, rows, (5,))


def _figure(svg: str, caption: str, height: int = HEIGHT) -> str:
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(caption)}">{svg}</svg>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _ticks(top: float) -> list[float]:
    """Four or five round numbers from 0 to a bit above `top`."""
    step = 10.0 ** len(str(int(top))) / 10 if top >= 1 else 0.1
    while top / step > 5:
        step *= 2
    while top / step < 2.5:
        step /= 2
    return [step * i for i in range(int(top / step) + 2)]


def _y_axis(top: float, height: int = HEIGHT) -> tuple[str, float]:
    ticks = _ticks(top)
    scale = (height - BOTTOM - TOP) / ticks[-1]
    lines = "".join(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{height - BOTTOM - t * scale:.1f}" y2="{height - BOTTOM - t * scale:.1f}"/>'
        f'<text x="{LEFT - 8}" y="{height - BOTTOM - t * scale + 4:.1f}" text-anchor="end">{t:g}</text>'
        for t in ticks
    )
    return lines, scale


def _stage_bars(profiles: Sequence[dict[str, Any]]) -> str:
    rows = []
    for p in profiles:
        source = p["synchronised"] or p
        rows.append({s: (source["stages_ms"][s] or {}).get("mean") or 0.0 for s in STAGES})
    top = max((sum(row.values()) for row in rows), default=0.0)
    if not top:
        return "<p>No stages: a remote server's cannot be seen.</p>"
    bar, height = 30, 30 + 54 * len(profiles)
    svg = ""
    for i, (p, row) in enumerate(zip(profiles, rows, strict=True)):
        x, y = 0.0, 30 + 54 * i
        svg += f'<text x="0" y="{y - 6}">{escape(_name(p))}: {sum(row.values()):.2f} ms</text>'
        for stage, ms in row.items():
            width = ms / top * WIDTH
            svg += (
                f'<rect x="{x:.1f}" y="{y}" width="{width:.2f}" height="{bar}" fill="{STAGE_COLOURS[stage]}">'
                f"<title>{stage.replace('_', ' ')}: {ms:.3f} ms</title></rect>"
            )
            x += width
    key = _key([s.replace("_", " ") for s in STAGES], [STAGE_COLOURS[s] for s in STAGES])
    return _figure(svg, "Mean milliseconds per stage, one answer, device waited for at stage borders", height) + key


def _distribution(profiles: Sequence[dict[str, Any]], metric: str, label: str) -> str:
    """Empirical distribution: share of the requests that were at least this fast."""
    series = [sorted(r[metric] for r in p["requests"] if r[metric] is not None) for p in profiles]
    top = max((values[-1] for values in series if values), default=0.0)
    if not top:
        return "<p>No values.</p>"
    ticks = _ticks(top)
    x_scale, plot = (WIDTH - LEFT - RIGHT) / ticks[-1], HEIGHT - BOTTOM - TOP
    svg = "".join(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{TOP + plot * (1 - q):.1f}" y2="{TOP + plot * (1 - q):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{TOP + plot * (1 - q) + 4:.1f}" text-anchor="end">{100 * q:.0f} %</text>'
        for q in (0, 0.5, 0.9, 1)
    )
    svg += "".join(
        f'<text x="{LEFT + t * x_scale:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{t:g}</text>'
        for t in ticks
    )
    svg += f'<text x="{WIDTH}" y="{HEIGHT - 4}" text-anchor="end">{escape(label)}</text>'
    for i, values in enumerate(series):
        points = " ".join(
            f"{LEFT + v * x_scale:.1f},{TOP + plot * (1 - (k + 1) / len(values)):.1f}" for k, v in enumerate(values)
        )
        svg += f'<polyline fill="none" stroke="{_colour(i)}" stroke-width="2" points="{points}"/>'
    return _figure(svg, "Share of requests whose first token came within this time") + _models_key(profiles)


def _over_time(profiles: Sequence[dict[str, Any]]) -> str:
    points = [[(r["started_s"], r["tpot_ms"]) for r in p["requests"] if r["tpot_ms"] is not None] for p in profiles]
    flat = [point for series in points for point in series]
    if not flat:
        return "<p>No values.</p>"
    axis, scale = _y_axis(max(y for _, y in flat))
    last = max(x for x, _ in flat) or 1.0
    svg = axis + f'<text x="{WIDTH}" y="{HEIGHT - 4}" text-anchor="end">{last:.0f} s</text>'
    for i, series in enumerate(points):
        for x, y in series:
            cx, cy = LEFT + 6 + x / last * (WIDTH - LEFT - 16), HEIGHT - BOTTOM - y * scale
            svg += f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="2.5" fill="{_colour(i)}" fill-opacity=".7"/>'
    return _figure(svg, "TPOT in ms of every request, in the order they ran: a slope is drift") + _models_key(profiles)


def _pareto(profiles: Sequence[dict[str, Any]]) -> str:
    points = [(p["metrics"]["ttft_ms"]["p50"], p["metrics"]["tpot_ms"]["p50"]) for p in profiles]
    known = [(x, y) for x, y in points if x is not None and y is not None]
    if not known:
        return "<p>No values.</p>"
    axis, scale = _y_axis(max(y for _, y in known))
    ticks = _ticks(max(x for x, _ in known))
    x_scale = (WIDTH - LEFT - RIGHT) / ticks[-1]
    svg = axis + "".join(
        f'<text x="{LEFT + t * x_scale:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{t:g}</text>'
        for t in ticks
    )
    for i, (x, y) in enumerate(points):
        if x is not None and y is not None:
            svg += (
                f'<circle cx="{LEFT + x * x_scale:.1f}" cy="{HEIGHT - BOTTOM - y * scale:.1f}" r="7" fill="{_colour(i)}">'
                f"<title>{escape(_name(profiles[i]))}</title></circle>"
            )
    return _figure(svg, "TTFT p50 (across, ms) and TPOT p50 (up, ms): lower left is better") + _models_key(profiles)


def _models_key(profiles: Sequence[dict[str, Any]]) -> str:
    return _key([_name(p) for p in profiles], [_colour(i) for i in range(len(profiles))])


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
