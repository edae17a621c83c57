"""Block quantisation and calibration against naive versions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from export.blocks import Blocks, quantise
from export.calibrate import Group, Seen, best_scale, fold_scales, groups, observe
from export.evidence import calibration_prompts
from export.linear import Recipe, linear
from export.precision import KINDS
from export.reference import TorchBackend
from export.widen import stored_dtype, widen


def naive(blocks: Blocks, block: int) -> np.ndarray[Any, Any]:
    """Code by code."""
    rows, columns = len(blocks.packed_NGb), blocks.columns
    out = np.zeros((rows, columns), np.float32)
    for n in range(rows):
        for k in range(columns):
            group, place = divmod(k, block)
            if blocks.bits == 8:
                code = int(blocks.packed_NGb[n, group, place])
            else:
                byte = int(blocks.packed_NGb[n, group, place // 2])
                code = byte >> 4 if place % 2 else byte & 15
            out[n, k] = (code - (1 << (blocks.bits - 1))) * blocks.scales_NG[n, group]
    return out


@pytest.mark.parametrize("columns", [64, 80])
@pytest.mark.parametrize(("bits", "algorithm"), [(4, "default"), (4, "search"), (8, "default")])
def test_values_are_what_the_codes_say_and_near_the_weights(bits: int, algorithm: Any, columns: int) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(6, columns)).astype(np.float32))
    blocks = quantise(weight, bits, algorithm)
    assert np.array_equal(blocks.values_NK(), naive(blocks, 32))
    error = np.abs(blocks.values_NK() - weight.numpy()).max()
    assert error < (0.45 if bits == 4 else 0.02)  # the search may cut the largest values


def test_runtime_multiplies_by_the_same_values() -> None:
    """MatMulNBits on a one-node graph against `Blocks.values_NK`."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 64)).astype(np.float32)
    blocks = quantise(torch.from_numpy(rng.normal(size=(5, 64)).astype(np.float32)), 4, "search")
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=64, N=5, bits=4, block_size=32
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 5])],
        [numpy_helper.from_array(blocks.packed_NGb, "w"), numpy_helper.from_array(blocks.scales_NG, "s")],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx.ModelProto.SerializeToString(model), options)
    assert np.allclose(session.run(None, {"x": x})[0], x @ blocks.values_NK().T, atol=1e-4)


def test_search_is_never_worse_and_heeds_importance() -> None:
    rng = np.random.default_rng(2)
    weight = torch.from_numpy(rng.standard_t(3, size=(64, 256)).astype(np.float32))
    importance = torch.from_numpy(rng.lognormal(0, 2, 256).astype(np.float32))

    def error(algorithm: Any, given: Any) -> float:
        delta = quantise(weight, 4, algorithm, given).values_NK() - weight.numpy()
        return float((delta**2 * importance.numpy()).sum())

    assert error("search", importance) < error("search", None) < error("default", None)


def test_all_zero_blocks_stay_zero() -> None:
    for algorithm in ("default", "search"):
        assert not quantise(torch.zeros(4, 64), 4, algorithm).values_NK().any()  # type: ignore[arg-type]


@pytest.mark.parametrize("decoder", ["qwen2", "qwen3"])
def test_folding_leaves_the_function_as_it_is(subjects: Callable[..., Any], decoder: str) -> None:
    """Weights read through the folds, put into a copy of the model: same logits, to rounding."""
    import copy
    import dataclasses

    student = subjects("siglip", decoder).student
    prompts, more = calibration_prompts(student, None, count=4)
    calibration = observe(student, prompts, more)
    folded = fold_scales(student, calibration, 4, ("vision", "decoder", "head"))
    assert len(folded.folds) > 10
    twin = copy.deepcopy(student.model)
    twin.lm_head.weight = torch.nn.Parameter(twin.lm_head.weight.clone(), requires_grad=False)  # tied to the table
    for path in folded.folds:
        ours, theirs = student.model.get_submodule(path), twin.get_submodule(path)
        for name, _ in ours.named_parameters(recurse=False):
            getattr(theirs, name).copy_(folded.weight(ours, name))
    backend = TorchBackend(dataclasses.replace(student, model=twin))
    before, after = (b.prefill_all(prompts[0]) for b in (TorchBackend(student), backend))
    assert np.abs(before - after).max() < 1e-4 * before.std()


