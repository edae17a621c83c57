"""The properties Align-TI must have, on random models: values and gradients against naive versions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill import ribbon
from distill.attention import AttentionTap, instruction_to_vision, visual_weights
from distill.config import TERMS, Align, Layout, LossWeights
from distill.objective import Batch, Normaliser, Objective, embed, gold_pass
from distill.teacher import LiveTeacher
from tests.distill.conftest import Pair
from vlm.load import load_model, open_checkpoint

LAYOUTS: tuple[Layout, ...] = ("cached", "appended", "interleaved")
PADDING = pytest.mark.parametrize("pad_left", [False, True], ids=["right", "left"])


def positions(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    sample_N, place_N = batch.response_BT[:, 1:].nonzero(as_tuple=True)
    return sample_N, place_N + 1, batch.input_ids_BT[sample_N, place_N + 1]


def candidates_of(model: nn.Module, batch: Batch, count: int = 3) -> ribbon.Candidates:
    sample_N, place_N, gold_N = positions(batch)
    student_NV = model.lm_head(gold_pass(model, batch, False).hidden_BTD[sample_N, place_N - 1])
    student_NV[:, model.config.image_token_id] = -torch.inf
    uniform_NK = torch.rand(len(sample_N), count, generator=torch.Generator().manual_seed(3))
    ids_NK, weight_NK = ribbon.propose(student_NV, uniform_NK, "distinct")
    return ribbon.arrange(ids_NK, weight_NK, sample_N, place_N, gold_N, len(batch.input_ids_BT))


def real_rows(batch: Batch) -> Tensor:
    return batch.attention_mask_BT.bool()


@PADDING
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_gold_logits_do_not_change_with_the_ribbon(pair: Pair, pad_left: bool, layout: Layout) -> None:
    batch = pair.batch(pad_left)
    model = pair.student
    plain = gold_pass(model, batch, keep_cache=False)
    candidates = candidates_of(model, batch)
    if layout == "cached":
        with_ribbon = gold_pass(model, batch, keep_cache=True)
        ribbon.run_cached(
            model.model.language_model, candidates, with_ribbon.cache, batch.attention_mask_BT, batch.position_BT
        )
        gold_BTD = with_ribbon.hidden_BTD
        length = gold_BTD.shape[1]
        fresh = gold_pass(model, batch, keep_cache=True).cache
        for ours, theirs in zip(with_ribbon.cache.layers, fresh.layers, strict=True):
            assert ours.keys.shape[2] == length + candidates.ids_BC.shape[1], "candidates come after the gold tokens"
            assert torch.equal(ours.keys[:, :, :length], theirs.keys)
            assert torch.equal(ours.values[:, :, :length], theirs.values)
    else:
        gold_BTD, _ = ribbon.run_single_pass(
            model.model.language_model, plain.embeds_BTD, candidates, batch.attention_mask_BT, batch.position_BT, layout
        )
    rows = real_rows(batch)
    torch.testing.assert_close(
        model.lm_head(gold_BTD)[rows], model.lm_head(plain.hidden_BTD)[rows], atol=1e-5, rtol=1e-5
    )


@PADDING
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_candidate_logits_equal_separate_forwards(pair: Pair, pad_left: bool, layout: Layout) -> None:
    batch, model = pair.batch(pad_left), pair.student
    candidates = candidates_of(model, batch)
    assert candidates.keep_BC.sum(dim=1).unique().numel() > 1, "the batch should have ragged candidate rows"
    gold = gold_pass(model, batch, keep_cache=layout == "cached")
    decoder = model.model.language_model
    if layout == "cached":
        hidden = ribbon.run_cached(decoder, candidates, gold.cache, batch.attention_mask_BT, batch.position_BT)
    else:
        _, hidden = ribbon.run_single_pass(
            decoder, gold.embeds_BTD, candidates, batch.attention_mask_BT, batch.position_BT, layout
        )
    ours_BCV = model.lm_head(hidden)
    checked = 0
    for b, c in candidates.keep_BC.nonzero().tolist():
        naive = naive_candidate_logits(model, batch, b, int(candidates.place_BC[b, c]), int(candidates.ids_BC[b, c]))
        torch.testing.assert_close(ours_BCV[b, c], naive, atol=1e-5, rtol=1e-5)
        checked += 1
    assert checked > 20


def naive_candidate_logits(model: nn.Module, batch: Batch, b: int, place: int, token: int) -> Tensor:
    """One unpadded forward of the public model over the gold prefix with the candidate in place of the gold token."""
    real = batch.attention_mask_BT[b].bool()
    ids = batch.input_ids_BT[b].clone()
    ids[place] = token
    ids = ids[: place + 1][real[: place + 1]]
    images = batch.image_BT.any(dim=1)
    pixels = None
    if images[b]:
        assert batch.pixels_NCHW is not None
        pixels = batch.pixels_NCHW[int(images[:b].sum())][None]
    logits: Tensor = model(input_ids=ids[None], pixel_values=pixels).logits
    return logits[0, -1]


def test_shifted_labels_train_the_first_answer_token_and_stop_at_the_end_of_turn(qwen2_pair: Pair) -> None:
    batch = qwen2_pair.collate(qwen2_pair.examples()[:1])
    tokens = batch.input_ids_BT[0].tolist()
    trained = [tokens[t] for t in batch.response_BT[0].nonzero().flatten().tolist()]
    tokenizer = qwen2_pair.checkpoint.tokenizer
    end = tokenizer.spec.eos_token_ids[0]
    assert trained[-1] == end
    assert tokenizer.decode(trained) == qwen2_answer()
    objective = Objective(("sft",), LossWeights(), Align(), None, 10**6)
    logits = gold_pass(qwen2_pair.student, batch, False).hidden_BTD.detach().requires_grad_(True)
    # the gradient of the loss by position shows exactly which hidden states are trained
    hidden = {}

    def keep(_: nn.Module, __: object, output: object) -> None:
        hidden["states"] = output.last_hidden_state  # type: ignore[attr-defined]
        hidden["states"].retain_grad()

    handle = qwen2_pair.student.model.language_model.register_forward_hook(keep)
    loss, _ = objective(qwen2_pair.student, batch, Normaliser.of(batch))
    handle.remove()
    loss.backward()
    qwen2_pair.student.zero_grad()
    touched = hidden["states"].grad[0].abs().sum(dim=-1).nonzero().flatten().tolist()
    first = int(batch.response_BT[0].nonzero()[0])
    last = int(batch.response_BT[0].nonzero()[-1])
    assert tokens[last] == end
    assert touched == list(range(first - 1, last)), "predicting positions: one before the answer, none at its end"
    assert logits.shape[1] > last + 1, "there is a token after the end of turn, and it is not trained"


def qwen2_answer() -> str:
    from vlm import digits

    return digits.sample("train", 0).answer


def all_terms(pair: Pair, layout: Layout = "cached", **weights: float) -> Objective:
    align = Align(layout=layout, sampling="top-k", tpa_share=1.0, iva_rows=0)
    return Objective(TERMS, LossWeights(**weights), align, LiveTeacher(pair.teacher, align, iva_layer=1), 10**6)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_accumulated_micro_batches_equal_the_full_batch(pair: Pair) -> None:
    objective = all_terms(pair)
    examples = pair.examples()
    full = pair.collate(examples)
    normaliser = Normaliser.of(full)
    loss, values = objective(pair.student, full, normaliser)
    loss.backward()
    expected = gradients(pair.student)
    # unequal token counts, one micro-batch without any image
    pieces = [pair.collate(part) for part in (examples[:1], examples[1:4], examples[4:])]
    total = torch.zeros(())
    sums = dict.fromkeys(values, 0.0)
    for piece in pieces:
        part, terms = objective(pair.student, piece, normaliser)
        part.backward()
        total += part.detach()
        for name, value in terms.items():
            sums[name] += float(value)
    torch.testing.assert_close(total, loss.detach(), atol=1e-5, rtol=1e-5)
    for name, value in values.items():
        assert sums[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    actual = gradients(pair.student)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_zero_weights_are_plain_sft_to_the_last_bit(pair: Pair) -> None:
    batch = pair.batch()
    loss, _ = all_terms(pair, kd=0.0, iva=0.0, tpa=0.0)(pair.student, batch, Normaliser.of(batch))
    loss.backward()
    ours = gradients(pair.student)
    plain, _ = Objective(("sft",), LossWeights(), Align(), None, 10**6)(pair.student, batch, Normaliser.of(batch))
    plain.backward()
    reference = gradients(pair.student)
    assert torch.equal(loss, plain)
    for name, gradient in reference.items():
        assert torch.equal(ours[name], gradient), name


def test_sft_equals_the_models_own_loss(pair: Pair) -> None:
    batch = pair.batch()
    ours, _ = Objective(("sft",), LossWeights(), Align(), None, 10**6)(pair.student, batch, Normaliser.of(batch))
    labels = batch.input_ids_BT.masked_fill(~batch.response_BT, -100)
    theirs = pair.student(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.attention_mask_BT,
        pixel_values=batch.pixels_NCHW,
        labels=labels,
    ).loss
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_student_equal_to_its_teacher_has_no_distillation_loss(pair: Pair, layout: Layout) -> None:
    batch = pair.batch()
    objective = all_terms(pair, layout)
    _, values = objective(pair.teacher, batch, Normaliser.of(batch))
    assert values["sft"] > 0.1
    for name in ("kd", "iva", "tpa"):
        assert abs(float(values[name])) < 1e-6, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_terms_equal_naive_versions_in_value_and_gradient(pair: Pair, layout: Layout) -> None:
    batch = pair.batch()
    normaliser = Normaliser.of(batch)
    _, values = all_terms(pair, layout)(pair.student, batch, normaliser)
    reference = naive_terms(pair, batch)
    for name, value in reference.items():
        torch.testing.assert_close(
            values[name], value.detach(), atol=2e-5, rtol=1e-4, msg=lambda t, n=name: f"{n}: {t}"
        )
    loss, _ = all_terms(pair, layout)(pair.student, batch, normaliser)
    loss.backward()
    ours = gradients(pair.student)
    sum(naive_terms(pair, batch).values(), start=torch.zeros(())).backward()
    expected = gradients(pair.student)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, atol=5e-5, rtol=2e-3, msg=lambda t, n=name: f"{n}: {t}")


def naive_terms(pair: Pair, batch: Batch) -> dict[str, Tensor]:
    """The formulas token by token: full logits, one forward per candidate, eager attention maps."""
    sample_N, place_N, gold_N = positions(batch)
    student_BTV = full_logits(pair.student, batch)
    with torch.no_grad():
        teacher_BTV = full_logits(pair.teacher, batch)
    total = len(sample_N)
    sft = kd = tpa = iva = torch.zeros(())
    for b, t, gold in zip(sample_N.tolist(), place_N.tolist(), gold_N.tolist(), strict=True):
        sft = sft - student_BTV[b, t - 1].log_softmax(-1)[gold] / total
        kd = kd + kl(teacher_BTV[b, t - 1], student_BTV[b, t - 1]) / total
        scores_V = student_BTV[b, t - 1].detach().clone()
        scores_V[pair.student.config.image_token_id] = -torch.inf
        for c in scores_V.topk(4).indices.tolist():
            if c == gold:
                continue
            with torch.no_grad():
                teacher_V = naive_candidate_logits(pair.teacher, batch, b, t, c)
            tpa = tpa + kl(teacher_V, naive_candidate_logits(pair.student, batch, b, t, c)) / (4 * total)
    weights_BT = eager_weights(pair, batch, layer=1)
    samples = int(batch.image_BT.any(dim=1).sum())
    for b, j in batch.image_BT.nonzero().tolist():
        iva = iva + weights_BT[b, j] * kl(teacher_BTV[b, j], student_BTV[b, j]) / samples
    return {"sft": sft, "kd": kd, "tpa": tpa, "iva": iva}


def kl(teacher_V: Tensor, student_V: Tensor) -> Tensor:
    return F.kl_div(student_V.log_softmax(-1), teacher_V.log_softmax(-1), log_target=True, reduction="sum")


def full_logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(
        input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, pixel_values=batch.pixels_NCHW
    ).logits
    return logits


def eager_weights(pair: Pair, batch: Batch, layer: int) -> Tensor:
    maps_BHTT = eager_maps(pair, batch)[layer]
    weights = torch.zeros(batch.input_ids_BT.shape)
    for b in range(len(weights)):
        rows = batch.instruction_BT[b].nonzero().flatten()
        columns = batch.image_BT[b].nonzero().flatten()
        if len(columns):
            focus = maps_BHTT[b][:, rows][:, :, columns].mean(dim=(0, 1))
            weights[b, columns] = focus / focus.sum()
    return weights


@torch.no_grad()
def eager_maps(pair: Pair, batch: Batch) -> tuple[Tensor, ...]:
    eager = load_model(open_checkpoint(pair.checkpoint.directory.parent / "teacher"), attention="eager")
    output = eager.model.language_model(
        inputs_embeds=embed(eager, batch),
        attention_mask=batch.attention_mask_BT,
        position_ids=batch.position_BT,
        output_attentions=True,
    )
    return tuple(output.attentions)


@PADDING
@torch.no_grad()
def test_recomputed_attention_rows_equal_eager_maps(pair: Pair, pad_left: bool) -> None:
    batch = pair.batch(pad_left)
    maps = eager_maps(pair, batch)
    decoder = pair.teacher.model.language_model
    query_BI = torch.stack([row.nonzero().flatten()[:4] for row in batch.instruction_BT])
    with AttentionTap(decoder, range(len(maps))) as tap:
        gold_pass(pair.teacher, batch, keep_cache=False)
        for layer, expected_BHTT in enumerate(maps):
            rows_BHIT = tap.rows(layer, query_BI, batch.attention_mask_BT)
            index = query_BI[:, None, :, None].expand(-1, rows_BHIT.shape[1], -1, rows_BHIT.shape[-1])
            torch.testing.assert_close(rows_BHIT, expected_BHTT.gather(2, index), atol=1e-5, rtol=1e-5)
            ours = visual_weights(
                instruction_to_vision(tap, layer, batch.instruction_BT, batch.image_BT, batch.attention_mask_BT),
                batch.image_BT,
            )
            torch.testing.assert_close(ours, eager_weights(pair, batch, layer), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_tap_leaves_no_hooks_and_changes_nothing(qwen2_pair: Pair) -> None:
    batch = qwen2_pair.batch()
    before = gold_pass(qwen2_pair.teacher, batch, False).hidden_BTD
    with AttentionTap(qwen2_pair.teacher.model.language_model, [0, 1]):
        during = gold_pass(qwen2_pair.teacher, batch, False).hidden_BTD
    assert torch.equal(before, during)
    for layer in qwen2_pair.teacher.model.language_model.layers:
        assert not layer.self_attn._forward_pre_hooks


@torch.no_grad()
def test_visual_terms_rise_when_images_are_shuffled_between_student_and_teacher(qwen2_pair: Pair) -> None:
    """A student that sees other images than its teacher must pay for it; a blind loss would not notice."""
    objective = all_terms(qwen2_pair)
    batch = qwen2_pair.batch()
    assert batch.pixels_NCHW is not None
    shuffled = dataclasses.replace(batch, pixels_NCHW=batch.pixels_NCHW.roll(1, dims=0))
    own = objective(qwen2_pair.teacher, batch, Normaliser.of(batch))[1]
    teacher = qwen2_pair.teacher
    student_side = embed(teacher, shuffled)
    original = teacher.model.get_image_features

    calls = {"n": 0}

    def swap(**kwargs: object) -> object:
        calls["n"] += 1
        if calls["n"] == 1:  # the student's pass comes first
            kwargs["pixel_values"] = shuffled.pixels_NCHW
        return original(**kwargs)

    teacher.model.get_image_features = swap
    try:
        other = objective(teacher, batch, Normaliser.of(batch))[1]
    finally:
        del teacher.model.get_image_features
    assert not torch.equal(student_side, embed(teacher, batch))
    assert float(other["iva"]) > 1e-3 > abs(float(own["iva"]))
    assert float(other["kd"]) > 1e-4 > abs(float(own["kd"]))
