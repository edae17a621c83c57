"""LaViT: gate, concept and trajectory in closed form, limits, latents in batches and teachers."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill import access, attention, gate, latents, lavit
from distill.batch import Batch, Normaliser
from distill.config import TERMS, Align, LossWeights
from distill.data import Collator, Example, to_batch
from distill.lavit import Lavit, LavitHead
from distill.methods import LavitOptions
from distill.objective import Objective
from distill.teacher import Gaze, LiveTeacher
from tests.distill import killing
from tests.distill.conftest import Pair
from tests.tiny import make_student
from vlm.errors import UserError
from vlm.load import Checkpoint, load_model, open_checkpoint

LATENTS = 3
OPTIONS = LavitOptions(latents=LATENTS, layers=2, keep=4)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A student with latents, a teacher without, and examples about images."""

    student: nn.Module
    teacher: nn.Module
    source: Checkpoint
    examples: list[Example]

    @property
    def ids(self) -> tuple[int, ...]:
        return self.source.tokenizer.spec.latent_token_ids

    def batch(self, latents_too: bool = True, pad_left: bool = False) -> Batch:
        return to_batch(Collator(0, pad_left, latents=self.ids if latents_too else ())(self.examples))

    def objective(self, terms: tuple[str, ...], weights: LossWeights | None = None, **options: Any) -> Objective:
        torch.manual_seed(0)
        chosen = dataclasses.replace(OPTIONS, **options)
        head = LavitHead(access.width(self.student), access.width(self.teacher), chosen.traj)
        teacher = LiveTeacher(self.teacher, Align(), 1, chosen)
        return Objective(terms, weights or LossWeights(), Align(), teacher, 500, Lavit(chosen, head, steps=10))


@pytest.fixture(scope="module")
def setup(qwen2_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    out = tmp_path_factory.mktemp("latents") / "student"
    source = qwen2_pair.checkpoint
    path = latents.extend(load_model(source), source, LATENTS, out, seed=0)
    opened = open_checkpoint(path)
    return Setup(load_model(opened).train(), qwen2_pair.teacher, opened, qwen2_pair.examples())


# ---- closed forms


def test_the_gate_opens_along_a_cosine() -> None:
    for floor in (1e-6, 0.1):
        assert gate.gamma(0, 400, floor) == pytest.approx(floor)
        assert gate.gamma(200, 400, floor) == pytest.approx((1 + floor) / 2)
        assert gate.gamma(400, 400, floor) == gate.gamma(999, 400, floor) == 1.0
        values = [gate.gamma(t, 400, floor) for t in range(401)]
        assert values == sorted(values)
    assert gate.gamma(0, 0, 1e-6) == 1.0


def test_the_images_share_of_attention_is_scaled_by_the_factor() -> None:
    score = torch.randn(9, dtype=torch.float64)
    image = torch.arange(9) < 4
    inside, outside = score.exp()[image].sum(), score.exp()[~image].sum()
    for factor in (1e-6, 0.3, 1.0):
        held = gate.Gate(math.log(factor), torch.ones(1, 9, dtype=torch.bool), image[None])
        expected = factor * inside / (factor * inside + outside)
        share = (score + held.log_factor * image.double()).softmax(dim=0)[image].sum()
        torch.testing.assert_close(share, expected, rtol=1e-13, atol=1e-16)
        row = held.bias()[0, 0].double()
        torch.testing.assert_close(
            (score + row).softmax(dim=1)[:, image].sum(dim=1), share.expand(9), rtol=1e-6, atol=1e-12
        )
        # as it is added in a model: of single precision
        share = (score + held.key_bias()[0].double()).softmax(dim=0)[image].sum()
        torch.testing.assert_close(share, expected, rtol=1e-6, atol=1e-12)


def test_concept_is_zero_one_and_two() -> None:
    wanted = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    seen = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-5.0, 0.0]], requires_grad=True)
    found = lavit.concept(seen, wanted)
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 2.0]))
    found.sum().backward()
    assert wanted.grad is None


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_uniform_look_at_eight_of_n_costs_the_log_of_their_ratio(reduction: str) -> None:
    n, k = 24, 3
    look = torch.full((2, k, n), 1 / n)
    mass = torch.zeros(2, n)
    mass[:, :8] = 1 / 8
    valid = torch.ones(2, k, dtype=torch.bool)
    times = k if reduction == "sum" else 1
    torch.testing.assert_close(
        lavit.trajectory(look, mass, valid, reduction), torch.full((2,), times * math.log(n / 8))
    )
    same = mass[:, None].expand(-1, k, -1)
    torch.testing.assert_close(lavit.trajectory(same, mass, valid, reduction), torch.zeros(2), atol=1e-6, rtol=0)


