"""Other model classes, as tiny random instances: the numbers of their own forward, through distill.access."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from distill import access, packing, report_data, ribbon
from distill.attention import AttentionTap
from distill.batch import Batch, Normaliser
from distill.config import TERMS, Align, LossWeights
from distill.data import Collator, Example
from distill.groups import part_of
from distill.objective import Objective
from distill.teacher import LiveTeacher, candidate_hidden
from vlm.errors import CheckpointError

IMAGE, PAD, START, END = 60, 0, 58, 59
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
TOKENS = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": START, "vision_end_token_id": END}


def qwen(kind: str) -> nn.Module:
    vision: dict[str, Any] = {"depth": 3, "patch_size": 4, "spatial_merge_size": 2, "num_heads": 2}
    text: dict[str, Any] = {**TEXT, "rope_parameters": MROPE}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48}
    if kind == "qwen2_5_vl":
        vision |= {"window_size": 16, "fullatt_block_indexes": [2]}
    if kind == "qwen3_vl":
        vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
        text |= {"head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
    config = getattr(transformers, f"{names[kind]}Config")(vision_config=vision, text_config=text, **TOKENS)
    return getattr(transformers, f"{names[kind]}ForConditionalGeneration")(config)


def onevision() -> nn.Module:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "vision_use_head": False,
    }
    config = transformers.LlavaOnevisionConfig(
        vision_config=vision,
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_id=IMAGE,
        video_token_id=61,
        image_grid_pinpoints=[[16, 16], [32, 32]],
        vision_feature_layer=-1,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def smol(kind: str) -> nn.Module:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 2,
    }
    name = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[kind]
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision, text_config={**TEXT, "model_type": "llama"}, image_token_id=IMAGE, scale_factor=2
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


BUILD: dict[str, Callable[[], nn.Module]] = {
    "qwen2_vl": lambda: qwen("qwen2_vl"),
    "qwen2_5_vl": lambda: qwen("qwen2_5_vl"),
    "qwen3_vl": lambda: qwen("qwen3_vl"),
    "llava_onevision": onevision,
    "smolvlm": lambda: smol("smolvlm"),
    "idefics3": lambda: smol("idefics3"),
}
SIDE = {"llava_onevision": 16, "smolvlm": 16, "idefics3": 16}
COUNT = {"llava_onevision": 17, "smolvlm": 16, "idefics3": 16}


@pytest.fixture(scope="module", params=list(BUILD))
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    made = BUILD[request.param]()
    made.config._attn_implementation = "sdpa"
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name and "norm" not in name:
                parameter.mul_(4)
            if name.endswith("bias") or name == "model.image_newline":
                parameter.normal_(0, 0.1)
    return made.eval()


def batch_of(model: nn.Module, left: bool) -> Batch:
    """Two images, one image, none; rows of different length, token ids from a generator."""
    kind = model.config.model_type
    side, count = SIDE.get(kind, 16), COUNT.get(kind, 4)
    dice = torch.Generator().manual_seed(7)

    def text(size: int) -> list[int]:
        return torch.randint(3, 50, (size,), generator=dice).tolist()

    image = [START, *[IMAGE] * count, END]
    rows = [[*text(2), *image, *image, *text(7)], [*text(3), *image, *text(5)], text(7)]
    width = max(map(len, rows))
    shape = (len(rows), width)
    ids, mask = torch.full(shape, PAD), torch.zeros(shape, dtype=torch.long)
    for index, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, at], mask[index, at] = torch.tensor(row), 1
    order = mask.cumsum(1) * mask
    length = mask.sum(1, keepdim=True)
    response = (order > length - 3) & mask.bool()
    instruction = (order > length - 5) & (order <= length - 3) & mask.bool()
    pixels = torch.randn(3, 3, side, side, generator=dice)
    return Batch(ids, mask, ids == IMAGE, instruction, response, pixels)


def own_inputs(model: nn.Module, batch: Batch, images: int = 3) -> dict[str, Any]:
    """What the class's own forward takes for the same images; built from its processor's layout, not from ours."""
    kind = model.config.model_type
    pixels = batch.pixels_NCHW
    assert pixels is not None
    pixels = pixels[:images]
    if kind.startswith("qwen"):
        patch, merge = 4, 2
        frames = pixels[:, None].repeat(1, 2, 1, 1, 1)  # an image is two equal frames
        found = []
        for video in frames:
            for row in range(0, 16, patch * merge):
                for column in range(0, 16, patch * merge):
                    for inner_row in range(merge):
                        for inner_column in range(merge):
                            top, left = row + inner_row * patch, column + inner_column * patch
                            cut = video[:, :, top : top + patch, left : left + patch]
                            found.append(cut.permute(1, 0, 2, 3).flatten())
        return {
            "pixel_values": torch.stack(found),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * images),
            "mm_token_type_ids": batch.image_BT.int(),
        }
    if kind == "llava_onevision":  # told that every prompt has several images, the class takes base tiles only
        return {
            "pixel_values": pixels,
            "image_sizes": torch.tensor([[16, 16]] * images),
            "batch_num_images": torch.tensor([images]) if images > 1 else torch.tensor([2]),
        }
    return {"pixel_values": pixels[None]}


def own_logits(model: nn.Module, batch: Batch, images: int = 3) -> Tensor:
    positions = {}
    if not model.config.model_type.startswith("qwen"):
        positions = {"position_ids": batch.position_BT}
    if model.config.model_type == "qwen2_5_vl" or model.config.model_type.startswith("qwen"):
        model.model.rope_deltas = None
    return model(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.attention_mask_BT,
        use_cache=False,
        **positions,
        **own_inputs(model, batch, images),
    ).logits


def real(batch: Batch) -> Tensor:
    return batch.attention_mask_BT.bool()


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_gold_logits_are_the_class_own(model: nn.Module, left: bool) -> None:
    batch = batch_of(model, left)
    with torch.no_grad():
        ours = model.lm_head(access.gold_pass(model, batch, keep_cache=False).hidden_BTD)
        theirs = own_logits(model, batch)
        shuffled = dataclasses.replace(batch, pixels_NCHW=batch.pixels_NCHW.flip(0))
        other = model.lm_head(access.gold_pass(model, shuffled, keep_cache=False).hidden_BTD)
    torch.testing.assert_close(ours[real(batch)], theirs[real(batch)], rtol=0, atol=1e-5)
    assert (other - ours)[0][real(batch)[0]].abs().max() > 1e-3, "the image is seen"


def candidates_of(batch: Batch) -> ribbon.Candidates:
    sample_N, place_N = batch.response_places()
    ids_NK = torch.tensor([[5, 17]]).expand(len(sample_N), -1)
    gold_N = batch.input_ids_BT[sample_N, place_N]
    weight_NK = torch.full(ids_NK.shape, 0.5)
    return ribbon.arrange(ids_NK, weight_NK, sample_N, place_N, gold_N, len(batch.input_ids_BT))


@pytest.mark.parametrize("layout", ["cached", "appended", "interleaved"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_candidates_equal_separate_forwards_of_the_class(model: nn.Module, layout: Any, left: bool) -> None:
    batch = batch_of(model, left)
    candidates = candidates_of(batch)
    with torch.no_grad():
        gold = access.gold_pass(model, batch, keep_cache=layout == "cached")
        ours = model.lm_head(candidate_hidden(model, batch, gold, candidates, Align(layout=layout)))
        for sample, slot in candidates.keep_BC.nonzero().tolist():
            place = int(candidates.place_BC[sample, slot])
            ids, mask = batch.input_ids_BT.clone(), batch.attention_mask_BT.clone()
            ids[sample, place] = candidates.ids_BC[sample, slot]
            replaced = dataclasses.replace(batch, input_ids_BT=ids)
            mask[sample, place + 1 :] = 0
            theirs = own_logits(model, dataclasses.replace(replaced, attention_mask_BT=mask))[sample, place]
            torch.testing.assert_close(ours[sample, slot], theirs, rtol=0, atol=2e-5)


def test_recomputed_rows_are_the_eager_ones(model: nn.Module) -> None:
    batch = batch_of(model, left=True)
    decoder = access.decoder(model)
    query_BI = batch.instruction_BT.nonzero()[:, 1].view(3, -1)
    seen: dict[int, Tensor] = {}
    handles = [
        layer.self_attn.register_forward_hook(lambda _, __, out, i=index: seen.__setitem__(i, out[1]))
        for index, layer in enumerate(decoder.layers)
    ]
    try:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            own_logits(model, batch)
    finally:
        model.set_attn_implementation("sdpa")
        for handle in handles:
            handle.remove()
    layers = range(len(decoder.layers))
    with torch.no_grad(), AttentionTap(decoder, layers) as tap:
        access.gold_pass(model, batch, keep_cache=False)
        for layer in layers:
            ours = tap.rows(layer, query_BI, batch.attention_mask_BT)
            at = query_BI[:, None, :, None].expand(-1, ours.shape[1], -1, ours.shape[-1])
            torch.testing.assert_close(ours, seen[layer].gather(2, at), rtol=0, atol=1e-5)


def test_packed_rows_change_nothing(model: nn.Module) -> None:
    batch = batch_of(model, left=False)
    plan = packing.plan(batch.attention_mask_BT)
    assert plan is not None
    packed = dataclasses.replace(batch, packing=plan)
    candidates = candidates_of(batch)
    with torch.no_grad():
        found = []
        for each in (batch, packed):
            gold = access.gold_pass(model, each, keep_cache=True)
            found.append(gold.hidden_BTD[real(batch)])
            hidden = candidate_hidden(model, each, gold, candidates, Align())
            found.append(hidden[candidates.keep_BC])
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1], found[3], rtol=0, atol=1e-4)


def test_all_terms_train_every_part(model: nn.Module) -> None:
    """A pair of one class: a copy as student; equal models give zero, and gradients reach tower and projector."""
    batch = batch_of(model, left=False)
    align = Align(sampling="top-k", iva_rows=0)
    objective = Objective(TERMS, LossWeights(), align, LiveTeacher(model, align, 1), 64)
    model.requires_grad_(True).zero_grad()
    with torch.no_grad():
        _, same = objective(model, batch, Normaliser.of(batch))
    assert max(float(same[name]) for name in ("kd", "iva", "tpa")) < 1e-5
    loss, values = objective(model, batch, Normaliser.of(batch))
    assert values.keys() == set(TERMS)
    loss.backward()
    reached = {part_of(name) for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached >= {"vision", "projector", "llm", "embeddings"}
    model.zero_grad()


def test_a_text_only_batch_needs_no_pixels(model: nn.Module) -> None:
    batch = batch_of(model, left=True)
    text = Batch(
        *(
            getattr(batch, name)[2:]
            for name in ("input_ids_BT", "attention_mask_BT", "image_BT", "instruction_BT", "response_BT")
        ),
        None,
    )
    with torch.no_grad():
        alone = access.gold_pass(model, text, keep_cache=False).hidden_BTD
        together = access.gold_pass(model, batch, keep_cache=False).hidden_BTD[2:]
    torch.testing.assert_close(alone[real(text)], together[real(text)], rtol=0, atol=1e-5)


def test_an_answer_of_the_report_is_the_class_own(model: nn.Module) -> None:
    """Token by token behind a cache, against whole forwards: positions of later tokens go on after the image's."""
    batch = batch_of(model, left=False)
    assert batch.pixels_NCHW is not None
    size = int(batch.attention_mask_BT[1].sum())
    ids = batch.input_ids_BT[1, :size]
    spans = tuple("image" if token == IMAGE else "instruction" for token in ids.tolist())
    prompt = Example(tuple(ids.tolist()), spans, (batch.pixels_NCHW[2].numpy(),))
    tokenizer: Any = SimpleNamespace(
        spec=SimpleNamespace(eos_token_ids=()), decode=lambda found: " ".join(map(str, found))
    )
    said = report_data.answer(model, prompt, tokenizer, Collator(PAD), 6)
    row = ids[None]
    for _ in range(6):
        mask = torch.ones_like(row)
        whole = Batch(row, mask, row == IMAGE, mask.bool(), mask.bool(), batch.pixels_NCHW[2:])
        row = torch.cat((row, own_logits(model, whole, images=1)[:, -1:].argmax(-1)), dim=1)
    assert said == " ".join(map(str, row[0, size:].tolist())) + " …"


def test_an_unknown_class_is_refused() -> None:
    class Other(nn.Module):
        config = transformers.LlamaConfig()

    with pytest.raises(
        CheckpointError, match=r"'llama' models cannot be distilled here; known: llava, llava_onevision"
    ):
        access.decoder(Other())
