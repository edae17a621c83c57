"""Precisions of TensorRT graphs against PyTorch, through the same gates an export has to pass."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from export import to_tensorrt
from export.cli import main
from export.options import ExportOptions
from export.parity import GATES, trt_gate
from vlm.errors import UserError

SMALL = {"layers": 1, "vision_layers": 1}


@pytest.mark.parametrize(
    ("precision", "tower", "decoder"),
    [("bf16", "clip", "qwen3"), ("int8", "siglip", "llama"), ("int4", "siglip", "qwen2")],
)
def test_graphs_answer_as_pytorch_does(precision: str, tower: str, decoder: str, exported: Callable[..., Any]) -> None:
    manifest = exported("tensorrt", precision, tower, decoder, **SMALL).manifest
    assert manifest.parity["failures"] == []
    assert manifest.verified
    bits = {name: section["bits_per_weight"] for name, section in manifest.precision.items()}
    low, high = {"bf16": (15.9, 16.2), "int8": (8, 8.4), "int4": (4, 4.5)}[precision]
    assert low <= bits["decoder"] <= high
    assert manifest.model["kv_type"] == {"bf16": "bf16"}.get(precision, "fp16")


def test_rounding_is_really_there(exported: Callable[..., Any]) -> None:
    """A rounding that changed nothing would pass every gate."""
    students = {"bf16": ("clip", "qwen3"), "int8": ("siglip", "llama"), "int4": ("siglip", "qwen2")}
    worst = {p: exported("tensorrt", p, *s, **SMALL).manifest.parity["worst"] for p, s in students.items()}
    assert worst["bf16"]["prefill"] > 1e-3
    assert worst["int8"]["prefill"] > 5e-3
    assert worst["int4"]["decode"] > 0.05


def test_bfloat16_is_rounded_as_pytorch_rounds_it(tmp_path: Path) -> None:
    import onnx
    import torch
    from onnx import TensorProto, helper, numpy_helper, save

    from export.emulate import as_float32, uses_bfloat16
    from export.ort import session

    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=(8, 4)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["a"], to=TensorProto.BFLOAT16),
            helper.make_node("MatMul", ["a", "w"], ["b"]),
            helper.make_node("Add", ["b", "b"], ["c"]),
            helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 4])],
        [numpy_helper.from_array(w.astype(__import__("ml_dtypes").bfloat16), "w")],
    )
    path = tmp_path / "g.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    assert uses_bfloat16(path)
    onnx.save(onnx.load(str(path)), str(path), save_as_external_data=True, location="g.data", size_threshold=0)
    os.link(tmp_path / "g.data", tmp_path / "second.data")  # finished stages are hard links
    as_float32(path, tmp_path / "wide.onnx")
    assert not uses_bfloat16(tmp_path / "wide.onnx")
    (got,) = session(path, emulated=True).run(None, {"x": x})
    a, b = torch.from_numpy(x).bfloat16(), torch.from_numpy(w).bfloat16()
    product = (a.float() @ b.float()).bfloat16()
    assert np.array_equal(got, (product + product).float().numpy())


def test_a_mixed_artefact_is_held_to_its_coarsest_part() -> None:
    gate = trt_gate("fp16", "int4", "fp16")
    assert gate.prefill == GATES["tensorrt", "int4"].prefill
    assert gate.cosine == GATES["tensorrt", "fp16"].cosine
    assert trt_gate("int8", "fp16", "fp16").cosine == GATES["tensorrt", "int8"].cosine


def test_small_matrices_fall_back_and_say_so(students: Callable[..., Any]) -> None:
    from export.to_tensorrt import TrtStorage, graphs
    from export.trt_precision import parse_trt_precision

    student = students(
        "siglip", "qwen2", layers=1, vision_layers=1, hidden=96, heads=3, kv_heads=1, head_dim=32
    ).student
    _, decoder = graphs(student, TrtStorage(parse_trt_precision("int4")))
    decoder.build()
    # q, k, v, o, gate, up and the head have 96 columns; down has 512
    assert sum(decoder.fallbacks.values()) == 7
    assert all("96 columns" in reason for reason in decoder.fallbacks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "fp16", "--awq"], "--awq does nothing at --precision fp16"),
        (["--precision", "int8", "--algorithm", "search"], "--algorithm search does nothing at --precision int8"),
    ],
)
def test_an_option_without_effect_is_refused(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["--target", "tensorrt", "--student", str(tmp_path), "--out", str(tmp_path / "o"), *options])
    ExportOptions("tensorrt", tmp_path, tmp_path / "o", "fp16,vision=int4", awq=True, algorithm="search")


class Watched:
    """A table that notes how long its file is whenever rows are read."""

    def __init__(self, values: Any, path: Path) -> None:
        self.values, self.path, self.lengths = values, path, list[int]()
        self.shape = values.shape

    def detach(self) -> Watched:
        return self

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> Any:
        self.lengths.append(self.path.stat().st_size)
        return self.values[rows]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_table_takes_its_room_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """A file that has its length first and is filled through memory ends the process on a full disk."""
    import torch

    path = tmp_path / "table.npy"
    watched = Watched(torch.randn(300, 4000), path)
    language = SimpleNamespace(embed_tokens=SimpleNamespace(weight=watched))
    student: Any = SimpleNamespace(model=SimpleNamespace(model=SimpleNamespace(language_model=language)))
    monkeypatch.setattr(to_tensorrt, "TABLE_ROWS", 128)
    to_tensorrt._write_table(student, path, dtype)
    stored = np.load(path, mmap_mode="r")
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored, watched.values.numpy().astype(dtype))
    assert len(watched.lengths) == 3
    assert watched.lengths[0] < watched.lengths[1] < watched.lengths[2] < path.stat().st_size
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        to_tensorrt._write_table(student, path, dtype)