def test_the_gaze_keeps_the_largest_and_sums_to_one() -> None:
    score = torch.tensor([[9.0, 1.0, 3.0, 5.0, 2.0, 9.0], [1.0, 1.0, 1.0, 1.0, 7.0, 7.0]])
    image = torch.tensor([[False, True, True, True, True, False], [True] * 4 + [False] * 2])
    found = attention.trajectory_of(score, image, keep=2)
    # min-max of 1 3 5 2 is 0 .5 1 .25; the two largest are 1 and .5
    torch.testing.assert_close(found[0], torch.tensor([0, 0, 1 / 3, 2 / 3, 0, 0]))
    torch.testing.assert_close(found[1], torch.tensor([0.25] * 4 + [0, 0]))


# ---- latents in batches, teachers without


def test_a_student_with_latents_is_a_plain_checkpoint(setup: Setup, qwen2_pair: Pair) -> None:
    model, source = setup.student, qwen2_pair.checkpoint
    assert model.config.latent_token_ids == list(setup.ids)
    table, old = model.get_input_embeddings().weight, load_model(source).get_input_embeddings().weight
    assert torch.equal(table[: min(setup.ids)], old[: min(setup.ids)])
    assert not torch.equal(table[setup.ids[0]], table[setup.ids[1]])
    with pytest.raises(UserError, match="has 3 latent tokens already"):
        latents.extend(model, setup.source, 4, Path("nowhere"), 0)


@pytest.mark.parametrize("pad_left", [False, True])
def test_a_batch_without_its_latents_is_the_batch_before_them(setup: Setup, pad_left: bool) -> None:
    with_them, plain = setup.batch(pad_left=pad_left), setup.batch(latents_too=False, pad_left=pad_left)
    assert with_them.latent_BT is not None
    turns = [1, 1, 2, 1, 1]
    assert with_them.latent_BT.sum(dim=1).tolist() == [LATENTS * n for n in turns]
    assert (with_them.response_BT & with_them.latent_BT).sum() == LATENTS * sum(turns)
    without = latents.take_out(with_them).batch
    for b in range(len(plain.input_ids_BT)):
        for name in ("input_ids_BT", "image_BT", "instruction_BT", "response_BT"):
            ours, theirs = (getattr(x, name)[b][x.attention_mask_BT[b].bool()] for x in (without, plain))
            assert torch.equal(ours, theirs), name


def test_what_a_teacher_says_is_found_at_the_places_with_latents(setup: Setup) -> None:
    batch, plain = setup.batch(), setup.batch(latents_too=False)
    teacher = LiveTeacher(setup.teacher, Align(), 1, OPTIONS)
    ours, theirs = latents.ask(teacher, batch, True, True), teacher(plain, True, True)
    (sample, place), (_, plain_place) = batch.response_places(), plain.response_places()
    assert batch.latent_BT is not None
    answer = ~batch.latent_BT[sample, place]
    found = ours.rows(sample[answer], place[answer] - 1)
    expected = theirs.rows(plain.response_places()[0], plain_place - 1)
    torch.testing.assert_close(found.hidden_RE, expected.hidden_RE, atol=1e-5, rtol=1e-5)  # type: ignore[union-attr]
    torch.testing.assert_close(ours.weights()[batch.image_BT], theirs.weights()[plain.image_BT], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        ours.gaze().mass_BT[batch.image_BT], theirs.gaze().mass_BT[plain.image_BT], atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(ours.gaze().semantics_BE, theirs.gaze().semantics_BE, atol=1e-5, rtol=1e-4)


def test_distillation_terms_do_not_touch_the_latents(setup: Setup) -> None:
    """With the weight of cross-entropy at zero, kd and tpa are those of the answer's tokens only."""
    values = setup.objective(TERMS)(setup.student, setup.batch(), Normaliser(1.0, 1.0))[1]
    seen = LiveTeacher(setup.teacher, Align(), 1)
    batch = setup.batch()
    assert batch.latent_BT is not None
    from distill.head import HeadLoss, Rows

    sample, place = batch.response_places()
    answer = ~batch.latent_BT[sample, place]
    hidden = access.gold_pass(setup.student, batch, False).hidden_BTD
    target = latents.ask(seen, batch, False, False).rows(sample[answer], place[answer] - 1)
    result = HeadLoss(access.head(setup.student), 500).add(
        Rows(hidden[sample[answer], place[answer] - 1], target=target, kl_weight_R=torch.ones(int(answer.sum())))
    )
    assert result.kl_R is not None
    torch.testing.assert_close(values["kd"], result.kl_R.sum(), rtol=1e-4, atol=1e-5)


# ---- limits


def test_an_open_gate_and_no_weight_is_plain_training(setup: Setup) -> None:
    batch = setup.batch()
    plain, _ = Objective(("sft",), LossWeights(), Align(), None, 500)(setup.student, batch, Normaliser.of(batch))
    zero = setup.objective(("sft", "concept", "traj"), LossWeights(concept=0.0, traj=0.0))
    for step in (None, 4, 9):  # the gate is open from step 4 of 10 on
        ours, values = zero(setup.student, batch, Normaliser.of(batch), step=step)
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)
    assert values["traj"] > 0
    shut, _ = zero(setup.student, batch, Normaliser.of(batch), step=0)
    assert abs(float(shut - plain)) > 1e-3


