"""A teacher read from entries gives the losses and gradients of the live one; compressed rows are unbiased."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from distill import access, ribbon
from distill.access import Head
from distill.cache import CachedTeacher, Memory
from distill.cache_build import Builder, CacheOptions, largest
from distill.cache_codec import QUANTISATION, Compression, compress, expand
from distill.cache_key import keys_bytes, keys_tensor, sample_key
from distill.cache_store import Entry
from distill.config import Align, LossWeights
from distill.data import Collator, Example, to_batch
from distill.head import HeadLoss, Rows
from distill.objective import SIGMAS, Batch, Normaliser, Objective
from distill.teacher import LiveTeacher, SparseTarget, Teacher, TeacherPass, join
from tests.distill.conftest import Pair
from vlm.errors import UserError

LAYER = 1
EVERYTHING = Compression(10_000, 0, 0.0)


def entries_of(
    pair: Pair, options: CacheOptions, align: Align | None = None, like: Batch | None = None
) -> dict[bytes, Entry]:
    """Entries made in the batch they are read in, or one sample at a time, hence with other padding."""
    align = align or Align()
    builder = Builder(
        LiveTeacher(pair.teacher, align, LAYER), options, align.temperature, vocabulary(pair), image_token(pair)
    )
    collate = Collator(pair.checkpoint.tokenizer.spec.pad_token_id)
    made: dict[bytes, Entry] = {}
    if like is not None and like.key_B4 is not None:
        keys = keys_bytes(like.key_B4)
        return {entry.key: entry for entry in builder.entries(like, keys, range(len(keys)))}
    for number, example in enumerate(pair.examples()):
        entry = builder.entries(to_batch(collate([example])), [sample_key(example)], [number])[0]
        made[entry.key] = entry
    return made


def image_token(pair: Pair) -> int:
    return access.image_token(pair.teacher)


def vocabulary(pair: Pair) -> int:
    return int(pair.checkpoint.config["text_config"]["vocab_size"])


def cached(
    pair: Pair, options: CacheOptions, align: Align | None = None, used: int = 0, like: Batch | None = None
) -> CachedTeacher:
    head = access.head(pair.teacher) if options.all_logits else None
    return CachedTeacher(Memory(entries_of(pair, options, align, like)), head, used)


def keyed(pair: Pair, pad_left: bool = False) -> Batch:
    return to_batch(Collator(pair.checkpoint.tokenizer.spec.pad_token_id, pad_left, keys=True)(pair.examples()))


def losses(pair: Pair, teacher: Teacher, batch: Batch, terms: tuple[str, ...], align: Align) -> tuple[dict, Tensor]:
    pair.student.zero_grad()
    loss, values = Objective(terms, LossWeights(), align, teacher, vocabulary(pair))(
        pair.student, batch, Normaliser.of(batch)
    )
    loss.backward()
    gradient = [p.grad.flatten() for p in pair.student.parameters() if p.grad is not None]
    return {name: float(value) for name, value in values.items()}, torch.cat(gradient)


@pytest.mark.parametrize("pad_left", [False, True])
@pytest.mark.parametrize(
    "align",
    [Align(), Align(temperature=2.0, direction="reverse"), Align(iva_rows=5), Align(iva_rows=0)],
    ids=["plain", "reverse", "rows", "all"],
)
def test_all_logits_give_the_losses_and_gradients_of_the_live_teacher(pair: Pair, align: Align, pad_left: bool) -> None:
    batch = keyed(pair, pad_left)
    live, live_gradient = losses(pair, LiveTeacher(pair.teacher, align, LAYER), batch, ("sft", "kd", "iva"), align)
    # stored at another temperature: hidden states serve any
    for like, tolerance in ((batch, 0.0), (None, 2e-5)):
        teacher = cached(pair, CacheOptions(all_logits=True), like=like)
        stored, gradient = losses(pair, teacher, batch, ("sft", "kd", "iva"), align)
        for term, value in live.items():
            assert abs(stored[term] / value - 1) <= tolerance
        assert float((gradient - live_gradient).norm() / live_gradient.norm()) <= tolerance


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_whole_rows_differ_by_quantisation_only(qwen2_pair: Pair, temperature: float) -> None:
    align = Align(temperature=temperature, iva_rows=0)
    batch = keyed(qwen2_pair)
    live, live_gradient = losses(qwen2_pair, LiveTeacher(qwen2_pair.teacher, align, LAYER), batch, ("kd", "iva"), align)
    teacher = cached(qwen2_pair, CacheOptions(EVERYTHING, EVERYTHING), align)
    stored, gradient = losses(qwen2_pair, teacher, batch, ("kd", "iva"), align)
    for term, value in live.items():
        assert stored[term] == pytest.approx(value, rel=5 * QUANTISATION)
    assert float((gradient - live_gradient).norm() / live_gradient.norm()) < 20 * QUANTISATION


def flat_gradient(hidden_RD: Tensor, head: Head, target: object) -> tuple[Tensor, Tensor]:
    """(kl_R, gradient of the mean divergence in the hidden states)."""
    hidden_RD = hidden_RD.clone().requires_grad_()
    loss = HeadLoss(head, len(head.weight_VD))
    weight_R = torch.full((len(hidden_RD),), 1 / len(hidden_RD))
    values = loss.add(Rows(hidden_RD, target=target, kl_weight_R=weight_R)).kl_R  # type: ignore[arg-type]
    loss.total().backward()
    assert hidden_RD.grad is not None
    assert values is not None
    return values, hidden_RD.grad.sum(dim=0)


@pytest.mark.parametrize("how", [Compression(4, 3, 0.0), Compression(0, 5, 0.0), Compression(6, 2, 0.1)])
def test_many_draws_average_to_the_exact_loss_and_gradient(how: Compression) -> None:
    torch.manual_seed(0)
    draws, size, width = 20_000, 40, 8
    head = Head(torch.randn(size, width))
    logits_V, hidden_D = torch.randn(size) * 2, torch.randn(width)
    uniform_R = (torch.arange(draws) + 0.5) / draws
    target = expand(compress(logits_V.expand(draws, -1), uniform_R[torch.randperm(draws)], how))
    assert torch.allclose(target.probs_RK.sum(dim=1), torch.ones(draws), atol=1e-5)
    mean_V = torch.zeros(size).index_add_(0, target.ids_RK.flatten(), target.probs_RK.flatten()) / draws
    exact_V = logits_V.softmax(dim=-1)
    assert float((mean_V - exact_V).abs().max()) < 3e-4
    values_R, gradient_D = flat_gradient(hidden_D.expand(draws, -1), head, target)
    q_V = (hidden_D @ head.weight_VD.T).softmax(dim=-1)
    exact = float((exact_V * (exact_V / q_V).log()).sum())
    assert float(values_R.mean()) == pytest.approx(exact, rel=1e-3)
    assert torch.allclose(gradient_D, (q_V - exact_V) @ head.weight_VD, atol=2e-3)


def test_plain_top_k_is_biased() -> None:
    torch.manual_seed(0)
    logits_V = torch.randn(40) * 2
    target = expand(compress(logits_V[None], torch.zeros(1), Compression(4, 0, 0.0)))
    mean_V = torch.zeros(40).index_add_(0, target.ids_RK[0], target.probs_RK[0])
    assert float((mean_V - logits_V.softmax(dim=-1)).abs().max()) > 0.02


def test_the_value_is_less_noisy_than_with_the_exact_negentropy_and_zero_where_nothing_differs() -> None:
    torch.manual_seed(1)
    draws, size = 4000, 60
    logits_V = torch.randn(size) * 2
    rows = expand(compress(logits_V.expand(draws, -1), torch.rand(draws), Compression(4, 4, 0.0)))
    p_V = logits_V.softmax(dim=-1)
    for spread, ratio in ((0.0, 0.0), (0.2, 0.4)):
        student_V = (logits_V + spread * torch.randn(size)).log_softmax(dim=-1)
        cross_R = (rows.probs_RK * student_V[rows.ids_RK]).sum(dim=-1)
        ours_R, plain_R = rows.negentropy_R - cross_R, (p_V * p_V.log()).sum() - cross_R
        assert float(ours_R.std()) <= ratio * float(plain_R.std()) + 1e-6
        if not spread:
            assert float(ours_R.abs().max()) < 1e-5


@pytest.mark.parametrize(
    "how", [Compression(4, 2, 0.0), Compression(4, 12, 0.0), Compression(0, 8, 0.0), Compression(20, 20, 0.0)]
)
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_the_error_of_a_loss_is_known_from_its_own_rows(how: Compression, spread: float) -> None:
    torch.manual_seed(0)
    losses_, size = 400, 200
    logits_RV = torch.randn(16, size) * 2
    log_q_RV = (logits_RV + spread * torch.randn(16, size)).log_softmax(dim=-1)
    logp_RV = logits_RV.log_softmax(dim=-1)
    exact = float((logp_RV.exp() * (logp_RV - log_q_RV)).sum(dim=-1).mean())
    rows = expand(compress(logits_RV.repeat(losses_, 1), torch.rand(16 * losses_), how))
    log_q_RK = log_q_RV.repeat(losses_, 1).gather(1, rows.ids_RK)
    value_LR = (rows.negentropy_R - (rows.probs_RK * log_q_RK).sum(dim=-1)).view(losses_, 16)
    variance_R = rows.variance(log_q_RK)
    assert variance_R is not None
    variance_L = variance_R.view(losses_, 16).sum(dim=1) / 16**2
    error_L = value_LR.mean(dim=1) - exact
    assert abs(float(error_L.mean())) < 4 * float(error_L.std()) / losses_**0.5 + QUANTISATION * exact
    assert 0.6 < float(error_L.square().mean() / variance_L.mean()) < 1.4
    assert float((error_L.abs() > SIGMAS * variance_L.sqrt()).float().mean()) < 5e-3


@pytest.mark.parametrize("tail", [0, 1])
def test_without_two_draws_the_error_is_not_known(tail: int) -> None:
    rows = expand(compress(torch.randn(3, 40), torch.rand(3), Compression(4, tail, 0.0)))
    assert rows.scatter is None
    assert rows.variance(torch.zeros(3, 1)) is None


def test_targets_of_several_blocks_are_joined() -> None:
    torch.manual_seed(0)
    first, second = (
        expand(compress(torch.randn(count, 40), torch.rand(count), Compression(top, 3, 0.0)))
        for count, top in ((3, 4), (2, 9))
    )
    both = join([first, second])
    assert isinstance(both, SparseTarget)
    log_q_RV = torch.randn(5, 40).log_softmax(dim=-1)
    for part, rows in ((slice(0, 3), first), (slice(3, 5), second)):
        again = both.take(torch.arange(5)[part])
        assert torch.equal(again.probs_RK, rows.probs_RK)
        assert torch.equal(
            again.variance(log_q_RV[part].gather(1, again.ids_RK)),  # type: ignore[arg-type]
            rows.variance(log_q_RV[part].gather(1, rows.ids_RK)),  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("size", [50, 1 << 16, 70_000])
def test_ids_and_masses_survive_packing(size: int) -> None:
    torch.manual_seed(0)
    logits_RV = torch.randn(3, size) * 3
    rows = compress(logits_RV, torch.rand(3), Compression(20, 4, 0.0))
    assert len(rows.high_M) == (len(rows.low_M) if size > 1 << 16 else 0)
    assert rows.size() == 3 * 8 + len(rows.low_M) * (5 if size > 1 << 16 else 4) + len(rows.logp_N) * 2
    back = expand(rows)
    assert back.scatter is not None
    logp_RK = logits_RV.log_softmax(dim=-1).gather(1, back.ids_RK)
    stored = back.probs_RK > 0
    assert torch.allclose(back.scatter.logp_RK[stored], logp_RK[stored], rtol=0, atol=QUANTISATION)
    assert int(back.scatter.drawn_RK.sum()) == len(rows.logp_N) > 0
    top = logits_RV.softmax(dim=-1).topk(20)
    assert (back.ids_RK[:, :20] == top.indices).all()
    assert torch.allclose(back.probs_RK[:, :20], top.values, rtol=QUANTISATION, atol=0)


def test_certain_rows_take_little_space_and_even_a_tiny_tail_is_drawn() -> None:
    logits_RV = torch.zeros(2, 100)
    logits_RV[:, 7] = 14.0
    rows = compress(logits_RV, torch.rand(2), Compression(64, 12, 1e-4))
    assert rows.count_R.tolist() == [3, 3]  # the token and two draws for the rest
    assert float(expand(rows).probs_RK[0, 0]) == pytest.approx(1 - 99 / np.exp(14), rel=1e-3)


@pytest.mark.parametrize(
    ("top_k", "tail", "smallest"), [(0, 0, 0.0), (-1, 2, 0.0), (70_000, 0, 0.0), (1, 1, 1.0), (1, 256, 0.0)]
)
def test_impossible_compression_is_refused(top_k: int, tail: int, smallest: float) -> None:
    with pytest.raises(UserError):
        Compression(top_k, tail, smallest)


@dataclass(frozen=True)
class WithCandidates:
    """A live teacher made to answer for given candidates."""

    live: LiveTeacher
    candidates: ribbon.Candidates

    def __call__(self, batch: Batch, iva: bool, tpa: bool) -> TeacherPass:
        seen = self.live(batch, iva, tpa)
        seen.fixed_candidates = lambda: self.candidates  # type: ignore[attr-defined]
        return seen


@pytest.mark.parametrize("used", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_stored_candidates_give_the_loss_a_live_teacher_gives_for_them(
    qwen2_pair: Pair, used: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    align = Align(candidates=used)
    batch = keyed(qwen2_pair)
    if weighted:
        torch.manual_seed(0)
        batch = dataclasses.replace(batch, token_weight_BT=(torch.rand(batch.response_BT.shape) - 0.3).clamp(min=0))
    teacher = cached(qwen2_pair, CacheOptions(all_logits=True, candidates=3), align, used)
    chosen = teacher(batch, iva=True, tpa=True).fixed_candidates()  # type: ignore[attr-defined]
    gold_BC = batch.input_ids_BT.gather(1, chosen.place_BC)
    assert int(chosen.keep_BC.sum()) > 0
    assert not ((chosen.ids_BC == gold_BC) & chosen.keep_BC).any()
    assert not ((chosen.ids_BC == image_token(qwen2_pair)) & chosen.keep_BC).any()
    live = LiveTeacher(qwen2_pair.teacher, align, LAYER)
    monkeypatch.setattr("distill.teacher.LivePass.__setattr__", object.__setattr__)  # the pass is frozen
    wanted, wanted_gradient = losses(qwen2_pair, WithCandidates(live, chosen), batch, ("kd", "tpa"), align)
    stored, gradient = losses(qwen2_pair, teacher, batch, ("kd", "tpa"), align)
    assert stored["tpa"] == pytest.approx(wanted["tpa"], rel=2e-5)
    assert float((gradient - wanted_gradient).norm() / wanted_gradient.norm()) < 2e-5


def test_a_share_of_the_visual_rows_keeps_the_heaviest(qwen2_pair: Pair) -> None:
    batch = keyed(qwen2_pair)
    whole = cached(qwen2_pair, CacheOptions())(batch, iva=True, tpa=False).weights()
    part = cached(qwen2_pair, CacheOptions(visual_share=0.5))(batch, iva=True, tpa=False)
    weight_BT = part.weights()
    kept_BT = weight_BT > 0
    with_image_B = batch.image_BT.any(dim=1)
    held_B = (whole * kept_BT).sum(dim=1)[with_image_B]
    assert (held_B >= 0.5).all()
    assert (kept_BT.sum(dim=1) < batch.image_BT.sum(dim=1))[with_image_B].all()
    assert torch.allclose(weight_BT.sum(dim=1)[with_image_B], torch.ones(int(with_image_B.sum())))
    lightest_B = torch.where(kept_BT, whole, torch.inf).amin(dim=1)[with_image_B]
    left_B = torch.where(kept_BT | ~batch.image_BT, 0, whole).amax(dim=1)[with_image_B]
    assert (lightest_B >= left_B).all()
    part.rows(*kept_BT.nonzero(as_tuple=True))
    with pytest.raises(UserError, match="visual"):
        part.rows(*(batch.image_BT & ~kept_BT).nonzero(as_tuple=True))


def test_the_heaviest_of_a_row() -> None:
    weight_BT = torch.tensor([[0.1, 0.6, 0.0, 0.3], [0.0, 0.0, 0.0, 0.0]])
    assert largest(weight_BT, 0.7).tolist() == [[False, True, False, True], [False] * 4]
    assert largest(weight_BT, 0.6).tolist() == [[False, True, False, False], [False] * 4]
    assert largest(weight_BT, 1.0).tolist() == [[True, True, False, True], [False] * 4]


def test_a_key_is_that_of_the_content() -> None:
    pixels = np.zeros((3, 2, 2), np.float32)
    base = Example((1, 2, 3), ("image", "instruction", "response"), (pixels,))
    other = pixels.copy()
    other[0, 0, 0] = np.nextafter(np.float32(0), np.float32(1))
    changed = [
        dataclasses.replace(base, ids=(1, 2, 4)),
        dataclasses.replace(base, spans=("image", "template", "response")),
        dataclasses.replace(base, pixels=(other,)),
        dataclasses.replace(base, pixels=(pixels.reshape(3, 4, 1),)),
        dataclasses.replace(base, pixels=()),
    ]
    keys = [sample_key(example) for example in (base, *changed)]
    assert len(set(keys)) == len(keys)
    assert sample_key(dataclasses.replace(base)) == keys[0]
    assert keys_bytes(keys_tensor([base, *changed])) == keys


def test_a_batch_without_keys_is_a_fault(qwen2_pair: Pair) -> None:
    with pytest.raises(ValueError, match="keys"):
        cached(qwen2_pair, CacheOptions())(qwen2_pair.batch(), iva=False, tpa=False)
