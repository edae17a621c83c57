"""One Markdown table out of a profile and the scores of the same artefacts, in the same order."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vlm.console import table

HEADER = ["backend", "precision", "size MB", "exact match (n)", "TTFT p50 ms", "TPOT p50 ms", "tokens/s", "peak MB"]


def row(profile: dict[str, Any], score: dict[str, Any]) -> list[str]:
    model, metrics = profile["model"], profile["metrics"]
    return [
        model["backend"],
        model["dtype"],
        f"{model['artifact_bytes'] / 1e6:.1f}",
        f"{score['score']:.3f} ({score['n']})",
        f"{metrics['ttft_ms']['p50']:.2f}",
        f"{metrics['tpot_ms']['p50']:.2f}",
        f"{profile['throughput']['decode_tok_s']:.0f}",
        f"{profile['memory_mb']['peak_rss']:.0f}",
    ]


def main() -> None:
    profile_file, score_file = map(Path, sys.argv[1:3])
    report = json.loads(profile_file.read_text())
    scores = [json.loads(line) for line in score_file.read_text().splitlines()]
    print(table(HEADER, [row(p, s) for p, s in zip(report["profiles"], scores, strict=True)]))
    host = report["environment"]["host"]
    requests = report["profiles"][0]["counts"]["requests"]
    print(f"{host['cpu']}, {host['cores']} cores, {requests} requests a backend, batch 1, interleaved.")


if __name__ == "__main__":
    main()
