"""distill, export and runtime measure a student with one ruler: the same questions get the same scores, one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TEACHER = Path(__file__).parents[1] / "distill/assets/digits-teacher"
COUNT = 40


@pytest.fixture(scope="module")
def by_runtime(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Scores of `runtime eval`: text against text, by `vlm.scoring`."""
    from runtime import cli

    out = tmp_path_factory.mktemp("eval") / "run"
    given = ["eval", str(TEACHER), "--task", "digits", "--samples", str(COUNT), "--batch", "20", "--out", str(out)]
    assert cli.main(given) == 0
    return [json.loads(line)["score"] for line in (out / "samples.jsonl").read_text().splitlines()]


def test_distill(by_runtime: list[float]) -> None:
    """Training decides token by token in one pass whether greedy decoding gives the answer."""
    from distill.data import Collator, DigitsExamples
    from distill.evaluate import greedy_matches
    from vlm.load import load_model, open_checkpoint

    checkpoint = open_checkpoint(TEACHER)
    examples = DigitsExamples("test", COUNT, checkpoint.tokenizer, checkpoint.image)
    collate = Collator(checkpoint.tokenizer.spec.pad_token_id)
    found = greedy_matches(load_model(checkpoint), examples, COUNT, collate)
    assert [float(match) for match in found] == by_runtime
    assert 0 < sum(by_runtime) < COUNT  # both outcomes occur


def test_export(by_runtime: list[float]) -> None:
    """The accuracy gate compares texts by the same function."""
    from export import evidence
    from vlm.scoring import text

    assert evidence.exact_match is text.exact_match  # type: ignore[attr-defined]
    assert sum(by_runtime) > 0
