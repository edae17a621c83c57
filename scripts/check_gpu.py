"""`scripts/check-gpu`: what only a machine with TensorRT and a GPU can show about our engines.

For each precision the GPU has: export, build, then
- parity: the engines' logits and visual tokens against PyTorch's, stored at export, under the export's own gates;
- graphs: recorded CUDA graphs give the same logits as plain execution, and what they save, both in turns;
- profiles: prompts in pieces, up to the last row of the context, every image bucket and their sums;
- speed: `runtime profile` on the engines, on ONNX Runtime's TensorRT and CUDA providers, and on PyTorch CUDA.
Exit codes: 0 all held, 1 something did not, 3 no TensorRT or GPU here.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from export import build_engine, parity
from export.backends import chat_tokenizer, gate_of
from export.evidence import load_reference
from export.replay import Prompt, make_prompt
from export.trt_precision import PRESETS, TRT_KINDS
from runtime.api import PreparedImage
from runtime.api import Prompt as RuntimePrompt
from runtime.backend_tensorrt import open_tensorrt
from runtime.delta import RESERVED, DeltaBackend
from runtime.options import LoadOptions
from vlm import engine_key, preprocess
from vlm.console import Parser, note, print_json, run_command
from vlm.errors import MissingPiece, ToolError, UserError
from vlm.load import newest_run
from vlm.manifest import read_manifest
from vlm.preprocess import open_image

RESULTS = Path("benchmarks/results")
STEPS = 32
ROUNDS = 12
PIECES = (1, 7, 64)
KEPT = ("metrics", "stages_ms", "memory_mb", "energy", "roofline", "stability")


class OnEngine:
    """The runtime's backend as `export.replay.Backend`, so that the export's own comparison runs it."""

    def __init__(self, backend: DeltaBackend) -> None:
        self.backend = backend
        self.source = backend._source

    def features(self, image: Pillow.Image) -> Any:
        pixels = preprocess.pixels(image, self.source.image)
        return np.asarray(self.backend.encode([PreparedImage("", pixels)])[0], np.float32)

    def prefill(self, prompt: Prompt) -> Any:
        return self.take(prompt)

    def take(self, prompt: Prompt, piece: int = 1 << 20) -> Any:
        """As prefill, in pieces."""
        start = prompt.ids.index(self.source.tokenizer.spec.image_token_id)
        given = RuntimePrompt(prompt.ids, (PreparedImage("", None, start),))
        embeds = [self.features(prompt.image)]
        for first in range(0, len(prompt.ids), piece):
            logits_V = self.backend.prefill(given, embeds, first, min(first + piece, len(prompt.ids)))
        return np.array(logits_V)

    def step(self, token: int) -> Any:
        return np.array(self.backend.step(token))

    def close(self) -> None:
        self.backend.close()


def check_artefact(root: Path) -> dict[str, Any]:
    """Everything about one artefact's engines but the speed of others; `failures` lists what did not hold."""
    manifest = read_manifest(root)
    tokenizer, gate = chat_tokenizer(root, manifest), gate_of(manifest)
    prompts = [make_prompt(tokenizer, open_image(root / g.image), g.question) for g in manifest.golden]
    expected = load_reference(manifest.path_of(root, "reference"))
    engine = OnEngine(open_tensorrt(root, LoadOptions(), manifest))
    try:
        cases = {
            f"golden {i}": parity.replay_case(engine, p, e)
            for i, (p, e) in enumerate(zip(prompts, expected, strict=True))
        }
        failures = parity.all_failures(cases, gate)
        worst = parity.report(gate, cases, {}, failures)["worst"]
        graphs, more = compare_graphs(engine, prompts[0], gate)
        profiles, most = check_profiles(engine, prompts[0], gate)
    finally:
        engine.close()
    return {"parity": worst, "graphs": graphs, "profiles": profiles, "failures": failures + more + most}


def compare_graphs(engine: OnEngine, prompt: Prompt, gate: parity.Gate) -> tuple[dict[str, Any], list[str]]:
    """Recorded and plain execution in turns: greatest difference of logits, and seconds a token."""
    runner: Any = engine.backend._runner
    forced = np.random.default_rng(0).integers(4, engine.backend.info.vocab_size, STEPS)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    rows: dict[bool, Any] = {}
    for turn in range(2 * (ROUNDS + 1)):
        record = turn % 2 == 0
        runner._record = record
        engine.prefill(prompt)
        started, logits = time.perf_counter(), []
        for token in forced:
            step = engine.backend.step(int(token))
            step.argmax()
            if turn < 2:
                logits.append(np.array(step))
        if turn < 2:
            rows[record] = np.stack(logits)
        else:
            seconds[record].append((time.perf_counter() - started) / STEPS)
    runner._record = True
    spread = float(rows[False].std())
    far = float(np.abs(rows[True] - rows[False]).max() / spread)
    ratios = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    found = {
        "recorded": sorted(runner._recorded),
        "difference": far,
        "token_ms": {"graph": _ms(seconds[True]), "plain": _ms(seconds[False])},
        "ratio": statistics.median(ratios),
        "spread": list(np.quantile(ratios, (0.25, 0.75))),
        "n": ROUNDS,
    }
    failures = [] if far <= gate.decode else [f"graphs: logits differ by {far:.3g} of a standard deviation"]
    return found, failures + ([] if runner._recorded else ["graphs: nothing could be recorded"])


