"""GQA, TextVQA, POPE, MME: hand-made records in the official layouts, scores computed by hand."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from runtime.tasks import read_task
from runtime.tasks.base import TaskOptions
from vlm.errors import DataError

from .playing import Played, picture, play

# answer, structural type, reply, score: GQA takes trailing full stops off, lowers the case, and compares
GQA = [
    ("yes", "verify", "Yes", 1),
    ("yes", "verify", "Yes.", 1),
    ("yes", "verify", "yes, it is", 0),
    ("no", "logical", "No...", 1),
    ("dog", "query", "a dog", 0),  # articles count
    ("two", "query", "2", 0),  # number words are not numbers here
    ("t-shirt", "query", "T-shirt", 1),
    ("dog", "query", " dog ", 1),
    ("dog", "query", "dogs", 0),
    ("left", "choose", "", 0),
    ("left", "choose", "left\n", 1),
    ("it's", "query", "its", 0),  # contractions are not mended
    ("white", "query", "White!", 0),
    ("fire truck", "query", "fire truck.", 1),
    ("fire truck", "query", "firetruck", 0),
    ("right", "choose", "the right", 0),
    ("no", "compare", "not", 0),
    ("cat", "query", ".cat", 0),
    ("man", "query", "Man", 1),
    ("red", "query", "red. ", 1),
]


def _gqa_questions() -> dict[str, dict[str, object]]:
    return {
        f"20{n:02d}": {
            "question": f"Question {n}?",
            "answer": answer,
            "imageId": f"n{n // 2}",
            "isBalanced": True,
            "types": {"structural": structural, "semantic": "rel" if n % 2 else "attr", "detailed": "x"},
        }
        for n, (answer, structural, _, _) in enumerate(GQA)
    }


def _check_gqa(played: Played) -> None:
    assert played.scores == [score for *_, score in GQA]
    assert played.summary.score == 9 / 20
    # binary: yes, yes, yes-it-is, no, left, left, right, not = 4 of 8; open: 5 of 12
    assert played.part("form binary") == 4 / 8
    assert played.part("form open") == 5 / 12
    assert played.part("structural verify") == 2 / 3
    assert played.task.items[0].prompt == "Question 0?\nAnswer the question using a single word or phrase."


def test_gqa_official_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/testdev_balanced_questions.json").write_text(json.dumps(_gqa_questions()))
    for n in range(10):
        picture(tmp_path / f"data/images/n{n}.jpg", n)
    _check_gqa(play("gqa", [reply for _, _, reply, _ in GQA], tmp_path / "run", tmp_path))


def test_gqa_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"id": key, **row} for key, row in _gqa_questions().items()]
    images = [
        {"id": f"n{n}", "image": {"bytes": picture(tmp_path / "x.png", n).read_bytes(), "path": ""}} for n in range(10)
    ]
    for folder, table in (("instructions", rows), ("images", images)):
        (tmp_path / f"d/testdev_balanced_{folder}").mkdir(parents=True)
        parquet.write_table(
            arrow.Table.from_pylist(table),
            tmp_path / f"d/testdev_balanced_{folder}/testdev-0.parquet",
            row_group_size=3,
        )
    _check_gqa(play("gqa", [reply for _, _, reply, _ in GQA], tmp_path / "run", tmp_path / "d"))


# reference answers as (text, how many of ten), reply, score. With m equal answers of ten the score is
# 0, 0.3, 0.6, 0.9, 1 for m = 0, 1, 2, 3, more: min(1, m/3) averaged over leaving one annotator out
FILL = "something else"
TEXTVQA = [
    ([("nokia", 10)], "nokia", "1"),
    ([("nokia", 10)], "Nokia.", "1"),
    ([("nokia", 3), (FILL, 7)], "nokia", "9/10"),
    ([("nokia", 2), (FILL, 8)], "nokia", "6/10"),
    ([("nokia", 1), (FILL, 9)], "nokia", "3/10"),
    ([(FILL, 10)], "nokia", "0"),
    ([("nokia", 4), (FILL, 6)], "the nokia", "1"),  # articles
    ([("2", 10)], "two", "1"),  # number words
    ([("ten", 2), ("10", 1), (FILL, 7)], "10", "9/10"),
    ([("don't walk", 10)], "dont walk", "1"),  # contractions
    ([("coca cola", 10)], "coca-cola", "1"),  # a hyphen between letters becomes a space
    ([("coca-cola", 10)], "coca - cola", "1"),
    ([("3.5", 10)], "35", "0"),  # a stop before a digit stays
    ([("1000", 10)], "1,000", "1"),
    ([("unanswerable", 2), ("no", 8)], "unanswerable", "6/10"),
    ([("a", 1), (FILL, 9)], "", "3/10"),  # an article alone is the empty answer
    ([("answering does not require reading text in the image", 10)], "Answering does not require reading text", "0"),
    ([("nick's", 10)], "nicks", "0"),
    ([("0", 3), (FILL, 7)], "None", "9/10"),
    ([("yes", 10)], "yes, it is", "0"),
    ([("stop", 10)], "Stop!", "1"),
    ([("usa", 1), ("u.s.a.", 1), (FILL, 8)], "U.S.A", "6/10"),
]


def _textvqa(root: Path) -> Path:
    data = []
    for n, (answers, _, _) in enumerate(TEXTVQA):
        picture(root / f"train_images/im{n}.jpg", n)
        listed = [text for text, count in answers for _ in range(count)]
        assert len(listed) == 10
        data.append(
            {"question": f"what is written on {n}?", "image_id": f"im{n}", "question_id": 34602 + n, "answers": listed}
        )
    (root / "TextVQA_0.5.1_val.json").write_text(json.dumps({"dataset_type": "val", "data": data}))
    return root


def test_textvqa(tmp_path: Path) -> None:
    root = _textvqa(tmp_path)
    played = play("textvqa", [reply for _, reply, _ in TEXTVQA], tmp_path / "run", root)
    assert played.scores == pytest.approx([float(Fraction(score)) for *_, score in TEXTVQA], abs=1e-12)
    # 9 ones, 0.9 three times, 0.6 three times, 0.3 twice, 5 zeros: (9 + 2.7 + 1.8 + 0.6) / 22
    assert played.summary.score == pytest.approx(14.1 / 22, abs=1e-12)
    assert played.task.items[0].prompt == "What is written on 0?\nAnswer the question using a single word or phrase."


def test_textvqa_takes_llavas_prompts_with_ocr_tokens(tmp_path: Path) -> None:
    root = _textvqa(tmp_path)
    text = "What is written on 0?\nReference OCR token: NOKIA, 3310\nAnswer the question using a single word or phrase."
    line = {"question_id": "im0", "image": "im0.jpg", "text": text, "category": "default"}
    (root / "llava_textvqa_val_v051_ocr.jsonl").write_text(json.dumps(line) + "\n")
    task = read_task("textvqa", TaskOptions(data=root))
    assert task.items[0].prompt == text
    assert task.note.startswith("1 of 22 prompts name OCR tokens")


# label, reply, what POPE's script reads: "no" only for No, no, not as words of the first sentence
POPE = {
    "random": [
        ("yes", "Yes", "yes"),
        ("yes", "No", "no"),
        ("no", "no.", "no"),
        ("no", "NO", "yes"),  # only No and no count
        ("yes", "Yes, it is", "yes"),
        ("no", "Not sure", "yes"),  # Not with a capital does not count
        ("no", "It is not", "no"),
        ("yes", "", "yes"),  # empty is yes
    ],
    "popular": [
        ("no", "I see it. No dog.", "yes"),  # only the first sentence counts
        ("no", "There is no dog, no", "no"),
        ("yes", "nope", "yes"),
        ("no", "No, there isn't", "no"),
        ("yes", "no", "no"),
        ("yes", "yes", "yes"),
        ("no", "I do not know", "no"),
        ("yes", "unanswerable", "yes"),
    ],
    "adversarial": [
        ("yes", "No", "no"),
        ("yes", "no", "no"),
        ("no", "Yes", "yes"),
        ("no", "Yes.", "yes"),
        ("yes", "There are none", "yes"),
        ("no", "nothing", "yes"),
        ("yes", "not visible", "no"),
        ("no", "No", "no"),
    ],
}


def _check_pope(played: Played) -> None:
    rows = [row for split in POPE.values() for row in split]
    assert [record["parsed"] for record in played.records] == [read for _, _, read in rows]
    assert played.scores == [float(label == read) for label, _, read in rows]
    # random: hits 3, false yes 2, missed 1, right no 2; popular: 3, 1, 1, 3; adversarial: 1, 3, 3, 1
    assert played.part("random accuracy") == 5 / 8
    assert played.part("random precision") == 3 / 5
    assert played.part("random recall") == 3 / 4
    assert played.part("random f1") == 6 / 9
    assert played.part("random yes ratio") == 5 / 8
    assert played.part("popular f1") == 6 / 8
    assert played.part("adversarial f1") == 2 / 8
    assert played.part("adversarial yes ratio") == 4 / 8
    assert played.part("accuracy") == 13 / 24
    assert played.summary.score == pytest.approx((6 / 9 + 6 / 8 + 2 / 8) / 3, abs=1e-12)


def test_pope_official_files(tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    for split, rows in POPE.items():
        lines = []
        for n, (label, _, _) in enumerate(rows, 1):
            picture(tmp_path / f"val2014/{split}{n}.jpg", n)
            lines.append(
                {"question_id": n, "image": f"{split}{n}.jpg", "text": f"Is there a {split} {n}?", "label": label}
            )
        (tmp_path / f"coco/coco_pope_{split}.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    replies = [reply for rows in POPE.values() for _, reply, _ in rows]
    _check_pope(play("pope", replies, tmp_path / "run", tmp_path))
    assert len(play("pope", replies[:8], tmp_path / "one", tmp_path, split="random").records) == 8


def test_pope_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = {"bytes": picture(tmp_path / "x.png").read_bytes(), "path": None}
    rows = [
        {
            "id": str(n),
            "question_id": str(n),
            "question": f"Is there a {split} {n}?",
            "answer": label,
            "category": split,
            "image_source": "x",
            "image": image,
        }
        for split, listed in POPE.items()
        for n, (label, _, _) in enumerate(listed)
    ]
    (tmp_path / "d/data").mkdir(parents=True)
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "d/data/test-00000-of-00001.parquet")
    _check_pope(play("pope", [r for rows_ in POPE.values() for _, r, _ in rows_], tmp_path / "run", tmp_path / "d"))


# category, then per image the two (answer, reply): points = accuracy in % + % of images with both right
MME = [
    ("existence", ("Yes", "Yes"), ("No", "No")),  # 2 right
    ("existence", ("Yes", "yes, it is"), ("No", "Yes")),  # 1 right
    ("count", ("Yes", "No"), ("No", "Yes")),  # 0 right
    ("count", ("Yes", "  YES!"), ("No", "nothing")),  # 2 right: "noth" begins with no
    ("color", ("Yes", "It is yes"), ("No", "no.")),  # 1 right: yes is not in the first four characters
    ("OCR", ("Yes", ""), ("No", "None")),  # 1 right: "none" contains no
    ("OCR", ("Yes", "y"), ("No", "n")),  # 0 right: other
    ("celebrity", ("Yes", "Yes."), ("No", "Not at all")),  # 2 right
    ("code_reasoning", ("Yes", "Yes"), ("No", "I know")),  # 1 right: "i kn" has no "no"
    ("code_reasoning", ("Yes", "unanswerable"), ("No", "No")),  # 1 right
    ("text_translation", ("Yes", "Yes"), ("No", "No")),  # 2 right
]
# existence: 3/4 and 1/2 -> 75 + 50; count: 2/4 and 1/2 -> 50 + 50; color: 50 + 0; OCR: 1/4 and 0 -> 25; celebrity: 200
MME_PERCEPTION = 125 + 100 + 50 + 25 + 200
# code_reasoning: 2/4 and 0 -> 50; text_translation: 200
MME_COGNITION = 50 + 200
MME_RIGHT = [1, 1, 1, 0, 0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1]


def _check_mme(played: Played, order: list[int] | None = None) -> None:
    right = [score for image in order for score in MME_RIGHT[2 * image : 2 * image + 2]] if order else MME_RIGHT
    assert played.scores == right
    assert played.summary.score == MME_PERCEPTION
    assert played.part("existence") == 125
    assert played.part("OCR") == 25
    assert played.part("cognition") == MME_COGNITION
    assert played.part("perception / 20") == MME_PERCEPTION / 20
    assert played.summary.unit == "points"


@pytest.mark.parametrize("folders", [True, False])
def test_mme_official_files(tmp_path: Path, folders: bool) -> None:
    """Both layouts of the release: images and texts in folders of their own, or side by side; its tool beside them."""
    base = tmp_path / "MME_Benchmark_release_version" / ("MME_Benchmark" if folders else "")
    (base / "eval_tool/Your_Results").mkdir(parents=True)
    (base / "eval_tool/Your_Results/count.txt").write_text("0.png\tIs it?\tYes\tYes\n")
    for n, (category, first, second) in enumerate(MME):
        picture(base / category / ("images" if folders else "") / f"{n:04d}.png", n)
        text = base / category / ("questions_answers_YN" if folders else "") / f"{n:04d}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"Is it {n} {m}? Please answer yes or no.\t{answer}" for m, (answer, _) in enumerate((first, second))]
        text.write_text("\n".join(lines) + "\n")
    order = sorted(range(len(MME)), key=lambda n: (MME[n][0], n))
    replies = [reply for n in order for _, reply in MME[n][1:]]
    played = play("mme", replies, tmp_path / "run", tmp_path)
    _check_mme(played, order)
    asked = {item.prompt for item in played.task.items}
    assert "Is it 0 0?\nAnswer the question using a single word or phrase." in asked  # LLaVA's form of the question


def test_mme_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = {"bytes": picture(tmp_path / "x.png").read_bytes(), "path": "x.png"}
    rows = [
        {
            "question_id": f"{category}/{n}.png",
            "image": image,
            "question": f"Is it {n} {m}? Please answer yes or no.",
            "answer": answer,
            "category": category,
        }
        for n, (category, *pair) in enumerate(MME)
        for m, (answer, _) in enumerate(pair)
    ]
    (tmp_path / "d/data").mkdir(parents=True)
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "d/data/test-0.parquet")
    _check_mme(play("mme", [reply for _, *pair in MME for _, reply in pair], tmp_path / "run", tmp_path / "d"))


def test_mme_with_a_question_missing_is_refused(tmp_path: Path) -> None:
    text = picture(tmp_path / "count/1.png").with_suffix(".txt")
    text.write_text("Is it? Please answer yes or no.\tYes\n")
    with pytest.raises(DataError, match=r"count/1\.png has 1 questions"):
        read_task("mme", TaskOptions(data=tmp_path))
