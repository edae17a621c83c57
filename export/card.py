"""README.md of an artefact: where it comes from, what was measured, how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm.console import table
from vlm.manifest import Manifest

ELSEWHERE = {
    "onnx": """\
In JavaScript, with this folder under a local model path (files are picked by the `dtype` map of `config.json`):

```js
import {{ AutoModelForImageTextToText, AutoProcessor, env }} from "@huggingface/transformers";
env.allowRemoteModels = false;
env.localModelPath = "/folder/above";
const processor = await AutoProcessor.from_pretrained("{name}");
const model = await AutoModelForImageTextToText.from_pretrained("{name}", {{ dtype: {dtype} }});
```

In Python, each graph opens in `onnxruntime.InferenceSession("onnx/....onnx")`; names and types are in `manifest.json`.""",
    "gguf": "With llama.cpp: `llama-mtmd-cli -m {text} --mmproj {mmproj} --image photo.png -p 'question'`",
    "tensorrt": "On the device: `python build_engine.py` builds the engines of `build_plan.json`; see docs/tensorrt.md.",
}


def card(name: str, manifest: Manifest) -> str:
    """Markdown for a person who finds the folder; every figure is taken from the manifest."""
    source, scores, parity = manifest.source, manifest.accuracy, manifest.parity
    kinds = list(dict.fromkeys(str(part["type"]) for part in manifest.precision.values()))
    facts = [
        ("format", f"{manifest.format}, {' and '.join(kinds)}"),
        ("verified", "yes" if manifest.verified else "NO: " + "; ".join(parity["failures"])),
        ("student sha256", str(source["student_sha256"])),
        ("objective", _text(source.get("objective"))),
        ("teacher", _text(source.get("teacher"))),
        ("data", _text(source.get("data"))),
        ("licence", _text(source.get("licence"))),
        ("created", manifest.created),
        ("tools", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())),
        *_cost(parity, manifest.verified),
        *_importance(manifest.precision),
    ]
    weights = [
        (part, str(v["type"]), f"{v['bits_per_weight']:.2f}", str(v.get("bytes", "-")), _text(v["fallbacks"] or None))
        for part, v in manifest.precision.items()
    ]
    gate, worst = parity["gate"], parity["worst"]
    measured = [
        (f"{key}, worst case", f"{value:.3g}", f"{gate[key]:.3g}" if key in gate and not _is_pooled(key, gate) else "-")
        for key, value in worst.items()
    ]
    rows = int(parity["pooled"]["rows"])
    measured += [
        (
            f"{key}, mean of {rows} rows",
            f"{parity['pooled'][key]:.3g}",
            f"{gate[key.removesuffix('_tied')]:.3g}" if gate["pooled"] and key != "top1" else "-",
        )
        for key in ("top1", "top1_tied", "kl", "correlation")
    ]
    files = [(f"`{entry.path}`", entry.role, str(entry.bytes)) for entry in manifest.files]
    sections = [
        f"# {name}",
        table(("fact", "value"), facts),
        "## Weights",
        table(("part", "type", "bits per weight", "bytes", "fallbacks"), weights),
        "## Against PyTorch (logits per unit of their standard deviation)",
        table(("measure", "value", "limit"), measured),
        *_ablation(parity.get("ablation")),
        "## Answers",
        _answers(scores),
        "## Files",
        table(("path", "role", "bytes"), files),
        "## Use",
        _elsewhere(name, manifest),
        "Replay on this machine, from this folder: `python -m export verify .`",
    ]
    return "\n\n".join(sections) + "\n"


def _is_pooled(key: str, gate: dict[str, Any]) -> bool:
    return bool(gate["pooled"]) and key in ("top1", "kl", "correlation")


def _cost(parity: dict[str, Any], verified: bool) -> list[tuple[str, str]]:
    made, seen = parity.get("made"), parity.get("calibration")
    rows = [] if made is None else [("made in", f"{made['seconds']:.0f} s, peak {made['peak_rss_bytes'] / 1e6:.0f} MB")]
    if seen is not None:
        rows.append(("calibrated on", f"{seen['prompts']} images, sha256 {seen['sha256'][:16]}"))
    if steps := parity.get("auto_precision"):
        held = "raised until the gates held" if verified else "raised, and the gates still do not hold"
        rows.append((held, " -> ".join(steps)))
    return rows


def _importance(precision: dict[str, Any]) -> list[tuple[str, str]]:
    seen = precision.get("decoder", {}).get("imatrix")
    return [] if seen is None else [("importance matrix", f"{seen['tokens']} tokens: {seen['data']}")]


def _ablation(rows: list[dict[str, Any]] | None) -> list[str]:
    if not rows:
        return []
    cells = [
        (
            row["part"],
            row["kind"],
            f"{row['kl']:.3g}",
            f"{row['top1']:.2%}",
            "-" if row["exact_match"] is None else f"{row['exact_match']:.2%}",
        )
        for row in rows
    ]
    header = ("part back in fp32", "instead of", "KL of the rest", "top-1", "exact match")
    return ["## What each part costs", table(header, cells)]


def _elsewhere(name: str, manifest: Manifest) -> str:
    paths = {entry.role: entry.path for entry in manifest.files}
    dtype = "{}"
    if manifest.format == "onnx":
        suffixes = {"": "fp32", "_fp16": "fp16", "_int8": "int8", "_q4": "q4", "_q4f16": "q4f16"}
        stems = ("vision_encoder", "embed_tokens", "decoder_model_merged")
        chosen = {
            stem: suffixes[Path(paths[role]).stem.removeprefix(stem)]
            for stem, role in zip(stems, ("vision_encoder", "embed_tokens", "decoder"), strict=True)
        }
        dtype = "{ " + ", ".join(f'{stem}: "{kind}"' for stem, kind in chosen.items()) + " }"
    return ELSEWHERE[manifest.format].format(
        name=name, dtype=dtype, text=paths.get("text_gguf"), mmproj=paths.get("mmproj")
    )


def _answers(scores: dict[str, Any]) -> str:
    if not scores["n"]:
        return "No greedy answers were compared."
    low, high = scores["tokens_equal_interval"]
    text = f"{scores['n']} {'samples of --data' if scores.get('given') else 'unseen samples'}: {scores['tokens_equal']:.2%} token for token as PyTorch ({low:.2%} to {high:.2%})."
    if scores["task"]:
        down, up = scores["change_interval"]
        text += (
            f" Exact match on {scores['task']}: {scores['before']:.2%} before, {scores['after']:.2%} after; "
            f"change {scores['change']:+.2%} (paired bootstrap, 95 %: {down:+.2%} to {up:+.2%})."
        )
    return text


def _text(value: Any) -> str:
    """One table cell; nested values as `key value` pairs."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "-" if value is None else str(value).replace("|", "/")


def write_card(root: Path, name: str, manifest: Manifest) -> Path:
    path = root / "README.md"
    path.write_text(card(name, manifest))
    return path
