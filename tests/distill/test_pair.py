"""Which pairs may be distilled: padded vocabularies work, everything else that differs is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from distill import access
from distill.assemble import build_tokenizer, save_checkpoint
from distill.config import TERMS, Align, LossWeights, TrainConfig
from distill.data import Collator, Example, to_batch
from distill.objective import Batch, Normaliser, Objective
from distill.pair import shared_vocabulary
from distill.teacher import LiveTeacher
from distill.train import train
from tests.tiny import make_student
from vlm import chat, digits, preprocess
from vlm.errors import CheckpointError
from vlm.load import Checkpoint, load_model, open_checkpoint


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    make_student(folder / "student", seed=2, hidden=64, head_dim=16, intermediate=96)
    make_student(folder / "teacher", seed=1, hidden=64, head_dim=16, intermediate=96, layers=3, tied=False)
    return folder


def padded(source: Path, out: Path, rows: int) -> Path:
    """The same model with more embedding rows, as 152064 are to 151936."""
    from transformers import AutoProcessor

    model = load_model(open_checkpoint(source))
    torch.manual_seed(0)
    model.resize_token_embeddings(rows)
    with torch.no_grad():
        # what lies in padding rows is anybody's guess: large values would be seen at once
        model.lm_head.weight[384:] = model.lm_head.weight[:64] * 3
    save_checkpoint(model, AutoProcessor.from_pretrained(source), out, {})
    return out


def batch_of(checkpoint: Checkpoint) -> Batch:
    examples = []
    for index in range(3):
        sample = digits.sample("train", index)
        messages = [chat.user_message(sample.question), {"role": "assistant", "content": sample.answer}]
        conversation = checkpoint.tokenizer.conversation(messages)
        pixels = (preprocess.pixels(sample.image, checkpoint.image),)
        examples.append(Example(conversation.ids, conversation.spans, pixels))
    return to_batch(Collator(checkpoint.tokenizer.spec.pad_token_id)(examples))


@pytest.mark.parametrize("wider", ["teacher", "student"])
def test_padding_rows_take_no_part(shelf: Path, tmp_path: Path, wider: str) -> None:
    places = {"teacher": shelf / "teacher", "student": shelf / "student"}
    places[wider] = padded(places[wider], tmp_path / wider, 448)
    teacher, student = open_checkpoint(places["teacher"]), open_checkpoint(places["student"])
    vocabulary = shared_vocabulary(teacher, student)
    assert vocabulary == 384
    live, learner = load_model(teacher).requires_grad_(False), load_model(student)
    batch = batch_of(student)
    align = Align(iva_rows=0)
    objective = Objective(TERMS, LossWeights(), align, LiveTeacher(live, align, 1), vocabulary)
    loss, values = objective(learner, batch, Normaliser.of(batch))
    loss.backward()
    at = batch.response_BT[:, 1:].nonzero(as_tuple=True)
    ours, theirs = (
        access.head(model).logits(access.gold_pass(model, batch, False).hidden_BTD[at])[:, :384]
        for model in (learner, live)
    )
    naive = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="sum") / len(ours)
    torch.testing.assert_close(values["kd"], naive.detach(), rtol=1e-4, atol=1e-5)
    assert all(bool(value.isfinite()) for value in values.values())
    assert all(
        bool(parameter.grad.isfinite().all()) for parameter in learner.parameters() if parameter.grad is not None
    )


def test_a_padded_pair_trains(shelf: Path, tmp_path: Path) -> None:
    wide = padded(shelf / "teacher", tmp_path / "wide", 448)
    result = train(
        TrainConfig(
            preset="digits",
            teacher=str(wide),
            student=str(shelf / "student"),
            out=tmp_path / "run",
            steps=2,
            batch_size=2,
            samples=8,
            eval_samples=4,
            log_every=1,
            threads=1,
            align=Align(iva_layer=1),
        )
    )
    assert open_checkpoint(result.student).config["text_config"]["vocab_size"] == 384
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    terms = [line for line in logged if "kd" in line]
    assert len(terms) == 2
    assert all(line[name] == line[name] and line[name] >= 0 for line in terms for name in TERMS)


def test_the_first_difference_is_named(shelf: Path, tmp_path: Path) -> None:
    teacher = open_checkpoint(shelf / "teacher")

    def other(name: str) -> Path:
        return Path(shutil.copytree(shelf / "student", tmp_path / name))

    def refused(directory: Path, seen: str) -> None:
        with pytest.raises(CheckpointError, match=seen) as caught:
            shared_vocabulary(teacher, open_checkpoint(directory))
        assert str(directory) in str(caught.value)
        assert "\n" not in str(caught.value)

    words = other("words")
    build_tokenizer(["entirely other words make other merges"] * 9).save_pretrained(words)
    config = json.loads((words / "config.json").read_text())
    tokenizer = open_tokenizer(words)
    config["image_token_id"] = tokenizer["<image>"]
    (words / "config.json").write_text(json.dumps(config))
    refused(words, r"token \d+ is '.+' in the teacher and ('.+'|missing) in the student")

    image = other("image")
    config = json.loads((image / "config.json").read_text())
    (image / "config.json").write_text(json.dumps({**config, "image_token_id": 7}))
    refused(image, "the image token is '<image>' in the teacher and")

    ends = other("ends")
    for name, key in (("generation_config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token")):
        value = json.loads((ends / name).read_text())
        (ends / name).write_text(json.dumps({**value, key: 9 if name.startswith("gen") else "!"}))
    refused(ends, r"answers end with tokens .* in the teacher and .* in the student")

    template = other("template")
    text = (template / "chat_template.jinja").read_text()
    (template / "chat_template.jinja").write_text(text.replace("assistant", "model"))
    refused(template, r"chat templates differ at character \d+: .*assistant.* in the teacher and .*model")

    make_student(tmp_path / "patches", patch_size=16)
    refused(tmp_path / "patches", "visual tokens per image 16 in the teacher and 4 in the student")

    pixels = other("pixels")
    value = json.loads((pixels / "processor_config.json").read_text())
    value["image_processor"]["image_mean"] = [0.4, 0.5, 0.5]
    (pixels / "processor_config.json").write_text(json.dumps(value))
    refused(pixels, r"image mean \(0.5, 0.5, 0.5\) in the teacher and \(0.4, 0.5, 0.5\) in the student")


def open_tokenizer(directory: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    return dict(Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab(with_added_tokens=True))
