"""Real mistakes, one at a time, injected into ONNX files that were right: logits or pixels must show each of them.

Generated text is not looked at: in a trial greedy tokens alone caught 5 faults of 12.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import parity
from export.backends import gate_of, image_spec, open_backend
from export.evidence import embedding_parity, pixel_parity
from export.measure import PIXEL_LIMIT, every_position, padded_pair, replay_cases
from vlm.manifest import Manifest, read_manifest

Weights = dict[str, Any]
VISION, EMBED, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"


def edit(root: Path, stem: str, change: Callable[[Weights], None], graph: Callable[[Any], None] | None = None) -> None:
    """Load a graph with its weights as arrays by name, change them, write it back in the same layout."""
    import onnx
    from onnx import numpy_helper

    path = next((root / "onnx").glob(f"{stem}*.onnx"))
    model = onnx.load(str(path))
    weights = {t.name: numpy_helper.to_array(t).copy() for t in model.graph.initializer}
    change(weights)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    if graph is not None:
        graph(model.graph)
    data = path.with_name(path.name + "_data")
    data.unlink()
    onnx.save(model, str(path), save_as_external_data=True, location=data.name, size_threshold=1024)


def faults_seen(made: Any, root: Path, manifest: Manifest) -> list[str]:
    """What logits, visual tokens, embeddings and pixels say; the text is left out."""
    subject, gate = made.subject, gate_of(manifest)
    checkpoint, evidence = subject.student.checkpoint, subject.evidence
    backend: Any = open_backend(root, manifest)
    cases = replay_cases(backend, evidence)
    cases["every_position"] = every_position(evidence, backend)
    cases["batch_of_two"] = padded_pair(checkpoint.tokenizer.spec.pad_token_id, evidence, backend, gate)
    found = parity.all_failures(cases, gate)
    if not embedding_parity(evidence, backend.embeddings)["max"] <= gate.embedding:
        found.append("embeddings")
    return found + (["pixels"] if pixel_parity(checkpoint, evidence, image_spec(manifest))["max"] > PIXEL_LIMIT else [])


def scale(name: str, factor: float) -> Callable[[Weights], None]:
    def change(w: Weights) -> None:
        w[name] = w[name] * np.asarray(factor, w[name].dtype)

    return change


def swap(*names: str) -> Callable[[Weights], None]:
    def change(w: Weights) -> None:
        w[names[0]], w[names[1]] = w[names[1]], w[names[0]]

    return change


def roll(name: str, axis: int, by: int = 1) -> Callable[[Weights], None]:
    def change(w: Weights) -> None:
        w[name] = np.roll(w[name], by, axis=axis)

    return change


def zero(*names: str) -> Callable[[Weights], None]:
    def change(w: Weights) -> None:
        for name in names:
            w[name][:] = 0

    return change


def one_weight(w: Weights) -> None:
    w["layers.0.up.weight"][3, 5] += 3 * w["layers.0.up.weight"].std()


def half_precision(w: Weights) -> None:
    w["layers.0.down.weight"] = w["layers.0.down.weight"].astype(np.float16).astype(np.float32)


def swapped_colours(w: Weights) -> None:
    w["kernel"] = np.ascontiguousarray(w["kernel"][:, ::-1])


def swapped_layers(w: Weights) -> None:
    for name in [n for n in w if n.startswith("layers.0.")]:
        other = name.replace("layers.0.", "layers.1.")
        if other in w and w[other].shape == w[name].shape:
            w[name], w[other] = w[other], w[name]


def other_eps(w: Weights) -> None:
    small = [n for n, v in w.items() if v.ndim == 0 and v.dtype == np.float32 and 0 < v < 1e-4]
    assert small, "no epsilon in the graph"
    for name in small:
        w[name] = np.float32(1e-3)


def no_causal_mask(graph: Any) -> None:
    """Every key allowed: the comparison of key and query positions becomes `x <= x`."""
    node = next(n for n in graph.node if n.op_type == "LessOrEqual")
    node.input[1] = node.input[0]


def keep(_: Weights) -> None:
    """No change."""


FAULTS: dict[str, tuple[str, Callable[[Weights], None], Callable[[Any], None] | None]] = {
    "swapped keys and values": (DECODER, swap("layers.0.k.weight", "layers.0.v.weight"), None),
    "swapped gate and up": (DECODER, swap("layers.0.gate.weight", "layers.0.up.weight"), None),
    "swapped layers": (DECODER, swapped_layers, None),
    "heads in another order": (DECODER, roll("layers.1.q.weight", 1, 64), None),
    "q scaled by 1.02": (DECODER, scale("layers.1.q.weight", 1.02), None),
    "attention bias of q dropped": (DECODER, zero("layers.0.q.bias"), None),
    "attention bias of v dropped": (DECODER, zero("layers.1.v.bias"), None),
    "one weight changed": (DECODER, one_weight, None),
    "one matrix in half precision": (DECODER, half_precision, None),
    "head scaled by 1.001": (DECODER, scale("head.weight", 1.001), None),
    "other rope base": (DECODER, scale("inv_freq", 1.01), None),
    "wrong epsilon of the norms": (DECODER, other_eps, None),
    "no causal mask": (DECODER, keep, no_causal_mask),
    "head of another token order": (DECODER, roll("head.weight", 1), None),
    "embeddings scaled by 1.001": (EMBED, scale("weight", 1.001), None),
    "embeddings of the next token": (EMBED, roll("weight", 0), None),
    "dropped vision block": (VISION, zero("blocks.1.o.weight", "blocks.1.fc2.weight"), None),
    "rolled vision positions": (VISION, roll("positions", 0), None),
    "red and blue swapped": (VISION, swapped_colours, None),
    "projector bias dropped": (VISION, zero("linear_2.bias"), None),
    "vision norm scaled by 1.001": (VISION, scale("blocks.0.norm1.weight", 1.001), None),
    "vision queries scaled by 1.02": (VISION, scale("blocks.1.q.weight", 1.02), None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_shows_in_the_logits(exported: Callable[..., Any], tmp_path: Path, fault: str) -> None:
    made = exported("onnx", "fp32", "siglip", "qwen2")
    root = made.copy_to(tmp_path / "broken")
    edit(root, *FAULTS[fault])
    assert [line for line in faults_seen(made, root, made.manifest) if line != "pixels"]


PIXEL_FAULTS = {
    "wrong mean": {"mean": [0.45, 0.5, 0.5]},
    "wrong standard deviation": {"std": [0.5, 0.5, 0.4]},
    "wrong resize filter": {"resample": 2},
    "crop instead of stretch": {"resize": "shortest_edge_crop"},
}


@pytest.mark.parametrize("fault", PIXEL_FAULTS)
def test_fault_shows_in_the_pixels(exported: Callable[..., Any], fault: str) -> None:
    """A gate whose two sides share their preprocessing would be blind to these."""
    made = exported("onnx", "fp32", "siglip", "qwen2")
    wrong = dataclasses.replace(made.manifest, image={**made.manifest.image, **PIXEL_FAULTS[fault]})
    assert "pixels" in faults_seen(made, made.root, wrong)


@pytest.mark.parametrize("stem", [VISION, DECODER])
def test_rewriting_without_a_fault_passes(exported: Callable[..., Any], tmp_path: Path, stem: str) -> None:
    made = exported("onnx", "fp32", "siglip", "qwen2")
    root = made.copy_to(tmp_path / "same")
    edit(root, stem, keep)
    assert faults_seen(made, root, read_manifest(root)) == []


def swapped_nibbles(w: Weights) -> None:
    for name in [n for n in w if w[n].dtype == np.uint8 and n.startswith("layers.0.down")]:
        w[name] = ((w[name] & 15) << 4) | (w[name] >> 4)


QUANTISED_FAULTS = {
    "blocks in another order": (DECODER, roll("layers.0.down.scales", 1)),
    "nibbles swapped": (DECODER, swapped_nibbles),
    "scales doubled": (DECODER, scale("layers.1.o.scales", 2.0)),
    "rows of the head shifted": (DECODER, roll("head.weight", 0)),
    "rolled vision positions": (VISION, roll("positions", 0)),
    "embeddings of the next token": (EMBED, roll("weight", 0)),
}


@pytest.mark.parametrize("fault", QUANTISED_FAULTS)
def test_fault_shows_behind_rounding_to_four_bits(exported: Callable[..., Any], tmp_path: Path, fault: str) -> None:
    made = exported("onnx", "int4", "siglip", "qwen2")
    root = made.copy_to(tmp_path / "broken")
    edit(root, *QUANTISED_FAULTS[fault])
    assert faults_seen(made, root, made.manifest)
