"""MME-Reasoning and the generic JSON task: hand-made records, scores computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.tasks import read_task
from runtime.tasks.base import TaskOptions
from vlm.errors import DataError, UserError

from .playing import picture, play

PREFIX = "calculate_answer_function_"
SUDOKU = [[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]]
GIVENS = "{'base_matrix': [[1, None, None, 4], [None]*4, [None]*4, [4, None, None, 1]]}".replace(
    "[None]*4", "[None, None, None, None]"
)
ISLANDS = "{'init_islands': [{'cord': 'a1', 'requirement': 2}, {'cord': 'c1', 'requirement': 3}, {'cord': 'c3', 'requirement': 1}]}"
BRIDGES = '[{"start": "a1", "end": "c1", "number": 2}, {"start": "c1", "end": "c3", "number": 1}]'
TOWERS = "{'base_matrix': [[None, None], [None, None]], 'visible_skyscrapers': [[2, 1], [2, 1], [1, 2], [1, 2]]}"
# question type, function, prompt, answer, special info, reply, score
REASONING: list[tuple[str, str | None, str | None, Any, str | None, str, int]] = [
    ("choice", None, None, "B", None, "Answer: B", 1),
    ("choice", None, None, "A", None, "A flute is heard. Option B", 0),
    ("choice", None, None, "['A', 'C']", None, "The possible answer is: C, A", 1),
    ("choice", None, None, "A,C", None, "A", 0),
    ("choice", None, None, "A", None, "", 0),
    ("open", None, None, "3.5", None, "So it must be 7/2.\nAnswer: 7/2", 1),
    ("open", None, None, "\\sqrt{2}", None, "Answer: 1.414", 1),
    ("open", None, None, "Left", None, "The answer is left.", 1),
    ("open", None, None, "4", None, "unanswerable", 0),
    ("rule", "judge_24points_function", "points24_prompt", None, "{'init_cards': [3, 3, 8, 8]}", "8/(3-8/3)=24", 1),
    ("rule", "judge_24points_function", "points24_prompt", None, "{'init_cards': [1, 8, 9, 13]}",
     "The possible answer is (K - 9 - A) × 8 = 24", 1),
    ("rule", "judge_24points_function", "points24_prompt", None, "{'init_cards': [3, 3, 8, 8]}", "3*8=24", 0),
    ("rule", "judge_24points_function", "points24_prompt", None, "{'init_cards': [4, 6]}",
     "__import__('os').system('touch PWNED') or 4*6", 0),
    ("rule", f"{PREFIX}1", "id_answer_pair_prompt", None, None, "Answer: A: 6, B: 2, C: 4", 1),
    ("rule", f"{PREFIX}1", "id_answer_pair_prompt", None, None, '{"A": 6, "B": 2, "C": 5}', 0),
    ("rule", f"{PREFIX}12", "id_answer_pair_prompt", None, None,
     'Answer: {"C": 8, "A": 1, "T": 5, "D": 2, "O": 3, "G": 7, "P": 1, "E": 0, "S": 2}', 1),
    ("rule", f"{PREFIX}sudoku_4", "sudoku_4_extraction_prompt", None, GIVENS, f"Final grid:\n{SUDOKU}", 1),
    ("rule", f"{PREFIX}sudoku_4", "sudoku_4_extraction_prompt", None, GIVENS, "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 1 2", 0),
    ("rule", f"{PREFIX}skyscraper", "skyscraper_extraction_prompt", None, TOWERS, "[[1, 2], [2, 1]]", 1),
    ("rule", f"{PREFIX}skyscraper", "skyscraper_extraction_prompt", None, TOWERS, "[[2, 1], [1, 2]]", 0),
    ("rule", f"{PREFIX}hashi", "hashi_extraction_prompt", None, ISLANDS, f"Answer: {BRIDGES}", 1),
    ("rule", f"{PREFIX}hashi", "hashi_extraction_prompt", None, ISLANDS, "a1-c1: 1, c1-c3: 1", 0),
    ("rule", "match_answer_function", "id_answer_pair_prompt_reverse", "{'1': 'A', '2': ['B', 'C']}", None,
     '{"1": "a", "2": ["C", "B"]}', 1),
    ("rule", "match_coordinate_function", "coordinate_answer_prompt", "[{'row': 'A', 'column': 1}, {'row': 'B', 'column': 3}]",
     None, "The possible answer is: (A, 1), (B, 3)", 1),
    ("rule", "match_coordinate_function", "coordinate_answer_prompt", "{'row': 'A', 'column': 1}", None, "(B, 1)", 0),
    ("rule", "multiple_match_function", "multiple_answer_prompt", "[['A', 'C'], ['B', 'D']]", None,
     'Answer: {"id": ["D", "B"]}', 1),
    ("rule", "compare_expression_function", "formula_extraction_prompt", "['2+3=5', '1+4=5']", None,
     "The right equation is: 3 + 2 = 5", 1),
    ("rule", "compare_expression_function", "formula_extraction_prompt", "['2*3=6']", None, "Answer: 2+3=5", 0),
]  # fmt: skip
CAPABILITY = ("calculation", "planning and exploring, calculation", "spatial-temporal", "casual chaining analysis")
KIND = ("deductive", "inductive", "abductive")


def test_mme_reasoning(tmp_path: Path) -> None:
    rows = []
    for n, (kind, function, prompt, answer, info, _, _) in enumerate(REASONING):
        picture(tmp_path / f"images/{n}.png", n)
        rows.append({
            "index": n, "image": f"images/{n}.png", "question": f"Question {n}?", "answer": answer, "question_type": kind,
            "function_id": function, "prompt_id": prompt, "special_info": info, "capability": CAPABILITY[n % 4],
            "reasoning_type": KIND[n % 3],
        })  # fmt: skip
    (tmp_path / "mme_reasoning.json").write_text(json.dumps(rows))
    played = play("mme-reasoning", [row[5] for row in REASONING], tmp_path / "run", tmp_path)
    wanted = [row[6] for row in REASONING]
    assert played.scores == wanted
    # choice 2, open 3, 24 points 2, number puzzles 2, grids and bridges 3, matches 4
    assert played.summary.score == 16 / 28
    # several capabilities may be written in one field: every fourth record counts for two
    halves = [score for n, score in enumerate(wanted) if n % 4 in (0, 1)]
    assert played.part("calculation") == sum(halves) / 14
    assert played.part("planning and exploring") == sum(wanted[1::4]) / 7
    assert "pattern analysis" not in played.summary.parts
    assert played.part("deductive") == sum(wanted[0::3]) / 10
    assert (played.part("choice questions"), played.part("open questions")) == (2 / 5, 3 / 4)
    assert played.part("rule questions") == 11 / 19
    assert played.task.items[9].prompt.startswith("Question 9?\nEnd with one line that starts with")
    assert not (tmp_path / "PWNED").exists()
    assert not Path("PWNED").exists()


def test_aggregates_reproduce_a_table_made_by_hand() -> None:
    from vlm.scoring.benchmarks import BENCHMARKS

    six = [
        ("calculation", "deductive", 1), ("calculation", "inductive", 0), ("pattern analysis", "inductive", 1),
        ("pattern analysis, calculation", "abductive", 1), ("spatial-temporal", "abductive", 0),
        ("casual chaining analysis", "deductive", 0),
    ]  # fmt: skip
    records = [
        {"id": str(n), "group": {"capability": c, "reasoning_type": r, "question_type": "choice"}, "score": float(s)}
        for n, (c, r, s) in enumerate(six)
    ]
    summary = BENCHMARKS["mme-reasoning"].summarise(records)
    table = {name: (part.score, part.n) for name, part in summary.parts.items()}
    assert summary.score == 3 / 6
    assert table == {
        "calculation": (2 / 3, 3), "pattern analysis": (1, 2), "spatial-temporal": (0, 1), "casual chaining analysis": (0, 1),
        "deductive": (1 / 2, 2), "inductive": (1 / 2, 2), "abductive": (1 / 2, 2), "choice questions": (1 / 2, 6),
    }  # fmt: skip


# metric, answer, options, reply, score
GENERIC: list[tuple[str | None, Any, Any, str, float]] = [
    (None, "a red bus", None, "A  red bus", 1),  # no metric: exact, without case and white space
    (None, "a red bus", None, "red bus", 0),
    ("exact", ["colour", "color"], None, "color", 1),
    ("choice", "B", ["cat", "dog"], "Answer: B", 1),
    ("choice", "B", {"A": "cat", "B": "dog"}, "a dog", 1),
    (None, "A", ["cat", "dog"], "cat or dog", 0),  # options without a metric: choice
    ("choice", ["A", "C"], ["x", "y", "z"], "C and A", 1),
    ("yes_no", "yes", None, "yes, it is", 1),
    ("yes_no", "no", None, "unanswerable", 0),
    ("number", "3.5", None, "The answer is 7/2.", 1),
    ("number", 1234, None, "about 1,234 people", 1),
    ("number", "12", None, "twelve", 0),
    ("relaxed", "100", None, "104.9", 1),
    ("relaxed", "100", None, "106", 0),
    ("expression", "24", None, "8/(3-8/3)", 1),
    ("expression", "24", None, "__import__('os').getpid()", 0),
    ("set", ["a", "b"], None, "b, a", 1),
    ("set", ["a", "b"], None, "a, a", 0),
    ("grid", [[1, 2], [3, 4]], None, "so:\n1 2\n3 4", 1),
    ("grid", [[1, 2], [3, 4]], None, "[[1, 2], [4, 3]]", 0),
    ("ocr", "no smoking here", None, "no smoking", 2 / 3),
    ("text", "the cat sat", None, "the cat ran", (2 / 3 + 1 / 2 + 2 / 3) / 3),
    ("vqa", ["two"] * 3 + ["x"] * 7, None, "2", 0.9),
    ("anls", ["hello"], None, "hallo", 0.8),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_generic(tmp_path: Path, kind: str) -> None:
    rows = []
    for n, (metric, answer, options, _, _) in enumerate(GENERIC):
        picture(tmp_path / f"{n}.png", n)
        row = {
            "id": f"q{n}",
            "question": f"Question {n}?",
            "image": f"{n}.png",
            "answer": answer,
            "category": f"c{n % 2}",
        }
        rows.append(row | ({"metric": metric} if metric else {}) | ({"options": options} if options else {}))
    path = tmp_path / f"task.{kind}"
    path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    played = play("json", [row[3] for row in GENERIC], tmp_path / "run", path)
    assert played.scores == pytest.approx([row[4] for row in GENERIC], abs=1e-12)
    assert played.summary.score == pytest.approx(sum(row[4] for row in GENERIC) / 24, abs=1e-12)


def test_generic_reads_the_training_form(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a cat"}]
    (tmp_path / "t.json").write_text(
        json.dumps([{"id": "1", "image": str(picture(tmp_path / "a.png")), "conversations": turns}])
    )
    (item,) = read_task("json", TaskOptions(data=tmp_path / "t.json")).items
    assert (item.prompt, item.truth) == ("What is it?", {"metric": "exact", "answer": "a cat"})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no question"),
        ([{"question": "x"}], "record 1: no 'answer'"),
        ([{"answer": "x"}], "no 'question'"),
        ([{"question": "x", "answer": "y", "metric": "bleu"}], "metric is 'bleu'; known: exact, choice"),
        ([{"question": "x", "answer": "A", "metric": "choice"}], "needs 'options'"),
        ([{"id": 1, "question": "x", "answer": "y"}, {"id": 1, "question": "x", "answer": "y"}], "id '1' occurs twice"),
        (["x"], "expected a list of objects"),
    ],
)
def test_generic_bad_records(tmp_path: Path, rows: list[Any], message: str) -> None:
    (tmp_path / "t.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=message):
        read_task("json", TaskOptions(data=tmp_path / "t.json"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.json", "{", "is not valid JSON"),
        ("t.jsonl", '{"question": "x", "answer": "y"}\n{', "line 2: not JSON"),
        ("t.jsonl", "[1]", "line 1: expected an object, found list"),
        ("t.parquet", "not parquet", "cannot be read as parquet"),
        ("t.yaml", "a: 1", "is not .json, .jsonl"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_task("json", TaskOptions(data=tmp_path / name))
    assert name in caught.value.message


@pytest.mark.parametrize("task", ["gqa", "scienceqa-img", "textvqa", "pope", "mme", "mmbench", "mmvp", "blink", "vstar",
                                  "mmstar", "mme-reasoning", "av-odyssey", "json"])  # fmt: skip
def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path, task: str) -> None:
    with pytest.raises(UserError, match=r"looked for|holds no question"):
        read_task(task, TaskOptions(data=tmp_path))
    with pytest.raises(UserError, match="add `--data DIR`"):
        read_task(task, TaskOptions())
    with pytest.raises(UserError, match="no data at"):
        read_task(task, TaskOptions(data=tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("task", "name", "text"),
    [
        ("gqa", "testdev_balanced_questions.json", '{"1": {"question": "x", "answer": "y", "types": ["z"]}}'),
        ("gqa", "testdev_balanced_questions.json", "[1]"),
        ("textvqa", "TextVQA_0.5.1_val.json", '{"data": 3}'),
        ("textvqa", "TextVQA_0.5.1_val.json", "[]"),
        ("pope", "coco_pope_random.json", '{"text": 1, "label": 2, "image": 3}'),
        ("mme", "count/1.txt", "no tab here"),
        ("mme", "count/1.txt", "Is it?\tperhaps"),
        ("mmbench", "x.tsv", "index\tquestion\tA\nfirst\twhat\tx"),
        ("mmbench", "x.tsv", "no\theader"),
        ("mmvp", "Questions.csv", "Index,Question,Options,Correct Answer\none,x,(a) b (b) c,(a)"),
        ("mmvp", "Questions.csv", "Index,Question,Options,Correct Answer\n1,x,no options,(a)"),
        ("vstar", "test_questions.jsonl", '{"image": 1, "text": 2, "label": 3}'),
        ("mmstar", "MMStar.tsv", "index\tquestion\n1\tx"),
        ("mme-reasoning", "x.json", '[{"question": "x", "question_type": "puzzle"}]'),
        ("mme-reasoning", "x.json", '[{"question": "x", "question_type": "choice", "image": "[1"}]'),
        ("scienceqa", "problems.json", '{"1": {"question": "x", "choices": "ab", "answer": "z"}}'),
        ("json", "t.json", '[{"question": "x", "answer": "y", "options": 3}]'),
        ("json", "t.json", '[{"conversations": 1}]'),
        ("json", "t.json", '[{"question": "x", "answers": []}]'),
        ("json", "t.json", '[{"question": "x", "answer": "y", "image": 7}]'),
        ("json", "t.json", '[{"question": "x", "answer": "y", "images": [{"path": "a.png"}]}]'),
        ("json", "t.json", '[{"question": "x", "answer": "y", "images": "a.png"}]'),
    ],
)
def test_rows_of_the_wrong_kind_are_one_line(tmp_path: Path, task: str, name: str, text: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    (tmp_path / "pid_splits.json").write_text('{"test": ["1"]}')
    with pytest.raises(UserError) as caught:
        read_task(task, TaskOptions(data=tmp_path))
    assert "\n" not in caught.value.message


def test_placeholders_for_the_image_are_left_out_of_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps([{"question": "<image>\nWhat is it? <image>", "answer": "y"}]))
    assert read_task("json", TaskOptions(data=tmp_path)).items[0].prompt == "What is it?"