def test_importance_of_a_folded_matrix_is_that_of_what_it_sees(
    subjects: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--awq with --algorithm search: the columns are divided by the scale, and weighed so, as if observed after folding."""
    import copy
    import dataclasses

    student = subjects("siglip", "qwen2").student
    prompts, more = calibration_prompts(student, None, count=2)
    calibration = observe(student, prompts, more)
    folded = fold_scales(student, calibration, 4, ("decoder",))
    twin = copy.deepcopy(student.model)
    twin.lm_head.weight = torch.nn.Parameter(twin.lm_head.weight.clone(), requires_grad=False)
    for path in folded.folds:
        for name, _ in student.model.get_submodule(path).named_parameters(recurse=False):
            getattr(twin.get_submodule(path), name).copy_(folded.weight(student.model.get_submodule(path), name))
    observed = observe(dataclasses.replace(student, model=twin), prompts, more)
    given: list[Any] = []
    monkeypatch.setattr("export.linear.quantise", lambda *a: given.append(a[3]) or quantise(*a))
    path = next(p for p, fold in folded.folds.items() if fold.input is not None)
    recipe = Recipe(folded, KINDS["int4"], algorithm="search", ranges=calibration.ranges())
    list(linear(recipe, student.model.get_submodule(path)).blocks())  # type: ignore[operator]
    seen = observed.seen[path]
    torch.testing.assert_close(given[0], seen.power_K / seen.weight, rtol=1e-3, atol=0)


def test_scale_search_protects_a_loud_channel(subjects: Callable[..., Any]) -> None:
    student = subjects("siglip", "qwen2").student
    group = groups(student, ("decoder",))[0]
    width = student.facts.hidden
    x = torch.randn(64, width)
    x[:, 5] *= 50
    seen = Seen()
    seen.add(x, torch.ones(64) / 64, 64)
    scale = best_scale(student, Group(group.before, group.after), seen, 4)
    assert scale is not None
    assert scale.argmax() == 5


def test_image_and_text_tokens_count_the_same(subjects: Callable[..., Any]) -> None:
    """Mean square of the first layer's input against one computed by hand from hidden states."""
    student = subjects("siglip", "qwen2").student
    prompts, more = calibration_prompts(student, None, count=1)
    seen = observe(student, prompts, more).seen["model.language_model.layers.0.self_attn.q_proj"]
    ids = torch.tensor([[*prompts[0].ids, *more[0]]])
    caught = []
    norm = student.model.model.language_model.layers[0].input_layernorm
    handle = norm.register_forward_hook(lambda _m, _i, output: caught.append(output[0]))
    TorchBackend(student).model(input_ids=ids, pixel_values=TorchBackend(student)._pixels([prompts[0].image]))
    handle.remove()
    is_image = ids[0] == student.checkpoint.tokenizer.spec.image_token_id
    by_hand = (caught[0][is_image].square().mean(0) + caught[0][~is_image].square().mean(0)) / 2
    assert torch.allclose(seen.power_K / seen.weight, by_hand, rtol=1e-4)


def test_widened_sixteen_bit_weights_compute_like_a_float32_copy(subjects: Callable[..., Any], tmp_path: Any) -> None:
    import copy

    student = subjects("clip", "qwen3").student
    narrow = copy.deepcopy(student.model).to(torch.bfloat16)
    full = copy.deepcopy(narrow).float()
    narrow.save_pretrained(tmp_path)
    assert stored_dtype(tuple(tmp_path.glob("*.safetensors"))) == "bfloat16"
    prompt = subjects("clip", "qwen3").evidence.prompts[0]
    feed = {
        "input_ids": torch.tensor([prompt.ids]),
        "pixel_values": TorchBackend(student)._pixels([prompt.image]),
    }
    for module in (full, narrow):  # the rotation table is not a weight
        module.model.language_model.rotary_emb.load_state_dict({}, strict=False)
        module.model.language_model.rotary_emb.inv_freq = student.model.model.language_model.rotary_emb.inv_freq
    with torch.no_grad():
        assert torch.equal(full(**feed).logits, widen(narrow)(**feed).logits)
    assert narrow.lm_head.weight.dtype == torch.bfloat16
