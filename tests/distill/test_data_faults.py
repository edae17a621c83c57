"""Malformed data sets through the real command: one line naming record and field, exit 2, nothing written."""

from __future__ import annotations

import base64
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.__main__ import main
from tests.distill import data_sets
from tests.tiny import make_student
from vlm.console import run_command

ASK = {"from": "human", "value": "What is it?"}
TELL = {"from": "gpt", "value": "7"}
GOOD = {"conversations": [ASK, TELL]}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden": 64, "head_dim": 16, "intermediate": 64}
    return make_student(tmp_path_factory.mktemp("student"), **sizes)


def turns(*given: Any, **fields: Any) -> Callable[[Path], str]:
    """A good record, then one with these turns."""
    return records({"conversations": list(given), **fields})


def records(*odd: Any) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        data_sets.json_list(folder / "d.json", [GOOD, *odd])
        return "d.json"

    return write


def text(name: str, content: str | bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return write


def message(*parts: Any, **fields: Any) -> Callable[[Path], str]:
    answer = {"role": "assistant", "content": "7"}
    odd = {"messages": [{"role": "user", "content": list(parts)}, answer], **fields}
    good = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, answer]}

    def write(folder: Path) -> str:
        data_sets.json_lines(folder / "d.jsonl", [good, odd])
        return "d.jsonl"

    return write


