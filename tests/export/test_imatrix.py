"""Importance matrices: what is gathered, in which form it is stored, and which are taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import imatrix
from export.cli import main
from export.gguf_file import read_tensors
from tests.tiny import make_student
from vlm.errors import UserError
from vlm.manifest import read_manifest


def test_importance_matrix_is_the_mean_square_of_the_inputs(exported: Callable[..., Any]) -> None:
    """Against hooks that keep every activation, image and text tokens weighted equally."""
    import torch

    from export.evidence import calibration_prompts
    from vlm.preprocess import pixels

    made = exported("gguf", "q4_k_m", "siglip", "qwen2")
    stored = imatrix.load(made.manifest.path_of(made.root, "imatrix"))
    student = made.subject.student
    prompts, answers = calibration_prompts(student, None, imatrix.MOST)
    down = student.model.model.language_model.layers[1].mlp.down_proj
    kept: list[Any] = []
    handle = down.register_forward_hook(lambda _m, inputs, _o: kept.append(inputs[0][0]))
    sums, total = 0.0, 0.0
    image_id = student.checkpoint.tokenizer.spec.image_token_id
    for prompt, more in zip(prompts, answers, strict=True):
        ids = torch.tensor([[*prompt.ids, *more]])
        image = torch.from_numpy(pixels(prompt.image, student.checkpoint.image)[None])
        with torch.no_grad():
            student.model(input_ids=ids, pixel_values=image)
        squares, is_image = kept.pop().double().square(), ids[0] == image_id
        sums = sums + squares[is_image].mean(0) / 2 + squares[~is_image].mean(0) / 2
        total += 1
    handle.remove()
    wanted = (sums / total).numpy()
    np.testing.assert_allclose(stored.power["blk.1.ffn_down.weight"], wanted, rtol=1e-4)
    assert set(stored.power) == {*(n for n, t in _text(made).items() if len(t.shape) == 2), "output.weight"}


def _text(made: Any) -> dict[str, Any]:
    return read_tensors(made.manifest.path_of(made.root, "text_gguf"))


def test_importance_matrix_has_the_form_of_llama_imatrix(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "m.gguf"
    power = {"blk.0.attn_q.weight": np.arange(1, 5, dtype=np.float32)}
    imatrix.Importance(power, 100, "some images", "ab").save(path)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["some images"]
    assert {"imatrix.chunk_count", "imatrix.chunk_size"} <= set(reader.fields)
    tensors = {t.name: t for t in reader.tensors}
    assert list(tensors["blk.0.attn_q.weight.in_sum2"].data.reshape(-1)) == [100, 200, 300, 400]
    assert float(tensors["blk.0.attn_q.weight.counts"].data.reshape(-1)[0]) == 100
    again = imatrix.load(path)
    np.testing.assert_array_equal(again.power["blk.0.attn_q.weight"], power["blk.0.attn_q.weight"])
    assert (again.tokens, again.data, again.sha256) == (100, "some images", "ab")


def test_importance_matrix_of_another_model_is_refused(exported: Callable[..., Any], tmp_path: Path) -> None:
    made = exported("gguf", "q4_k_m", "siglip", "qwen2")
    matrix = made.manifest.path_of(made.root, "imatrix")
    other = make_student(tmp_path / "other", hidden=64, head_dim=16, intermediate=64)
    command = ["--target", "gguf", "--precision", "q4_k_m", "--samples", "0", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="columns, this student 64"):
        main([*command, "--student", str(other), "--imatrix", str(matrix)])
    with pytest.raises(UserError, match="no GGUF file"):
        main([*command, "--student", str(other), "--imatrix", str(other / "config.json")])
    assert not (tmp_path / "out").exists()


def test_given_importance_matrix_gives_the_same_file(exported: Callable[..., Any], tmp_path: Path) -> None:
    made = exported("gguf", "q4_k_m", "siglip", "qwen2")
    command = ["--target", "gguf", "--precision", "Q4_K_M", "--samples", "0", "--out", str(tmp_path / "out")]
    matrix = made.manifest.path_of(made.root, "imatrix")
    assert main([*command, "--student", str(made.subject.directory), "--imatrix", str(matrix)]) == 0
    again = read_manifest(tmp_path / "out")
    for name, tensor in read_tensors(again.path_of(tmp_path / "out", "text_gguf")).items():
        np.testing.assert_array_equal(tensor.data, _text(made)[name].data)
