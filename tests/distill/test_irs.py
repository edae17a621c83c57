"""IRS against its formula on eager attention maps, and the cases where it cannot be computed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distill import irs
from distill.__main__ import main
from distill.data import Collator, DigitsExamples, Example
from tests.distill.conftest import Pair
from tests.distill.test_align_ti import eager_weights
from vlm import chat, digits
from vlm.errors import DataError, UserError


def test_scores_equal_the_formula_on_eager_maps(qwen2_pair: Pair) -> None:
    examples = [example for example in qwen2_pair.examples() if example.pixels]
    collate = Collator(qwen2_pair.checkpoint.tokenizer.spec.pad_token_id)
    scores = irs.layer_scores(qwen2_pair.teacher, examples, 10, collate, size=2)
    pairs = irs.instruction_pairs(examples, 10)
    assert scores.pairs == len(pairs)
    for layer, score in enumerate(scores.scores):
        cosines = []
        for one, other in pairs:
            maps = []
            for example in (one, other):
                batch = qwen2_pair.collate([example])
                maps.append(eager_weights(qwen2_pair, batch, layer)[batch.image_BT])
            cosines.append(F.cosine_similarity(maps[0], maps[1], dim=0))
        assert score == pytest.approx(1 - float(torch.stack(cosines).mean()), abs=1e-5)
    assert scores.best == max(range(len(scores.scores)), key=lambda layer: scores.scores[layer])


def test_pairs_keep_the_image_change_the_instruction_and_hide_the_answer(qwen2_pair: Pair) -> None:
    pairs = irs.instruction_pairs(qwen2_pair.examples(), 10)
    assert pairs
    for one, other in pairs:
        assert one.pixels is other.pixels
        assert one.ids != other.ids
        assert "response" not in one.spans + other.spans


def test_without_two_instructions_about_images_it_says_what_to_do(qwen2_pair: Pair) -> None:
    text_only = [Example(example.ids, example.spans, ()) for example in qwen2_pair.examples()]
    same = [qwen2_pair.examples()[0]] * 3
    for examples in (text_only, same):
        with pytest.raises(DataError, match="iva_layer"):
            irs.instruction_pairs(examples, 10)


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    irs.plot(irs.LayerScores((0.1, 0.4, 0.2), 7), tmp_path / "irs.png")
    assert Image.open(tmp_path / "irs.png").size[0] > 300


def test_two_turns_about_one_image_pair_with_each_other(qwen2_pair: Pair) -> None:
    """Sample 2 of the fixture asks twice about its image; no instruction need be borrowed for it."""
    built = irs.build_pairs([qwen2_pair.examples()[2]], 10)
    assert (built.same_image, len(built.found), built.usable, built.looked_at) == (1, 1, 1, 1)
    tokenizer = qwen2_pair.checkpoint.tokenizer
    one, other = built.found[0]
    assert one.pixels is other.pixels
    questions = {words(tokenizer, example) for example in (one, other)}
    assert questions == {digits.sample("train", 3).question, "And what else?"}
    for example in (one, other):
        assert "response" not in example.spans
        question = chat.user_message(words(tokenizer, example))
        assert list(example.ids) == tokenizer.prompt_ids([question]), "the same prompt the model would be asked"


def words(tokenizer: chat.ChatTokenizer, example: Example) -> str:
    asked = [token for token, span in zip(example.ids, example.spans, strict=True) if span == "instruction"]
    return tokenizer.decode(asked)


def test_records_that_share_an_image_pair_with_each_other(qwen2_pair: Pair) -> None:
    one, _, _, other = qwen2_pair.examples()[:4]
    shared = dataclasses.replace(other, pixels=one.pixels)
    built = irs.build_pairs([one, shared], 10)
    assert (built.same_image, len(built.found)) == (1, 1)
    apart = irs.build_pairs([one, other], 10)
    assert (apart.same_image, len(apart.found)) == (0, 2)


def test_the_draw_depends_on_the_seed_and_on_nothing_else(qwen2_pair: Pair) -> None:
    checkpoint = qwen2_pair.checkpoint
    examples = DigitsExamples("train", 500, checkpoint.tokenizer, checkpoint.image)
    drawn = [[one.ids for one, _ in irs.build_pairs(examples, 20, seed).found] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    consecutive = {examples[i].ids for i in range(21)}
    assert not set(drawn[0]) <= consecutive


def test_padding_and_batch_size_do_not_change_the_scores(qwen2_pair: Pair) -> None:
    examples = [example for example in qwen2_pair.examples() if example.pixels]
    pad = qwen2_pair.checkpoint.tokenizer.spec.pad_token_id
    scores = [
        irs.layer_scores(qwen2_pair.teacher, examples, 10, Collator(pad, left), size=size)
        for left, size in ((False, 1), (False, 3), (True, 3))
    ]
    for other in scores[1:]:
        assert other.scores == pytest.approx(scores[0].scores, abs=1e-6)


def test_intervals_hold_the_scores_and_know_a_clear_winner() -> None:
    rng = np.random.default_rng(0)
    clear = irs._summary(np.stack([rng.normal(0.2, 0.05, 300), rng.normal(0.6, 0.05, 300)]), 0)
    assert clear.best == 1
    assert clear.stability == 1.0
    for score, (low, high) in zip(clear.scores, clear.intervals, strict=True):
        assert low < score < high
        assert high - low == pytest.approx(2 * 1.96 * 0.05 / 300**0.5, rel=0.2)
    same = irs._summary(np.stack([rng.normal(0.5, 0.05, 300), rng.normal(0.5, 0.05, 300)]), 0)
    assert same.stability is not None
    assert same.stability < 1.0


def test_the_command_prints_a_table_and_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["irs", "--preset", "digits", "--pairs", "12", "--threads=1", "--out", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr().out
    value = json.loads(printed.splitlines()[-1])
    assert value["pairs"] == 12
    assert len(value["scores"]) == len(value["intervals"]) == 4
    assert f"--align.iva_layer {value['best']}" in printed
    assert json.loads((tmp_path / "irs.json").read_text()) == value
    assert (tmp_path / "irs.png").is_file()


def test_settings_of_the_objective_do_not_matter_to_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["irs", "--preset", "digits", "--pairs", "4", "--threads=1", "--samples", "8"]
    assert main([*words, "--objective", "kd+lavit", "--lavit.latents", "8", "--weights.sft", "0"]) == 0
    assert "--align.iva_layer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words_", "seen"),
    [
        ([], "--teacher"),
        (["--preset", "digits", "--pairs", "1"], "pairs"),
        (["--preset", "digits", "--pairz", "9"], "did you mean --pairs"),
        (["--recipe", "digits-stages"], "stages"),
    ],
)
def test_the_command_refuses(words_: list[str], seen: str) -> None:
    with pytest.raises(UserError, match=seen):
        main(["irs", *words_])
