"""ScienceQA and MMBench: hand-made records in the official layouts, scores computed by hand."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path

import pytest

from runtime.spreadsheet import write_xlsx
from runtime.tasks import read_task
from runtime.tasks.base import LETTER, TaskOptions
from vlm.errors import UserError

from .playing import picture, play

# image, subject, grade, number of options, right option, reply, read as: LLaVA's script takes a letter, "X. ...", or
# exactly one "The answer is X" with any character after it
SCIENCEQA = [
    (True, "natural science", 2, 2, "A", "A", "A"),
    (True, "natural science", 7, 4, "B", "B. a cat", "B"),
    (True, "natural science", 8, 4, "B", "B.", None),  # too short for "X. ..."
    (True, "natural science", 3, 4, "C", "The answer is C.", "C"),
    (True, "natural science", 3, 4, "C", "The answer is C", None),  # nothing after the letter
    (True, "language science", 4, 4, "D", "The answer is D!", "D"),
    (True, "language science", 4, 4, "D", "The answer is D. No, The answer is C.", None),  # two remarks
    (True, "language science", 9, 2, "A", "C", None),  # not an option here
    (True, "language science", 9, 3, "C", "c", None),  # small letters do not count
    (True, "social science", 10, 4, "A", "", None),
    (True, "social science", 1, 4, "A", "A, C", None),
    (True, "social science", 1, 4, "A", " A ", "A"),  # the loader strips the reply
    (True, "social science", 12, 5, "E", "E", "E"),
    (True, "social science", 12, 4, "A", "B. option", "B"),
    (True, "social science", 6, 2, "B", "Yes, it is B", None),
    (True, "natural science", 6, 2, "B", "(B)", None),
    (False, "natural science", 2, 2, "A", "A", "A"),
    (False, "language science", 2, 2, "A", "B", "B"),
    (False, "social science", 2, 2, "B", "B. two", "B"),
    (False, "social science", 11, 2, "B", "unanswered", None),
    (True, "natural science", 11, 4, "D", "A A", None),  # the same option twice is no letter to the script
    (True, "natural science", 11, 4, "D", "D. D. D.", "D"),
]


def _scienceqa(root: Path) -> Path:
    problems = {}
    for n, (image, subject, grade, count, right, _, _) in enumerate(SCIENCEQA):
        if image:
            picture(root / f"images/test/{n}/image.png", n)
        problems[str(n)] = {
            "question": f"Which one {n}?",
            "choices": [f"choice {k} of {n}" for k in range(count)],
            "answer": "ABCDE".index(right),
            "hint": "Read the map." if n == 1 else "",
            "image": "image.png" if image else None,
            "subject": subject,
            "grade": f"grade{grade}",
        }
    (root / "problems.json").write_text(json.dumps(problems))
    (root / "pid_splits.json").write_text(json.dumps({"test": list(problems), "train": []}))
    return root


def test_scienceqa(tmp_path: Path) -> None:
    root = _scienceqa(tmp_path)
    played = play("scienceqa", [row[5] for row in SCIENCEQA], tmp_path / "run", root)
    assert [record["parsed"] for record in played.records] == [row[6] for row in SCIENCEQA]
    # right: 0, 1, 3, 5, 11, 12, 16, 18, 21 = 9 of 22; with an image 7 of 18
    assert played.summary.score == 9 / 22
    assert played.part("context image") == 7 / 18
    assert played.part("context none") == 2 / 4
    assert played.part("grade 1-6") == 6 / 12
    assert played.part("subject language science") == 1 / 5
    prompt = (
        "Context: Read the map.\nWhich one 1?\nA. choice 0 of 1\nB. choice 1 of 1\nC. choice 2 of 1\nD. choice 3 of 1"
    )
    assert played.task.items[1].prompt == prompt + LETTER
    with_image = [row[5] for row in SCIENCEQA if row[0]]
    assert play("scienceqa-img", with_image, tmp_path / "img", root).summary.score == 7 / 18


def test_scienceqa_takes_llavas_prompts(tmp_path: Path) -> None:
    root = _scienceqa(tmp_path)
    line = {"id": "0", "image": "0/image.png", "conversations": [{"from": "human", "value": "<image>\nAs LLaVA asks"}]}
    (root / "llava_test_CQM-A.json").write_text(json.dumps([line]))
    assert read_task("scienceqa", TaskOptions(data=root)).items[0].prompt == f"As LLaVA asks{LETTER}"


def test_scienceqa_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = {"bytes": picture(tmp_path / "x.png").read_bytes(), "path": None}
    rows = [
        {
            "image": image if row[0] else None,
            "question": f"Which one {n}?",
            "hint": "",
            "subject": row[1],
            "choices": [f"choice {k} of {n}" for k in range(row[3])],
            "answer": "ABCDE".index(row[4]),
            "grade": f"grade{row[2]}",
        }
        for n, row in enumerate(SCIENCEQA)
    ]
    (tmp_path / "d/data").mkdir(parents=True)
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "d/data/test-0.parquet", row_group_size=5)
    played = play("scienceqa", [row[5] for row in SCIENCEQA], tmp_path / "run", tmp_path / "d")
    assert played.summary.score == 9 / 22
    assert played.part("context image") == 7 / 18


# options of the first form, right letter, a reply per rotation, read as, the question counts
MMBENCH = [
    (["cat", "dog", "bird", "fish"], "A", ["A", "D", "C", "B"], ["A", "D", "C", "B"], 1),
    (["cat", "dog", "bird", "fish"], "A", ["A", "D", "C", "A"], ["A", "D", "C", "A"], 0),  # one rotation wrong
    (["red", "blue"], "B", ["B.", "(A)"], ["B", "A"], 1),
    (["red", "blue"], "B", ["blue", "It is blue"], ["B", "A"], 1),  # by the option's text
    (["red", "blue"], "B", ["red or blue", "A"], [None, "A"], 0),  # two options named
    (["one", "two", "three"], "C", ["The answer is C.", "B", "A, of course"], ["C", "B", "A"], 1),
    (["one", "two", "three"], "C", ["C", "B", ""], ["C", "B", None], 0),  # empty
    (["yes", "no"], "A", ["A A", "B"], ["A", "B"], 1),  # a repeated option is still one option
    (["yes", "no"], "A", ["Sorry, I can't help with images of people yet.", "B"], ["Z", "B"], 0),
    (["one", "two"], "A", ["A, of course it is", "B"], [None, "B"], 0),  # the letter is too far from the end
]


def _mmbench_rows() -> list[dict[str, str]]:
    rows = []
    for n, (given, right, replies, _, _) in enumerate(MMBENCH):
        for turn in range(len(replies)):
            moved = given[turn:] + given[:turn]
            letters = dict(zip("ABCD", [*moved, "", ""][:4], strict=True))
            answer = "ABCD"[(given.index(given["ABCD".index(right)]) - turn) % len(given)]
            rows.append({
                "index": str(n + 1_000_000 * turn), "question": f"What is it {n}?", "hint": "nan", **letters, "answer": answer,
                "category": "color" if n % 2 else "animal", "l2-category": "attribute", "split": "dev",
                "image": base64.b64encode(_png(n)).decode() if turn == 0 else str(n),
            })  # fmt: skip
    return rows


def _png(n: int) -> bytes:
    from tests.runtime.serving import png

    return png(n)


def _write_tsv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("rotated", [True, False])
def test_mmbench(tmp_path: Path, rotated: bool) -> None:
    """Circular evaluation, with the rotations in the file or made by the reader: the same prompts, the same score."""
    rows = _mmbench_rows()
    assert len(rows) == 26
    _write_tsv(
        tmp_path / "mmbench_dev_20230712.tsv", rows if rotated else [r for r in rows if int(r["index"]) < 1_000_000]
    )
    played = play("mmbench", [reply for row in MMBENCH for reply in row[2]], tmp_path / "run", tmp_path)
    assert [record["parsed"] for record in played.records] == [read for row in MMBENCH for read in row[3]]
    assert [item.truth["answer"] for item in played.task.items] == [row["answer"] for row in rows]
    assert [unit.values[0] for unit in played.summary.units] == [row[4] for row in MMBENCH]
    assert played.summary.score == 5 / 10
    assert played.part("each question") == 21 / 26
    assert played.part("category animal") == 2 / 5
    assert played.task.items[0].prompt == f"What is it 0?\nA. cat\nB. dog\nC. bird\nD. fish{LETTER}"
    assert {row["main"] for row in played.task.submission} == ({True} if rotated else {True, False})


def test_another_split_is_not_taken_instead(tmp_path: Path) -> None:
    _write_tsv(tmp_path / "mmbench_dev_20230712.tsv", _mmbench_rows())
    with pytest.raises(UserError, match=r"looked for mmbench_test\*\.tsv"):
        read_task("mmbench", TaskOptions(data=tmp_path, split="test"))
    with pytest.raises(UserError, match="task mme has no splits, --split is 'dev'"):
        read_task("mme", TaskOptions(data=tmp_path, split="dev"))


def test_mmbench_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {**row, "index": int(row["index"]), "hint": None, "image": {"bytes": _png(n), "path": None}}
        for n, row in enumerate(_mmbench_rows())
        if int(row["index"]) < 1_000_000
    ]
    (tmp_path / "d/data").mkdir(parents=True)
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "d/data/dev-0.parquet")
    played = play("mmbench", [reply for row in MMBENCH for reply in row[2]], tmp_path / "run", tmp_path / "d")
    assert played.summary.score == 5 / 10


def test_spreadsheet_opens_elsewhere(tmp_path: Path) -> None:
    import zipfile
    from xml.etree import ElementTree

    path = tmp_path / "s.xlsx"
    write_xlsx(path, [{"index": 1, "question": "a <b> & \x00c"}, {"index": 2, "question": None}])
    with zipfile.ZipFile(path) as archive:
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
        for name in archive.namelist():
            ElementTree.fromstring(archive.read(name))
    space = {"m": "http://schemas.openxmlformats.org/spreadsheetml/2006/main"}
    rows = [["".join(c.itertext()) for c in row.findall("m:c", space)] for row in sheet.iter(f"{{{space['m']}}}row")]
    assert rows == [["index", "question"], ["1", "a <b> & c"], ["2", ""]]