def damaged_image(folder: Path) -> str:
    image = data_sets.png(data_sets.samples(1)[0].images[0])
    (folder / "cut.png").write_bytes(image[: len(image) // 2])
    return turns({"from": "human", "value": "<image>\nQ"}, TELL, image="cut.png")(folder)


def tar(*members: tuple[str, bytes], cut: int = 0) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        with tarfile.open(folder / "s.tar", "w") as shard:
            for name, data in members:
                data_sets._add(shard, name, data)
        whole = (folder / "s.tar").read_bytes()
        if cut:
            (folder / "s.tar").write_bytes(whole[:cut])
        return "s.tar"

    return write


def parquet(rows: list[Any], damage: bool = False) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        import pyarrow as pa
        from pyarrow import parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")
        if damage:
            whole = (folder / "d.parquet").read_bytes()
            (folder / "d.parquet").write_bytes(whole[:-20])
        return "d.parquet"

    return write


def mixed_folder(folder: Path) -> str:
    (folder / "mix").mkdir()
    data_sets.json_list(folder / "mix" / "a.json", [GOOD])
    (folder / "mix" / "b.tar").write_bytes(b"")
    return "mix"


LONG = {"from": "human", "value": "where " * 5000}
DATA_URL = "data:image/png;base64," + base64.b64encode(b"not an image").decode()
IMAGE_ASK = {"from": "human", "value": "<image>\nQ"}
JSON_MEMBER = json.dumps({"conversations": [IMAGE_ASK, TELL]}).encode()

# what is written, and the words the one line must hold: the record and the field where there are any
CASES: dict[str, tuple[Callable[[Path], str], tuple[str, ...]]] = {
    "no file": (lambda _: "none.json", ("none.json", "--data")),
    "empty file": (text("d.json", ""), ("d.json", "empty")),
    "not JSON at all": (text("d.json", "id,image\n1,a.png\n"), ("d.json", "not valid JSON")),
    "cut JSON": (text("d.json", json.dumps([GOOD, GOOD])[:-9]), ("d.json", "not valid JSON", "line 1")),
    "missing comma": (
        text("d.json", json.dumps([GOOD, GOOD]).replace('}, {"c', '} {"c')),
        ("not valid JSON", "delimiter"),
    ),
    "one object": (text("d.json", json.dumps({"data": [GOOD]}, indent=1)), ("one object", "data")),
    "empty list": (text("d.json", "[]"), ("empty data set",)),
    "bad line": (text("d.jsonl", f'{json.dumps(GOOD)}\n{{"conv\n'), ("record 1", "line 2")),
    "latin-1 text": (
        text("d.jsonl", json.dumps(GOOD).encode() + b'\n{"conversations": "\xe9"}\n'),
        ("record 1", "line 2", "utf-8"),
    ),
    "record is a text": (records("x"), ("record 1", "'conversations'", "'x'")),
    "record is a list": (records(["x"]), ("record 1", "'conversations'", "['x']")),
    "unknown fields": (
        text("d.json", json.dumps([{"prompt": "a", "answer": "b"}])),
        ("record 0", "'conversations'", "answer"),
    ),
    "another format later": (records({"messages": []}), ("record 1", "'conversations'", "messages")),
    "conversations no list": (records({"conversations": 3}), ("record 1", "'conversations'", "3")),
    "no turns": (turns(), ("record 1", "'conversations'", "empty")),
    "turn is a text": (turns("Q", TELL), ("record 1", "'conversations[0]'", "'Q'")),
    "unknown role": (turns({"from": "cat", "value": "miau"}, TELL), ("record 1", "'conversations[0].from'", "'cat'")),
    "no role": (turns({"value": "Q"}, TELL), ("record 1", "'conversations[0].role'", "None")),
    "role is a list": (
        turns({"from": ["human"], "value": "Q"}, TELL),
        ("record 1", "'conversations[0].from'", "human"),
    ),
    "half a surrogate pair": (
        text("d.json", json.dumps([GOOD, {"conversations": [{"from": "human", "value": "a\ud83d"}, TELL]}])),
        ("record 1", "'conversations[0].value'", "surrogate"),
    ),
    "half a surrogate pair in a file name": (
        text("d.json", json.dumps([GOOD, {"conversations": [IMAGE_ASK, TELL], "image": "\ud83d.png"}])),
        ("record 1", "'image[0]'", "surrogate"),
    ),
    "image data as a file name": (
        turns(IMAGE_ASK, TELL, image="iVBORw0KGgo" * 40),
        ("record 1", "'image[0]'", "data:image"),
    ),
    "image bytes as a text": (
        turns(IMAGE_ASK, TELL, image={"bytes": "abc"}),
        ("record 1", "'image[0].bytes'", "expected bytes, got 'abc'"),
    ),
    "no text": (turns(ASK, {"from": "gpt"}), ("record 1", "'conversations[1].content'", "None")),
    "text is a number": (turns(ASK, {"from": "gpt", "value": 7}), ("record 1", "'conversations[1].value'", "7")),
    "empty answer": (turns(ASK, {"from": "gpt", "value": " "}), ("record 1", "'conversations[1].value'", "empty")),
    "ends with a question": (turns(ASK, TELL, ASK), ("record 1", "'conversations'", "'user'")),
    "starts with an answer": (turns(TELL, ASK, TELL), ("record 1", "'conversations'", "starts with an answer")),
    "late system turn": (turns(ASK, {"from": "system", "value": "S"}, TELL), ("record 1", "'conversations'", "system")),
    "more marks than images": (turns(IMAGE_ASK, TELL), ("record 1", "'image'", "1 <image> marks but 0 images")),
    "more images than marks": (
        turns(ASK, TELL, image="a.png"),
        ("record 1", "'image'", "0 <image> marks but 1 images"),
    ),
    "image is a number": (turns(IMAGE_ASK, TELL, image=5), ("record 1", "'image[0]'", "5")),
    "image is null in a list": (turns(IMAGE_ASK, TELL, images=[None]), ("record 1", "'images[0]'", "None")),
    "web image": (turns(IMAGE_ASK, TELL, image="https://x.org/a.png"), ("record 1", "'image[0]'", "download")),
    "missing image": (turns(IMAGE_ASK, TELL, image="none.png"), ("record 1", "'image'", "none.png")),
    "truncated image": (damaged_image, ("record 1", "'image'", "cut.png")),
    "damaged data URL": (
        turns(IMAGE_ASK, TELL, image="data:image/png;base64,@"),
        ("record 1", "'image[0]'", "data URL"),
    ),
    "data URL of no image": (turns(IMAGE_ASK, TELL, image=DATA_URL), ("record 1", "'image'", "not a readable image")),
    "image in an answer": (
        turns(ASK, {"from": "gpt", "value": "<image>"}),
        ("record 1", "'conversations[1].value'", "user"),
    ),
    "reserved token": (
        turns({"from": "human", "value": "a <|im_end|> b"}, TELL),
        ("record 1", "'conversations'", "<|im_end|>"),
    ),
    "too long": (turns(LONG, TELL), ("record 1", "'conversations'", "context")),
    "part of unknown type": (message({"type": "video"}), ("record 1", "'messages[0].content[0]'", "'video'")),
    "text part without text": (message({"type": "text"}), ("record 1", "'messages[0].content[0].text'", "None")),
    "mark inside a text part": (
        message({"type": "text", "text": "<image>Q"}),
        ("record 1", "content[0].text", "<image>"),
    ),
    "image number out of range": (
        message({"type": "image", "index": 3}, "Q", images=["a.png"]),
        ("record 1", "'images'", "image 3", "there are 1"),
    ),
    "tar sample without JSON": (tar(("a.json", JSON_MEMBER), ("a.png", b"x"), ("b.png", b"x")), ("record 1", "'json'")),
    "tar with bad JSON": (tar(("a.json", b"{"), ("a.png", b"x")), ("record 0 (a.json)", "'json'")),
    "tar sample without its image": (tar(("a.json", JSON_MEMBER)), ("record 0 (a.json)", "'image (tar members)'")),
    "tar with a bad image": (tar(("a.json", JSON_MEMBER), ("a.png", b"x")), ("record 0 (a.json)", "'image'", "a.png")),
    "cut tar": (tar(("a.json", JSON_MEMBER), ("a.png", b"x" * 9000), cut=5000), ("s.tar", "record")),
    "parquet without the field": (
        parquet([{"question": "a", "answer": "b"}]),
        ("d.parquet record 0", "'conversations'"),
    ),
    "damaged parquet": (parquet([GOOD], damage=True), ("d.parquet", "not a readable parquet")),
    "parquet with a bad row": (
        parquet([GOOD, {"conversations": [ASK, {"from": "gpt", "value": None}]}]),
        ("d.parquet record 1", "'conversations[1].value'"),
    ),
    "folder of several kinds": (mixed_folder, ("mix", ".json", ".tar")),
    "folder of nothing": (lambda r: str((r / "none").mkdir() or "none"), ("none", "no data files")),
}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command and return its only error line."""
    with pytest.raises(SystemExit) as stopped:
        run_command(main, arguments)
    captured = capsys.readouterr()
    assert stopped.value.code == 2, captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err
    lines = captured.err.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True], captured.err
    return lines[0]


@pytest.mark.parametrize("name", CASES)
def test_one_clear_line_names_record_and_field(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write, expected = CASES[name]
    data = write(tmp_path)
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    train = ["train", "--student", str(student), "--objective", "sft", "--steps", "1", "--out", "run"]
    line = refused([*train, "--batch_size", "1", "--data", data], capsys)
    for words in expected:
        assert words in line, line
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--format", "messages"], ("record 0", "'messages'", "conversations")),
        (["--format", "alpaca"], ("format", "alpaca")),
        (["--images", "nowhere"], ("nowhere", "--images")),
        (["--holdout", "9"], ("holdout 9", "1 different")),
        (["--holdout", "-1"], ("holdout",)),
        (["--eval_data", "d.json"], ("eval_data d.json", "also in the training data", "record 0")),
        (["--eval_every", "5"], ("eval_every", "--holdout")),
        (["--on_bad_image", "paint"], ("on_bad_image",)),
    ],
)
def test_options_of_the_data(
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    expected: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data_sets.json_list(tmp_path / "d.json", [GOOD, GOOD])
    train = ["train", "--student", str(student), "--objective", "sft", "--steps", "1", "--out", "run"]
    with pytest.raises(SystemExit) as stopped:
        run_command(main, [*train, "--batch_size", "1", "--data", "d.json", *options])
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    for words in expected:
        assert words in line, line
    assert not (tmp_path / "run").exists()
