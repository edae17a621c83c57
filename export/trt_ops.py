"""Which ONNX operators and types the TensorRT parsers we claim take, and a check of our graphs against that.

Sources, read on the parsers' own pages: `docs/operators.md` of onnx-tensorrt at 10.1 (the changelog up to 10.3 only adds
to it) and at 10.15, whose table no later release has narrowed for the operators below. Only what our graphs use is
listed; anything else is refused at export, on the machine that has time, not on the board.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.errors import GateFailed

FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
NUMBERS = FLOATS | {"INT32", "INT64"}
ANY = NUMBERS | {"BOOL"}
MIN_OPSET = 9


@dataclass(frozen=True)
class Rule:
    """One operator.

    Attributes:
        types: element types of its data inputs and outputs.
        constant: inputs, by place, that must be stored values and not computed.
        zero: inputs, by place, that must be stored and zero (symmetric quantisation only).
        outputs: how many outputs may be used.
    """

    types: frozenset[str]
    constant: tuple[int, ...] = ()
    zero: tuple[int, ...] = ()
    outputs: int = 1


@dataclass(frozen=True)
class Parser:
    """What the parser of one TensorRT release takes."""

    version: str
    max_opset: int
    rules: dict[str, Rule]


_COMMON: dict[str, Rule] = {
    "Add": Rule(NUMBERS),
    "ArgMax": Rule(NUMBERS),
    "Cast": Rule(ANY),
    "Concat": Rule(ANY),
    "Conv": Rule(FLOATS),
    "Cos": Rule(FLOATS),
    "DequantizeLinear": Rule(FLOATS | {"INT8", "INT4"}, constant=(1,), zero=(2,)),
    "Div": Rule(NUMBERS),
    "Erf": Rule(FLOATS),
    "Expand": Rule(ANY),
    "Gather": Rule(ANY),
    "Gelu": Rule(FLOATS),
    "Identity": Rule(ANY),
    "LayerNormalization": Rule(FLOATS),
    "MatMul": Rule(FLOATS),
    "Mul": Rule(NUMBERS),
    "Neg": Rule(NUMBERS),
    "Pow": Rule(FLOATS),
    "QuantizeLinear": Rule(FLOATS | {"INT8"}, constant=(1,), zero=(2,)),
    "ReduceMean": Rule(NUMBERS, constant=(1,)),
    "Reshape": Rule(ANY),
    "Shape": Rule(ANY),
    "Sigmoid": Rule(FLOATS),
    "Sin": Rule(FLOATS),
    "Slice": Rule(ANY, constant=(3,)),
    "Softmax": Rule(FLOATS),
    "Sqrt": Rule(FLOATS),
    "Squeeze": Rule(ANY, constant=(1,)),
    "Sub": Rule(NUMBERS),
    "Tanh": Rule(FLOATS),
    "Transpose": Rule(ANY),
    "Unsqueeze": Rule(ANY, constant=(1,)),
    "Where": Rule(ANY),
}
_LATER = {**_COMMON, "Pow": Rule(NUMBERS), "Slice": Rule(ANY)}
# 10.3 names opset 20 as its last; it takes the 21 of int4 all the same, which 20 cannot express (see `check`)
PARSERS = (Parser("10.3", 20, _COMMON), Parser("10.13", 22, _LATER), Parser("11.4", 24, _LATER))
STORED = ANY | {"INT8", "INT4"}


def check(path: Path, parsers: tuple[Parser, ...] = PARSERS) -> None:
    """Hold a graph to every parser we claim.

    Raises:
        GateFailed: names the file, the first operator, type or opset, and the version that does not take it.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for parser in parsers:
        for problem in problems(model, parser):
            raise GateFailed(f"{path.name}: TensorRT {parser.version} does not take {problem}")


def problems(model: Any, parser: Parser) -> Iterator[str]:
    """Everything in the graph outside what one parser takes."""
    import onnx

    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            stored[node.output[0]] = node.attribute[0].t
    name_of = onnx.TensorProto.DataType.Name
    used = {name_of(tensor.data_type) for tensor in stored.values()}
    domains = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    foreign = [node for node in graph.node if node.domain not in ("", "ai.onnx")]
    for node in foreign:
        yield f"{node.domain}.{node.op_type}"
    if foreign:
        return  # types behind them are anybody's guess
    # ONNX has int4 from opset 21 only, so a parser that takes int4 takes these graphs
    last = max(parser.max_opset, 21) if "INT4" in used else parser.max_opset
    if not MIN_OPSET <= domains["ai.onnx"] <= last:
        yield f"opset {domains['ai.onnx']}"
    for unknown in sorted(used - STORED):
        yield f"a stored {unknown} tensor"
    types = value_types(model)
    for node in graph.node:
        if node.op_type != "Constant":
            yield from _node_problems(node, parser, stored, types)


def _node_problems(node: Any, parser: Parser, stored: dict[str, Any], types: dict[str, str]) -> Iterator[str]:
    from onnx import numpy_helper

    rule = parser.rules.get(node.op_type)
    if rule is None:
        yield f"{node.op_type}"
        return
    data = [node.input[0], *(name for name in node.output if name)]
    for kind in sorted({types[name] for name in data if name in types} - rule.types - _free(node.op_type)):
        yield f"{node.op_type} on {kind}"
    for place in (*rule.constant, *rule.zero):
        if len(node.input) > place and node.input[place] and node.input[place] not in stored:
            yield f"{node.op_type} whose input {place} is computed"
    for place in rule.zero:
        tensor = stored.get(node.input[place]) if len(node.input) > place else None
        if tensor is not None and (len(tensor.external_data) or numpy_helper.to_array(tensor).any()):
            yield f"{node.op_type} with a zero point that is not 0"
    if sum(bool(name) for name in node.output) > rule.outputs:
        yield f"{node.op_type} with {len(node.output)} outputs"


def _free(operator: str) -> frozenset[str]:
    """Types that an operator's result has whatever it works on."""
    return frozenset({"INT64"}) if operator in ("ArgMax", "Shape") else frozenset()


def value_types(model: Any) -> dict[str, str]:
    """Element type of every value, as ONNX infers it; shapes are not needed and external data is not read."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model)
    name_of = onnx.TensorProto.DataType.Name
    graph = inferred.graph
    known = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    known |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {name: name_of(kind) for name, kind in known.items() if kind}