def _ms(seconds: Sequence[float]) -> float:
    return 1e3 * statistics.median(seconds)


def check_profiles(engine: OnEngine, prompt: Prompt, gate: parity.Gate) -> tuple[dict[str, Any], list[str]]:
    """Every way a profile's range is used: pieces, the end of the context, image buckets."""
    failures: list[str] = []
    whole = engine.prefill(prompt)
    spread = float(whole.std())
    pieces = {piece: float(np.abs(engine.take(prompt, piece) - whole).max() / spread) for piece in PIECES}
    failures += [f"pieces of {p}: logits differ by {d:.3g}" for p, d in pieces.items() if not d <= gate.decode]
    runner: Any = engine.backend._runner
    engine.prefill(prompt)
    last = runner._rows - RESERVED - len(prompt.ids)
    rng = np.random.default_rng(1)
    for token in rng.integers(4, engine.backend.info.vocab_size, last):
        logits_V = engine.backend.step(int(token))
    if not np.isfinite(np.array(logits_V)).all():
        failures.append("the last row of the context gives no finite logits")
    pixels = preprocess.pixels(prompt.image, engine.source.image)
    one = engine.backend.encode([PreparedImage("", pixels)])[0].astype(np.float32)
    images = {}
    for count in range(1, 2 * max(runner._images)):
        many = engine.backend.encode([PreparedImage("", pixels)] * count)
        images[count] = max(float(np.abs(m.astype(np.float32) - one).max() / one.std()) for m in many)
    failures += [f"{n} images: visual tokens differ by {d:.3g}" for n, d in images.items() if not d <= 0.1]
    return {"pieces": pieces, "context": runner._rows - RESERVED, "images": images}, failures


def speed(artefact: Path, student: Path, requests: int) -> dict[str, Any]:
    """`runtime profile` in a process each; what cannot run says why."""
    sides = {
        "engines": [str(artefact)],
        "ort-tensorrt": [str(artefact), "--provider", "tensorrt"],
        "ort-cuda": [str(artefact), "--provider", "cuda"],
        "torch-cuda": [str(student)],
    }
    found: dict[str, Any] = {}
    for name, arguments in sides.items():
        note(f"profiling {name}")
        command = [
            sys.executable,
            "-m",
            "runtime",
            "profile",
            *arguments,
            "--device",
            "cuda",
            "--requests",
            str(requests),
            "--json",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        profiles = json.loads(done.stdout.strip().splitlines()[-1])["profiles"] if done.returncode == 0 else []
        if profiles:
            found[name] = {key: profiles[0][key] for key in KEPT}
        else:
            found[name] = {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return found


def precisions(asked: str | None, sm: str) -> list[str]:
    """Those asked for, else all that this GPU computes."""
    if asked:
        return asked.split(",")
    modern = float(sm) >= 8.0
    return [name for name, p in PRESETS.items() if modern or TRT_KINDS[p.decoder].activation != "bfloat16"]


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="scripts/check-gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, help="checkpoint directory (default: newest finished run)")
    parser.add_argument("--precision", help="comma-separated (default: all this GPU has)")
    parser.add_argument("--requests", type=int, default=64, help="per side of the profile (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("artifacts/check-gpu"), help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        device = engine_key.device_facts()
        import tensorrt
    except (engine_key.Missing, ImportError) as error:
        raise MissingPiece(f"nothing was checked, this needs TensorRT and a GPU ({error})") from None
    student = arguments.student or newest_run()
    rows: dict[str, Any] = {}
    for precision in precisions(arguments.precision, device["sm"]):
        root = arguments.out / precision
        note(f"{precision}: exporting {student}")
        command = [sys.executable, "-m", "export", "--target", "tensorrt", "--student", str(student)]
        command += ["--precision", precision, "--out", str(root)]
        if subprocess.run(command, check=False).returncode not in (0, 1):
            raise UserError(f"{precision} could not be exported or built; its messages are above")
        try:
            folder, _ = build_engine.build(root)
            record = json.loads((folder / engine_key.RECORD).read_text())
            rows[precision] = {
                "build": {
                    "seconds": record["seconds"],
                    "files": record["files"],
                    "workspace": record["workspace_bytes"],
                },
                **check_artefact(root),
                "speed": speed(root, student, arguments.requests),
            }
        except (ToolError, build_engine.BuildError, build_engine.Refused) as error:
            rows[precision] = {"failures": [str(error)]}
    result = {"name": "tensorrt", "machine": {**device, "tensorrt": tensorrt.__version__}, "rows": rows}
    name = re.sub(r"[^a-z0-9]+", "-", device["gpu"].lower()).strip("-")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"tensorrt-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    failed = {p: row["failures"] for p, row in rows.items() if row["failures"]}
    for precision, lines in failed.items():
        note(f"{precision}: {'; '.join(lines)}")
    print_json({"name": "tensorrt", "held": not failed, "failures": failed})
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main)
