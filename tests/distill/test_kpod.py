"""KPOD: rationales as data, the weigher's gradient and what it learns, weights and schedule in training, resuming."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill import kpod, weigher
from distill.batch import Batch, Normaliser
from distill.config import Align, LossWeights, TrainConfig
from distill.data import Collator, DigitsExamples, open_records, to_batch
from distill.data.rationale import split_steps
from distill.data.records import DataOptions, Records
from distill.methods import KpodOptions, Tokens
from distill.objective import Objective
from distill.predictor import Places, Prefixes, predictor
from distill.schedule import Plan
from distill.train import train
from tests.distill import killing
from tests.tiny import make_student
from vlm import digits
from vlm.errors import DataError, UserError
from vlm.load import load_model, open_checkpoint


def write_rationales(folder: Path, count: int = 12, images: bool = False) -> Path:
    """Small sums, digit by digit, some about an image."""
    chance = random.Random(0)
    lines = []
    for number in range(count):
        a, b, c = (chance.randint(0, 9) for _ in range(3))
        record: dict[str, Any] = {"id": str(number), "question": f"What is {a} + {b} + {c}?", "answer": a + b + c}
        record["steps"] = [f"{a} + {b} = {a + b}", f"{a + b} + {c} = {a + b + c}"][: 1 + number % 2]
        if images and number % 3 == 0:
            digits.sample("train", number).image.save(folder / f"{number}.png")
            record["image"] = f"{number}.png"
        lines.append(json.dumps(record))
    path = folder / "rationales.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_student(tmp_path_factory.mktemp("student"), seed=3, layers=2, **killing.SIZES)


@pytest.fixture(scope="module")
def records(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Records:
    folder = tmp_path_factory.mktemp("data")
    source = open_checkpoint(student)
    return open_records(write_rationales(folder, images=True), DataOptions(), source.tokenizer, source.image)


def batch_of(records: Records, count: int = 4) -> tuple[Batch, Tensor]:
    examples = [records[i] for i in range(count)]
    ones = [dataclasses.replace(e, weights=np.ones(len(e.ids), np.float32)) for e in examples]
    tensors = Collator(0)(ones)
    return to_batch(tensors), tensors["step"].long()


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("<step>Pi is 3.14.</step> noise <step>So 2.</step>", ("Pi is 3.14.", "So 2.")),
        ("one. two\nthree", ("one. two", "three")),
        ("Pi is 3.14. Twice that is 6.28.", ("Pi is 3.14.", "Twice that is 6.28.")),
        ("Some animals, e.g. cats, purr. So yes!", ("Some animals, e.g. cats, purr.", "So yes!")),
        ("1. First add. 2. Then halve.", ("1. First add.", "2. Then halve.")),
        ("No stop here", ("No stop here",)),
    ],
)
def test_a_reasoning_is_taken_apart_at_its_steps(text: str, steps: tuple[str, ...]) -> None:
    assert split_steps(text) == steps


def test_every_token_knows_its_step(records: Records, student: Path) -> None:
    tokenizer = open_checkpoint(student).tokenizer
    assert records.survey.format == "rationale"
    for index in range(4):
        example, record = records[index], records.record(index)
        assert example.steps is not None
        for number, step in enumerate(record.steps, 1):
            said = tokenizer.decode([i for i, s in zip(example.ids, example.steps, strict=True) if s == number])
            assert said.strip() == step
        rest = [
            i
            for i, s, span in zip(example.ids, example.steps, example.spans, strict=True)
            if span == "response" and not s
        ]
        assert tokenizer.decode(rest).strip().startswith("Therefore, the answer is ")
        assert (len(example.pixels) == 1) == (index % 3 == 0)


def test_the_digits_task_can_say_its_steps(student: Path) -> None:
    source = open_checkpoint(student)
    examples = DigitsExamples("train", 30, source.tokenizer, source.image, steps=True)
    for index in range(30):
        example, sample = examples[index], digits.sample("train", index)
        assert example.steps is not None
        said = source.tokenizer.decode([i for i, s in zip(example.ids, example.spans, strict=True) if s == "response"])
        wanted = sample.answer.rsplit("= ")[-1]
        assert said.endswith(f"Therefore, the answer is {wanted}.")
        assert said.count(" is ") == int(example.steps.max()) + 1
    config = TrainConfig(preset="digits", format="rationale")
    assert config.format == "rationale"


@pytest.mark.parametrize(
    ("record", "seen"),
    [
        ({"question": "Q?", "steps": [], "answer": "1"}, r"field 'steps'"),
        ({"question": "Q?", "steps": ["a", ""], "answer": "1"}, r"field 'steps\[1\]'"),
        ({"question": "", "steps": ["a"], "answer": "1"}, r"field 'question'"),
        ({"question": "Q?", "steps": ["a"], "answer": None}, r"field 'answer'"),
        ({"question": "Q?", "steps": "a", "answer": "1"}, r"field 'steps'"),
    ],
)
def test_bad_rationales_are_refused_by_field(student: Path, tmp_path: Path, record: dict[str, Any], seen: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(record) + "\n")
    source = open_checkpoint(student)
    with pytest.raises(DataError, match=seen):
        open_records(file, DataOptions(), source.tokenizer, source.image)


def loss_and_gradient(student: Path, batch: Batch) -> tuple[Tensor, Tensor]:
    model = load_model(open_checkpoint(student)).train()
    objective = Objective(("sft",), LossWeights(), Align(), None, 512)
    loss, _ = objective(model, batch, Normaliser.of(batch))
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_weights_of_one_and_nothing_given_is_plain_training(student: Path, records: Records) -> None:
    batch, steps_BT = batch_of(records)
    plain = loss_and_gradient(student, dataclasses.replace(batch, token_weight_BT=None))
    plan = Plan(np.zeros((1, len(records)), np.int64), np.zeros(1), np.zeros(1))
    tensors = {"record": torch.arange(4), "step": steps_BT, "token_weight": torch.ones(steps_BT.shape)}
    adjusted = kpod.Curriculum(plan, 10, 0.5)(tensors, 3)["token_weight"]
    weighted = loss_and_gradient(student, dataclasses.replace(batch, token_weight_BT=adjusted))
    assert all(torch.equal(a, b) for a, b in zip(plain, weighted, strict=True))


def test_a_token_of_weight_zero_sends_no_gradient(student: Path, records: Records) -> None:
    """Another label at that token changes nothing, as long as no later token is trained behind it."""
    batch, _ = batch_of(records)
    last_B = batch.response_BT.long().cumsum(dim=1).argmax(dim=1)
    weight_BT = torch.ones(batch.response_BT.shape)
    weight_BT[torch.arange(4), last_B] = 0.0
    ids_BT = batch.input_ids_BT.clone()
    ids_BT[torch.arange(4), last_B] = 7
    zero = dataclasses.replace(batch, token_weight_BT=weight_BT)
    other = dataclasses.replace(zero, input_ids_BT=ids_BT)
    assert all(
        torch.equal(a, b)
        for a, b in zip(loss_and_gradient(student, zero), loss_and_gradient(student, other), strict=True)
    )
    one = dataclasses.replace(other, token_weight_BT=torch.ones(weight_BT.shape))
    assert not torch.equal(loss_and_gradient(student, zero)[0], loss_and_gradient(student, one)[0])


def test_given_steps_weigh_nothing_and_learned_ones_keep_their_weight(records: Records) -> None:
    batch, steps_BT = batch_of(records)
    plan = Plan(np.array([[1] * 12, [0] * 12]), np.zeros(2), np.zeros(2))
    tensors = {"record": torch.arange(4), "step": steps_BT, "token_weight": torch.full(steps_BT.shape, 0.25)}
    adjust = kpod.Curriculum(plan, steps=10, until=0.5)
    first, last = adjust(tensors, 0)["token_weight"], adjust(tensors, 9)["token_weight"]
    assert (first[steps_BT == 1] == 0).all()
    assert (first[steps_BT != 1] == 0.25).all()
    assert (last == 0.25).all()
    weighted = dataclasses.replace(batch, token_weight_BT=first)
    trained = int((batch.response_BT & (steps_BT != 1)).sum())
    assert float(weighted.response_tokens("weight")) == trained / 4
    assert int(weighted.response_tokens("count")) == trained
    assert int(weighted.response_tokens("sample")) == 4


def test_the_answer_reaches_the_weights(student: Path, records: Records) -> None:
    """The gradient of L_p alone; replacing token ids instead of mixing embeddings would leave it at zero."""
    model = load_model(open_checkpoint(student))
    batch, steps_BT = batch_of(records)
    copied, _ = predictor(model, KpodOptions(predictor_rank=0))
    made = weigher.Weigher(32)
    at = Places.of(batch, steps_BT)
    table = model.get_input_embeddings().weight.detach()
    found = weigher.losses(
        made,
        table[at.ids(batch)],
        at.real_BR,
        table.mean(dim=0),
        Prefixes(copied, batch, at, 2),
        2,
        1.0,
        torch.Generator().manual_seed(0),
    )
    found.prediction.backward()
    assert all(
        p.grad is not None and p.grad.any()
        for p in (made.last.weight, made.score[0].weight, made.attention.in_proj_weight)
    )


def test_a_whole_prefix_kept_in_full_costs_what_the_model_says(student: Path, records: Records) -> None:
    """And a shorter one what a sequence without the rest would cost, positions closed up."""
    model = load_model(open_checkpoint(student))
    batch, steps_BT = batch_of(records)
    at = Places.of(batch, steps_BT)
    predict = Prefixes(model, batch, at, 1)
    embeds = model.get_input_embeddings().weight[at.ids(batch)]
    with torch.no_grad():
        whole = predict(embeds, at.real_BR)
        cost_BT = kpod._costs(model, batch)
    expected = (cost_BT * (steps_BT == 0)).sum(dim=1)
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
    keep_BR = at.real_BR & (at.real_BR.long().cumsum(dim=1) <= 3)
    with torch.no_grad():
        short = predict(embeds, keep_BR)
    row = 1
    dropped = set(at.token_BR[row][at.real_BR[row] & ~keep_BR[row]].tolist())
    kept = [t for t in range(batch.input_ids_BT.shape[1]) if t not in dropped and batch.attention_mask_BT[row, t]]
    one = Batch(
        batch.input_ids_BT[row : row + 1, kept],
        torch.ones(1, len(kept), dtype=torch.long),
        batch.image_BT[row : row + 1, kept],
        batch.instruction_BT[row : row + 1, kept],
        (batch.response_BT & (steps_BT == 0))[row : row + 1, kept],
        None,
    )
    with torch.no_grad():
        naive = kpod._costs(model, one).sum()
    torch.testing.assert_close(short[row], naive, atol=1e-4, rtol=1e-4)


def test_drawn_prefixes_stand_for_all_of_them() -> None:
    real = torch.arange(12) < torch.tensor([[12], [7], [1]])
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(3)
    for _ in range(400):
        keep, scale = weigher.draw_prefixes(real, 4, torch.rand(3, 4, generator=generator))
        lengths = keep.sum(dim=1)
        assert (lengths >= 1).all()
        total += (lengths.float() ** 2 * scale).view(3, 4).sum(dim=1) / 400
    exact = torch.tensor([float(sum(k * k for k in range(1, n + 1))) for n in (12, 7, 1)])
    torch.testing.assert_close(total, exact, rtol=0.03, atol=0)


class Bag(nn.Module):
    """Predicts one of five classes from the mean of what is shown."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(hidden, 64), nn.ReLU(), nn.Linear(64, 5))

    def forward(self, shown_XRD: Tensor, keep_XR: Tensor) -> Tensor:
        keep = keep_XR[..., None].float()
        logits: Tensor = self.layers((shown_XRD * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1) * 4)
        return logits


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.5])
def test_tokens_that_decide_the_answer_get_the_weight(alpha: float) -> None:
    """20 kinds of tokens, five of which name the answer: the rank of their weights must separate them (AUC)."""
    torch.manual_seed(0)
    table = torch.randn(20, 16)
    made, bag = weigher.Weigher(16), Bag(16)
    generator = torch.Generator().manual_seed(1)
    real = torch.ones(32, 12, dtype=torch.bool)

    def draw() -> tuple[Tensor, Tensor]:
        ids = torch.randint(5, 20, (32, 12), generator=generator)
        label = torch.randint(0, 5, (32,), generator=generator)
        for _ in range(2):
            ids[torch.arange(32), torch.randint(0, 12, (32,), generator=generator)] = label
        return ids, label

    def loss_of(_: int, temperature: float) -> weigher.Losses:
        ids, label = draw()

        def predict(shown: Tensor, keep: Tensor) -> Tensor:
            return nn.functional.cross_entropy(bag(shown, keep), label.repeat_interleave(4), reduction="none")

        return weigher.losses(made, table[ids], real, table.mean(dim=0), predict, 4, temperature, generator)

    groups = [(list(made.parameters()), 2e-3), (list(bag.parameters()), 2e-3)]
    weigher.fit(groups, loss_of, alpha, 400, lambda *_: None)
    ids, _ = draw()
    with torch.no_grad():
        weight = torch.sigmoid(made(table[ids], real))
    key, filler = weight[ids < 5], weight[ids >= 5]
    auc = float((key[:, None] > filler[None]).float().mean() + 0.5 * (key[:, None] == filler[None]).float().mean())
    assert float(key.mean()) > 0.8
    assert auc > 0.95, (alpha, float(key.mean()), float(filler.mean()))