def test_a_gate_of_factor_one_is_no_gate(setup: Setup) -> None:
    """The path with a bias on the logits, gamma = 1, against the path without one."""
    batch = setup.batch()
    sample, place = batch.response_places()
    with torch.no_grad():
        plain, biased = (
            access.gold_pass(setup.student, batch, False, held).hidden_BTD
            for held in (None, gate.Gate(0.0, torch.ones_like(batch.image_BT), batch.image_BT))
        )
        logits = [access.head(setup.student).logits(hidden[sample, place - 1]) for hidden in (plain, biased)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-6, rtol=1e-6)


def answer_gradient(setup: Setup, gate_prompt: bool, detach: bool) -> float:
    """max |d logit / d image embedding| of the answers' label logits under a shut gate, in double precision."""
    batch, student = setup.batch(), copy.deepcopy(setup.student).double()
    assert batch.latent_BT is not None
    assert batch.pixels_NCHW is not None
    batch = dataclasses.replace(batch, pixels_NCHW=batch.pixels_NCHW.double())
    found = setup.objective(("sft", "traj"), gate_prompt=gate_prompt).lavit
    assert found is not None
    latent = batch.latent_BT[..., None]

    def cut(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = torch.where(latent, hidden.detach(), hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    if detach:
        for layer in access.decoder(student).layers:
            layer.register_forward_hook(cut)
    taken = access.inputs(student, batch)
    embeds = taken.embeds_BTD.detach().requires_grad_(True)
    with mock.patch.object(access, "inputs", return_value=dataclasses.replace(taken, embeds_BTD=embeds)):
        hidden = access.gold_pass(student, batch, False, found.gate(batch, step=0)).hidden_BTD
    sample, place = batch.response_places()
    answer = ~batch.latent_BT[sample, place]
    sample, place = sample[answer], place[answer]
    logits = access.head(student).logits(hidden[sample, place - 1])
    label = logits.gather(1, batch.input_ids_BT[sample, place][:, None])[:, 0]
    gradients = [torch.autograd.grad(one, embeds, retain_graph=True)[0] for one in label]
    return max(float(gradient[batch.image_BT].abs().max()) for gradient in gradients)


def test_a_shut_gate_leaves_the_latents_as_the_only_way_to_the_image(setup: Setup) -> None:
    assert answer_gradient(setup, gate_prompt=True, detach=False) > 1e-3
    # the cut is behind each layer, and the last latent, which predicts the first answer token, is one of them
    assert answer_gradient(setup, gate_prompt=True, detach=True) < 1e-5
    assert answer_gradient(setup, gate_prompt=False, detach=True) > 1e-3, "through the question"


class Looking:
    """Stands in for a tap: every latent attends to the visual tokens in given proportions, wherever they stand."""

    layers = (0, 1)

    def __init__(self, image_BT: Tensor, seen_J: Tensor) -> None:
        self.image_BT, self.seen_J = image_BT, seen_J

    def rows(self, _: int, index_BK: Tensor, __: Tensor) -> Tensor:
        found_BT = torch.full(self.image_BT.shape, 0.02)
        found_BT[self.image_BT] = self.seen_J
        return found_BT[:, None, None].expand(-1, 2, index_BK.shape[1], -1)


def test_latents_before_the_first_image_have_nothing_to_look_at() -> None:
    places = torch.arange(12)
    image, late = (places >= 5) & (places < 9), places >= 10
    seen, mass = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    mass_BT = torch.zeros(1, 12)
    mass_BT[0, image] = mass / mass.sum()

    class Causal(Looking):
        def rows(self, layer: int, index_BK: Tensor, mask_BT: Tensor) -> Tensor:
            before_BKT = (places[None, None] <= index_BK[..., None]).float()
            return super().rows(layer, index_BK, mask_BT) * before_BKT[:, None]

    def traj(latent: Tensor) -> float:
        ones, none = torch.ones(1, 12, dtype=torch.long), torch.zeros(1, 12, dtype=torch.bool)
        batch = Batch(ones, ones, image[None], none, none, None, latent_BT=latent[None])
        gold = access.GoldPass(torch.zeros(1, 12, 4), access.Inputs(torch.zeros(1, 12, 4), ones), None)
        made = Lavit(LavitOptions(), LavitHead(4, 3, "attention"), 10)
        gaze = Gaze(mass_BT, torch.ones(1, 3))
        found = made.losses(batch, gold, Causal(batch.image_BT, seen), gaze, Normaliser(1, 1))  # type: ignore[arg-type]
        return float(found["traj"])

    assert traj(late) > 0
    assert traj(late | (places == 1) | (places == 2)) == pytest.approx(traj(late), rel=1e-6)


def test_a_system_prefix_moves_the_image_and_not_the_loss(setup: Setup) -> None:
    """Places come from the image token, never from counting from the start."""
    example = setup.examples[0]
    visual = example.spans.count("image")
    seen, mass = torch.rand(2, visual, generator=torch.Generator().manual_seed(0))

    def traj(shift: int, counted: int | None = None) -> float:
        moved = dataclasses.replace(
            example, ids=(5,) * shift + example.ids, spans=("template",) * shift + example.spans
        )
        batch = to_batch(Collator(0, latents=setup.ids)([moved]))
        tap = Looking(batch.image_BT, seen)
        if counted is not None:
            batch = dataclasses.replace(batch, image_BT=(torch.arange(batch.image_BT.shape[1]) < counted)[None])
        index, valid = lavit.places(batch.latent_BT)  # type: ignore[arg-type]
        mass_BT = torch.zeros(batch.image_BT.shape)
        mass_BT[batch.image_BT] = mass / mass.sum()
        return float(lavit.trajectory(lavit.attended(tap, index, batch), mass_BT, valid, "mean"))  # type: ignore[arg-type]

    assert traj(7) == pytest.approx(traj(0), rel=1e-6)
    assert traj(7, counted=visual) != pytest.approx(traj(0), rel=1e-2)


def test_both_terms_reach_the_student_and_the_head(setup: Setup) -> None:
    for traj in ("attention", "head"):
        for name in ("concept", "traj"):
            objective = setup.objective(("sft", name), LossWeights(sft=0.0), traj=traj)
            setup.student.zero_grad()
            objective(setup.student, setup.batch(), Normaliser(1.0, 1.0), step=9)[0].backward()
            grad = setup.student.get_parameter("model.language_model.layers.0.self_attn.q_proj.weight").grad
            assert grad is not None
            assert grad.abs().max() > 0, (traj, name)
            trained = dict(objective.extra_parameters())
            wanted = "lavit.phi.0.weight" if name == "concept" else "lavit.look.weight"
            if wanted in trained:
                assert trained[wanted].grad is not None
                assert trained[wanted].grad.abs().max() > 0
    setup.student.zero_grad()


def test_packing_changes_nothing(setup: Setup) -> None:
    plain, packed = (
        Objective((*TERMS, "concept", "traj"), LossWeights(), Align(packing=p), o.teacher, 500, o.lavit)
        for p in (False, True)
        for o in [setup.objective(TERMS)]
    )
    batch = setup.batch()
    for step in (1, 9):
        one, two = (o(setup.student, batch, Normaliser.of(batch), step=step) for o in (plain, packed))
        for name, value in one[1].items():
            torch.testing.assert_close(two[1][name], value, atol=2e-5, rtol=1e-4)


def test_latents_are_put_before_every_answer() -> None:
    from distill.data.latent import put_in

    spans = ("template", "response", "response", "template", "response")
    example = Example(
        (1, 2, 3, 4, 5), spans, (), np.array([0, 1, 1, 0, 2], np.int16), np.array([1, 0.5, 0.5, 1, 2], np.float32)
    )
    found = put_in(example, (8, 9))
    assert found.ids == (1, 8, 9, 2, 3, 4, 8, 9, 5)
    assert found.spans == ("template", *["response"] * 4, "template", *["response"] * 3)
    assert found.steps is not None
    assert found.weights is not None
    assert found.steps.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 2]
    assert found.weights.tolist() == [1, 1, 1, 0.5, 0.5, 1, 1, 1, 2]


def test_make_student_has_no_latents(tmp_path: Path) -> None:
    assert open_checkpoint(make_student(tmp_path, **killing.SIZES)).tokenizer.spec.latent_token_ids == ()
