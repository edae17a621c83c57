"""IRS against its formula on eager attention maps, and the cases where it cannot be computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from distill import irs
from distill.data import Collator, Example
from tests.distill.conftest import Pair
from tests.distill.test_align_ti import eager_weights
from vlm.errors import DataError


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