def test_a_weight_does_not_depend_on_later_tokens() -> None:
    """Else the mask of a prefix could tell the predictor what comes behind it."""
    made, real = weigher.Weigher(16).eval(), torch.ones(1, 6, dtype=torch.bool)
    embeds = torch.randn(1, 6, 16)
    other = embeds.clone()
    other[:, 4:] = torch.randn(1, 2, 16)
    with torch.no_grad():
        one, two = made(embeds, real), made(other, real)
    torch.testing.assert_close(one[:, :4], two[:, :4], rtol=0, atol=1e-6)
    assert not torch.allclose(one[:, 4:], two[:, 4:])


def recipe(folder: Path, student: Path, images: bool = True) -> TrainConfig:
    return TrainConfig(
        student=str(student),
        data=write_rationales(folder, images=images),
        objective="sft",
        steps=8,
        batch_size=3,
        lr=3e-3,
        save_every=3,
        log_every=1,
        visual_every=0,
        report_to="none",
        threads=1,
        tokens=Tokens(weights="kpod"),
        schedule="kpod",
        kpod=KpodOptions(weigher_steps=3, weigher_batch=4, predictor_rank=2, stages=3),
    )


def test_a_run_resumes_to_the_same_bits(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(tmp_path, student)
    whole = dataclasses.replace(config, out=tmp_path / "whole")
    train(whole)
    said = capsys.readouterr().err
    assert "weights=kpod" in said
    assert "schedule=kpod" in said
    assert "arXiv 2405.16064" in said
    cut = dataclasses.replace(config, out=tmp_path / "cut")
    killing.stop_after(cut, 5)
    assert (cut.out / kpod.FILE).is_file()
    train(dataclasses.replace(cut, resume=True))
    assert not killing.differences(whole.out, cut.out)


def test_neither_weights_nor_schedule_is_plain_training(student: Path, tmp_path: Path) -> None:
    plain = dataclasses.replace(
        recipe(tmp_path, student), out=tmp_path / "plain", tokens=Tokens(), schedule="none", kpod=KpodOptions()
    )
    train(plain)
    assert not (plain.out / kpod.FILE).exists()
    only = dataclasses.replace(recipe(tmp_path, student), out=tmp_path / "only", tokens=Tokens())
    train(only)
    assert killing.differences(plain.out, only.out), "the schedule changes what is learned"


def test_data_without_steps_is_refused(student: Path, tmp_path: Path) -> None:
    config = recipe(tmp_path, student)
    file = tmp_path / "plain.jsonl"
    turns = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A"}]
    file.write_text("".join(json.dumps({"conversations": turns, "id": i}) + "\n" for i in range(4)))
    with pytest.raises(UserError, match="--format rationale"):
        train(dataclasses.replace(config, data=file, out=tmp_path / "run"))
    with pytest.raises(UserError, match=r"add --tokens\.weights kpod"):
        TrainConfig(preset="digits", kpod=KpodOptions(alpha=0.1))
    with pytest.raises(UserError, match=r"kpod\.floor"):
        KpodOptions(floor=2.0)
