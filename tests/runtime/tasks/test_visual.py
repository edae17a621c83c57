"""MMVP, BLINK, V*, MMStar, AV-Odyssey: hand-made records in the official layouts, scores computed by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from runtime.evaluation import check_items
from runtime.tasks import read_task
from runtime.tasks.base import LETTER, TaskOptions
from vlm.errors import DataError

from .playing import picture, play

# reply, what the strict parser reads among A to D ("cat", "dog", "two dogs", "bird"), what the BLINK script reads
REPLIES = [
    ("A", "A", "A"),
    ("(B)", "B", "B"),
    ("c.", "C", "C"),
    ("D. bird", "D", "D"),
    ("Answer: B", "B", "A"),  # the first letter of the reply is an A
    ("A flute is heard. Option B", "B", "A"),
    ("", None, None),
    ("The answer is C", "C", "T"),
    ("It is a bird", "D", "I"),
    ("cat and dog", None, "C"),
    ("two dogs", "C", "T"),
    ("B B", "B", "B"),
    ("B, C", None, "B"),
    ("E", None, "E"),
    ("unanswerable", None, "U"),
    ("yes, it is", None, "Y"),
    ("**D**", "D", None),
    ("First A, but the answer is D.", "D", "F"),
    ("I would choose option B because of the ears", "B", "I"),
    ("A dog", "B", "A"),  # an article, then the text of an option
]
OPTIONS = ["cat", "dog", "two dogs", "bird"]
# with the right option going round A, B, C, D
RIGHT = ["ABCD"[n % 4] for n in range(len(REPLIES))]
STRICT = [float(read == right) for (_, read, _), right in zip(REPLIES, RIGHT, strict=True)]


def test_the_key_of_this_file() -> None:
    # 0 A=A, 1 B=B, 2 C=C, 3 D=D, 5 B=B, 10 C=C; 4 B!=A, 7 C!=D, 8 D!=A, 11 B!=D, 16 D!=A, 17 D!=B, 18 B!=C, 19 B!=D
    assert [n for n, right in enumerate(STRICT) if right] == [0, 1, 2, 3, 5, 10]


def _parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=7)
    return path


def _image(tmp_path: Path, value: int = 0) -> dict[str, Any]:
    return {"bytes": picture(tmp_path / "source.png", value).read_bytes(), "path": None}


def test_blink(tmp_path: Path) -> None:
    rows = [
        {
            "idx": f"val_{n}", "question": "x", "sub_task": "Relative_Depth" if n < 10 else "Jigsaw",
            "image_1": _image(tmp_path, n), "image_2": _image(tmp_path, 99) if n >= 10 else None, "image_3": None,
            "image_4": None, "choices": OPTIONS, "answer": f"({RIGHT[n]})",
            "prompt": f"Which is it {n}?\nSelect from the following choices.\n(A) cat\n(B) dog\n(C) two dogs\n(D) bird",
        }
        for n in range(len(REPLIES))
    ]  # fmt: skip
    for name, some in (("Relative_Depth", rows[:10]), ("Jigsaw", rows[10:])):
        _parquet(tmp_path / f"d/{name}/val-00000-of-00001.parquet", some)
    # files are read in the order of their names: Jigsaw first
    replies = [reply for reply, _, _ in REPLIES[10:] + REPLIES[:10]]
    played = play("blink", replies, tmp_path / "run", tmp_path / "d")
    assert played.scores == STRICT[10:] + STRICT[:10]
    assert played.summary.score == 6 / 20
    assert (played.part("sub_task Relative_Depth"), played.part("sub_task Jigsaw")) == (5 / 10, 1 / 10)
    assert {len(item.pictures) for item in played.task.items} == {1, 2}
    # both files have the same name: their pictures must not be taken for one another
    assert len({picture.read().data for item in played.task.items for picture in item.pictures[:1]}) == 20  # type: ignore[union-attr]
    before = check_items(played.task.items).whole
    _parquet(
        tmp_path / "d/Relative_Depth/val-00000-of-00001.parquet",
        [{**rows[0], "image_1": _image(tmp_path, 7)}, *rows[1:10]],
    )
    assert check_items(read_task("blink", TaskOptions(data=tmp_path / "d")).items).whole != before
    _parquet(tmp_path / "d/Relative_Depth/val-00000-of-00001.parquet", rows[:10])
    official = play("blink", replies, tmp_path / "official", tmp_path / "d", mode="official")
    assert [r["parsed"] for r in official.records] == [read for _, _, read in REPLIES[10:] + REPLIES[:10]]
    # 0, 1, 2, 3 and 12 (B = A? no), 9 (C = B? no), 13 (E), 4 (A = A), 19 (A = D? no), 11 (B = D? no): 5 of 20
    assert official.summary.score == 5 / 20


def test_blink_without_answers_is_refused(tmp_path: Path) -> None:
    row = {
        "idx": "t1",
        "prompt": "x (A) a (B) b",
        "choices": ["a", "b"],
        "answer": "hidden",
        "image_1": _image(tmp_path),
    }
    _parquet(tmp_path / "d/Jigsaw/test-0.parquet", [row])
    with pytest.raises(DataError, match="has no answers"):
        read_task("blink", TaskOptions(data=tmp_path / "d", split="test"))


def test_vstar(tmp_path: Path) -> None:
    lines = []
    for n, right in enumerate(RIGHT):
        folder = "direct_attributes" if n < 12 else "relative_position"
        picture(tmp_path / f"{folder}/sa_{n}.jpg", n)
        text = f"What is it {n}?\n(A) cat\n(B) dog\n(C) two dogs\n(D) bird{LETTER}"
        lines.append(
            {"image": f"{folder}/sa_{n}.jpg", "text": text, "category": folder, "label": right, "question_id": n}
        )
    (tmp_path / "test_questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    played = play("vstar", [reply for reply, _, _ in REPLIES], tmp_path / "run", tmp_path)
    assert [record["parsed"] for record in played.records] == [read for _, read, _ in REPLIES]
    assert played.summary.score == 6 / 20
    assert (played.part("category direct_attributes"), played.part("category relative_position")) == (6 / 12, 0)
    assert played.task.items[3].prompt == lines[3]["text"]
    assert played.task.items[3].truth["options"] == {"A": "cat", "B": "dog", "C": "two dogs", "D": "bird"}


def test_vstar_folders_move_the_right_option(tmp_path: Path) -> None:
    """Those files name the right option first: a reader that keeps the order rewards a model that always says A."""
    for n in range(40):
        picture(tmp_path / f"direct_attributes/sa_{n}.jpg", n)
        row = {"question": f"What is it {n}?", "options": ["right", "w1", "w2", "w3"], "target_object": [], "bbox": []}
        (tmp_path / f"direct_attributes/sa_{n}.json").write_text(json.dumps(row))
    task = read_task("vstar", TaskOptions(data=tmp_path))
    assert all(item.truth["options"][item.truth["answer"]] == "right" for item in task.items)
    assert {item.truth["answer"] for item in task.items} == set("ABCD")


@pytest.mark.parametrize("kind", ["parquet", "tsv"])
def test_mmstar(tmp_path: Path, kind: str) -> None:
    import base64

    rows: list[dict[str, Any]] = []
    for n, right in enumerate(RIGHT):
        row = {"index": n, "answer": right, "category": "math" if n % 2 else "logical reasoning", "l2_category": "x"}
        if kind == "parquet":
            text = f"What is it {n}?\nOptions: A: cat, B: dog, C: two dogs, D: bird"
            rows.append({**row, "question": text, "image": _image(tmp_path, n)["bytes"]})
        else:
            cells = dict(zip("ABCD", OPTIONS, strict=True))
            rows.append(
                {
                    **row,
                    "question": f"What is it {n}?",
                    **cells,
                    "image": base64.b64encode(_image(tmp_path, n)["bytes"]).decode(),
                }
            )
    root = tmp_path / "d"
    root.mkdir()
    if kind == "parquet":
        _parquet(root / "mmstar.parquet", rows)
    else:
        with (root / "MMStar.tsv").open("w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
    played = play("mmstar", [reply for reply, _, _ in REPLIES], tmp_path / "run", root)
    assert [record["parsed"] for record in played.records] == [read for _, read, _ in REPLIES]
    assert played.summary.score == 6 / 20
    # odd: 1, 3, 5; even: 0, 2, 10
    assert (played.part("category math"), played.part("category logical reasoning")) == (3 / 10, 3 / 10)


# reply, right, of ten pairs: both must be right
MMVP = [
    ("(a)", "a", "(b)", "b"),  # both
    ("a", "a", "A", "b"),  # one
    ("Open", "a", "Closed", "b"),  # both, by the text
    ("The answer is B.", "b", "The answer is A.", "a"),  # both
    ("", "a", "", "b"),  # none
    ("Open or closed", "a", "closed", "b"),  # one
    ("A B", "a", "b", "b"),  # one
    ("yes, it is", "b", "(b)", "b"),  # one
    ("Option A", "a", "Option (B)", "b"),  # both
    ("a. Open", "a", "b) Closed", "a"),  # one
]


@pytest.mark.parametrize("kind", ["csv", "as published", "parquet"])
def test_mmvp(tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, Any]] = []
    for n, (_, first, _, second) in enumerate(MMVP):
        for m, right in enumerate((first, second)):
            index = 2 * n + m + 1
            picture(tmp_path / f"d/MMVP Images/{index}.jpg", index)
            # the two questions of a pair are the same in MMVP; here they differ so that the script can tell them apart
            rows.append(
                {
                    "Index": index,
                    "Question": f"Are the doors {index} open?",
                    "Options": "(a) Open (b) Closed",
                    "Correct Answer": f"({right})",
                }
            )
    if kind != "parquet":
        with (tmp_path / "d/Questions.csv").open("w", newline="") as f:
            name = {"Index": "Index" if kind == "csv" else "lndex"}
            writer = csv.DictWriter(f, [name.get(key, key) for key in rows[0]])
            writer.writeheader()
            writer.writerows({name.get(key, key): value for key, value in row.items()} for row in rows)
    else:
        _parquet(
            tmp_path / "d/data/train-0.parquet", [{**row, "image": _image(tmp_path, row["Index"])} for row in rows]
        )
    replies = [reply for row in MMVP for reply in (row[0], row[2])]
    played = play("mmvp", replies, tmp_path / "run", tmp_path / "d")
    assert [unit.values[0] for unit in played.summary.units] == [1, 0, 1, 1, 0, 0, 0, 0, 1, 0]
    assert played.summary.score == 4 / 10
    assert played.part("each question") == 13 / 20
    assert played.task.items[0].prompt == f"Are the doors 1 open?\nA. Open\nB. Closed{LETTER}"


# reply -> as the official script reads it: any capital option letter anywhere counts, the first if none is in brackets
AV_OFFICIAL = ["A", "B", "A", "D", "A", "A", "A", "C", "A", "A", "A", "B", "B", "A", "A", "A", "D", "A", "B", "A"]


def test_av_odyssey(tmp_path: Path) -> None:
    rows = [
        {
            "question_id": f"1_{n}", "question_type_id": n % 2, "subfield": "Timbre" if n < 10 else "Tone",
            "data_type": "image", "question": f"Which image {n}?", "options": OPTIONS, "answer": RIGHT[n],
            "image_1": _image(tmp_path, n), "image_2": None, "audio_1": {"bytes": b"RIFF", "path": None}, "video_1": None,
        }
        for n in range(len(REPLIES))
    ]  # fmt: skip
    video = {**rows[0], "question_id": "2_0", "data_type": "video", "image_1": None}
    _parquet(tmp_path / "d/av_odyssey_part1.parquet", [*rows, video])
    replies = [reply for reply, _, _ in REPLIES]
    played = play("av-odyssey", replies, tmp_path / "run", tmp_path / "d")
    assert played.scores == STRICT
    assert played.summary.score == 6 / 20
    assert (played.part("subfield Timbre"), played.part("subfield Tone")) == (5 / 10, 1 / 10)
    assert "no audio is given, 1 items with video" in played.task.note
    official = play("av-odyssey", replies, tmp_path / "official", tmp_path / "d", mode="official")
    assert [record["parsed"] for record in official.records] == AV_OFFICIAL
