"""The allow-list: what it refuses, and that nothing we write is refused, for every decoder, tower and precision."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.to_onnx import save, trace
from export.to_tensorrt import TrtStorage, graphs
from export.trt_ops import PARSERS, check, problems, value_types
from export.trt_precision import PRESETS, parse_trt_precision
from vlm.errors import GateFailed, UserError

TOWERS = ("siglip", "clip")
DECODERS = ("qwen2", "qwen3", "llama")
SMALL = {"layers": 1, "vision_layers": 1}


def write(subject: Any, precision: str, stem: str, folder: Path, wide: frozenset[str] = frozenset()) -> Path:
    storage = TrtStorage(parse_trt_precision(precision), wide=wide)
    graph = next(g for g in graphs(subject.student, storage) if g.stem == stem)
    path = folder / f"{stem}.onnx"
    save(trace(graph.build(), graph.spec, subject.student, graph.opset), path)
    return path


# Exports check themselves, and those of `test_trt_parity` and `test_tensorrt` have every decoder, tower and precision once.
FULL = pytest.mark.skipif("FULL_MATRIX" not in os.environ, reason="set FULL_MATRIX=1: 27 graphs, some minutes")
KINDS = {"fp32": {"FLOAT"}, "bf16": {"BFLOAT16"}, "int8": {"INT8", "FLOAT16"}, "int4": {"INT4", "FLOAT16"}}


@FULL
@pytest.mark.parametrize("precision", PRESETS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_is_within_every_parser(
    decoder: str, precision: str, students: Callable[..., Any], tmp_path: Path
) -> None:
    path = write(students("siglip", decoder, **SMALL), precision, "decoder", tmp_path)
    check(path)
    assert _kinds(path) >= KINDS.get(precision, {"FLOAT16"})


@FULL
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4,vision=int4"])
@pytest.mark.parametrize("tower", TOWERS)
def test_every_tower_is_within_every_parser(
    tower: str, precision: str, students: Callable[..., Any], tmp_path: Path
) -> None:
    check(write(students(tower, "llama", **SMALL), precision, "vision_encoder", tmp_path))


@FULL
def test_a_wide_residual_stream_is_within_every_parser(students: Callable[..., Any], tmp_path: Path) -> None:
    wide = frozenset({"vision", "decoder"})
    for stem in ("vision_encoder", "decoder"):
        path = write(students("siglip", "llama", **SMALL), "int8", stem, tmp_path, wide)
        check(path)
        assert "FLOAT" in _kinds(path)


def _kinds(path: Path) -> set[str]:
    import onnx

    return set(value_types(onnx.load(str(path), load_external_data=False)).values())


def model(*nodes: Any, stored: dict[str, np.ndarray] | None = None, opset: int = 18, kind: int = 1) -> Any:
    """A graph of one float input `x` and one output, the last node's."""
    from onnx import helper, numpy_helper

    return helper.make_model(
        helper.make_graph(
            list(nodes),
            "g",
            [helper.make_tensor_value_info("x", kind, [2, 4])],
            [helper.make_tensor_value_info(nodes[-1].output[0], 0, None)],
            [numpy_helper.from_array(value, name) for name, value in (stored or {}).items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
    )


def cases() -> dict[str, tuple[Any, str]]:
    from onnx import helper

    node = helper.make_node
    zero, one = np.array(0, np.int8), np.array(1, np.int8)
    scale = np.array(0.1, np.float32)
    axes = np.array([1], np.int64)
    return {
        "operator": (model(node("Einsum", ["x"], ["y"], equation="ij->ji")), "Einsum"),
        "domain": (model(node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft")), "FusedMatMul"),
        "type": (model(node("Sqrt", ["x"], ["y"]), kind=11), "Sqrt on DOUBLE"),
        "opset": (model(node("Sqrt", ["x"], ["y"]), opset=25), "opset 25"),
        "zero point": (
            model(node("QuantizeLinear", ["x", "s", "z"], ["y"]), stored={"s": scale, "z": one}),
            "a zero point that is not 0",
        ),
        "computed scale": (
            model(
                node("Sqrt", ["c"], ["s"]),
                node("QuantizeLinear", ["x", "s", "z"], ["y"]),
                stored={"c": scale, "z": zero},
            ),
            "input 1 is computed",
        ),
        "computed axes": (
            model(node("Neg", ["a"], ["b"]), node("Unsqueeze", ["x", "b"], ["y"]), stored={"a": axes}),
            "input 1 is computed",
        ),
        "outputs": (
            model(
                node("LayerNormalization", ["x", "w"], ["y", "mean", "inverse"]), stored={"w": np.ones(4, np.float32)}
            ),
            "3 outputs",
        ),
        "stored type": (
            model(
                node("Cast", ["u"], ["v"], to=1),
                node("Add", ["x", "v"], ["y"]),
                stored={"u": np.zeros((2, 4), np.uint16)},
            ),
            "a stored UINT16 tensor",
        ),
    }


@pytest.mark.parametrize("name", cases())
def test_what_a_parser_does_not_take_is_named(name: str) -> None:
    graph, expected = cases()[name]
    for parser in PARSERS:
        assert any(expected in problem for problem in problems(graph, parser)), list(problems(graph, parser))


def test_a_file_outside_the_list_is_refused_with_the_version(tmp_path: Path) -> None:
    import onnx

    graph, _ = cases()["operator"]
    onnx.save(graph, str(tmp_path / "odd.onnx"))
    with pytest.raises(GateFailed, match=r"odd\.onnx: TensorRT 10\.3 does not take Einsum"):
        check(tmp_path / "odd.onnx")


def test_a_newer_parser_takes_more(tmp_path: Path) -> None:
    from onnx import helper

    graph = model(
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("Slice", ["x", "a", "c", "b"], ["y"]),
        stored={"a": np.array([0], np.int64), "c": np.array([1], np.int64)},
    )
    assert [bool(list(problems(graph, parser))) for parser in PARSERS] == [True, False, False]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fp8", "choose from fp16"),
        ("int4,vison=fp16", "PART=KIND"),
        ("int4,vision=q4", "PART=KIND"),
        ("fp16,head=fp32", "float16"),
        ("bf16,decoder=int4", "float16"),
    ],
)
def test_wrong_precisions_are_explained(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_trt_precision(text)
