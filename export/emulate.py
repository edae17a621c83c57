"""A bfloat16 graph as float32 operators with the rounding of bfloat16, for processors without bfloat16 arithmetic.

Every value that was bfloat16 is computed in float32 and rounded once, which is what a GPU's matrix units do. So the
graph that is checked is the graph that is shipped, operator by operator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.trt_ops import value_types


def uses_bfloat16(path: Path) -> bool:
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    values = (*graph.input, *graph.output)
    kinds = {t.data_type for t in graph.initializer} | {v.type.tensor_type.elem_type for v in values}
    return onnx.TensorProto.BFLOAT16 in kinds


def _read(tensor: Any, folder: Path) -> None:
    """Take a tensor's values in; the onnx package itself refuses files with several hard links, as finished stages are."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    if not where:
        return
    with open(folder / where["location"], "rb") as f:
        f.seek(int(where.get("offset", 0)))
        tensor.raw_data = f.read(int(where["length"]))
    del tensor.external_data[:]
    tensor.ClearField("data_location")


def as_float32(path: Path, target: Path) -> None:
    """Write the graph again with float32 in place of bfloat16 everywhere, inputs and outputs included."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(str(path), load_external_data=False)
    types = value_types(model)
    graph = model.graph
    for tensor in graph.initializer:
        _read(tensor, path.parent)
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes: list[Any] = []
    for original in graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        rounded = [name for name in node.output if types.get(name) == "BFLOAT16"]
        if node.op_type == "Cast" and rounded:
            node.attribute[0].i = TensorProto.FLOAT
        if node.op_type == "Constant" and rounded:
            tensor = node.attribute[0].t
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))
        nodes.append(node)
        for name in rounded:
            wide, narrow = f"{name}.wide", f"{name}.bf16"
            node.output[list(node.output).index(name)] = wide
            nodes.append(helper.make_node("Cast", [wide], [narrow], to=TensorProto.BFLOAT16))
            nodes.append(helper.make_node("Cast", [narrow], [name], to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    onnx.save(model, str(target), save_as_external_data=True, location=f"{target.name}_data", size_threshold=1024)
