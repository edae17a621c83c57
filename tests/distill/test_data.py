"""Every format and container of the same samples gives the same batches; order, held-out records and skips are exact."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.data import (
    Collator,
    DataOptions,
    Example,
    LengthGrouped,
    Records,
    batches,
    hold_out,
    open_records,
    open_split,
    write_skipped,
)
from distill.data.text import TextSource
from tests.distill import data_sets
from tests.tiny import make_student
from vlm.errors import DataError
from vlm.load import Checkpoint, open_checkpoint


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_student(tmp_path_factory.mktemp("student"), hidden=64, head_dim=16, intermediate=64))


@pytest.fixture(scope="module")
def found() -> list[data_sets.Sample]:
    return data_sets.samples(50)


@pytest.fixture(scope="module")
def reference(
    student: Checkpoint, found: list[data_sets.Sample], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return collated(opened(data_sets.WRITERS["llava json"](folder, found), student), student)


def opened(data: Path, student: Checkpoint, **options: Any) -> Records:
    return open_records(data, DataOptions(**options), student.tokenizer, student.image)


def collated(records: Records, student: Checkpoint) -> list[dict[str, torch.Tensor]]:
    collate = Collator(student.tokenizer.spec.pad_token_id)
    return [collate([records[i] for i in range(at, at + 10)]) for at in range(0, len(records), 10)]


@pytest.mark.parametrize("name", data_sets.WRITERS)
def test_every_format_and_container_gives_identical_batches(
    student: Checkpoint,
    found: list[data_sets.Sample],
    reference: list[dict[str, torch.Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    records = opened(data_sets.WRITERS[name](tmp_path, found), student)
    said = capsys.readouterr().err
    # a system turn makes it ShareGPT, whatever else it looks like
    assert {"llava": "ShareGPT", "sharegpt": "ShareGPT", "messages": "HF messages"}[name.split()[0]] in said
    assert "50 records" in said
    assert "50 images (10 records without)" in said
    for ours, theirs in zip(collated(records, student), reference, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(ours[key], value), key


def test_the_reference_holds_what_was_written(
    student: Checkpoint, found: list[data_sets.Sample], tmp_path: Path
) -> None:
    records = opened(data_sets.WRITERS["messages jsonl"](tmp_path, found), student)
    tokenizer = student.tokenizer
    for index, sample in enumerate(found[:10]):
        example = records[index]
        assert len(example.pixels) == len(sample.images)
        assert example.spans.count("image") == len(sample.images) * student.image.tokens
        text = {
            span: tokenizer.decode([i for i, s in zip(example.ids, example.spans, strict=True) if s == span])
            for span in ("instruction", "response", "template")
        }
        assert text["instruction"] == "".join(question for question, _, _ in sample.turns)
        assert text["response"] == "".join(answer for _, _, answer in sample.turns)
        assert ("Answer in digits." in text["template"]) == bool(sample.system)


def test_identity_is_of_content_not_of_container(
    student: Checkpoint, found: list[data_sets.Sample], tmp_path: Path
) -> None:
    held = []
    for name in ("llava json", "messages parquet shards", "llava tar shards"):
        (tmp_path / name).mkdir()
        records = opened(data_sets.WRITERS[name](tmp_path / name, found), student)
        rest, out = hold_out(records, 8)
        held.append((records.survey.content_sha256(), out.numbers.tolist(), rest.numbers.tolist()))
    assert held[0] == held[1] == held[2]
    (tmp_path / "turned").mkdir()
    turned = opened(data_sets.WRITERS["llava json"](tmp_path / "turned", found[::-1]), student)
    assert sorted(49 - hold_out(turned, 8)[1].numbers) == held[0][1]


def test_records_of_one_image_stay_on_one_side(student: Checkpoint, tmp_path: Path) -> None:
    found = data_sets.samples(30)
    names = [row[:1] for row in data_sets.image_files(found, tmp_path)]
    rows = []
    for row in names:
        for question in ("What is it?", "And why?", "How many?") if row else ():
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "7"}]
            rows.append({"image": row[0], "conversations": turns})
    random.Random(0).shuffle(rows)
    rest, held = hold_out(opened(data_sets.json_list(tmp_path / "d.json", rows), student), 7)
    trained, kept = ({rows[n]["image"] for n in part.numbers} for part in (rest, held))
    assert len(held) == 9
    assert len(rest) + len(held) == len(rows)
    assert not trained & kept
    with pytest.raises(DataError, match="none would be left"):
        hold_out(rest, len(rest))


def test_a_data_set_is_split_and_shared_records_are_refused(
    student: Checkpoint, found: list[data_sets.Sample], tmp_path: Path
) -> None:
    train = data_sets.WRITERS["llava json"](tmp_path, found)
    other = tmp_path / "other"
    other.mkdir()
    held = data_sets.WRITERS["messages jsonl"](other, data_sets.samples(70)[50:])
    read = (DataOptions(), student.tokenizer, student.image, 512)
    split = open_split(train, None, 10, *read)
    assert split.validation is split.test
    assert split.description["samples"] + split.description["holdout"] == 50
    split = open_split(train, held, 10, *read)
    assert split.test is not None
    assert split.validation is not None
    assert (len(split.test), len(split.validation), len(split.train)) == (20, 10, 40)
    assert open_split(train, None, 0, *read).validation is None
    mixed = data_sets.WRITERS["llava json"](other, data_sets.samples(70)[45:])
    with pytest.raises(DataError, match=r"5 of its 25 records are also in the training data.*record 0"):
        open_split(train, mixed, 0, *read)


def test_bad_images_are_listed_skipped_or_refused_and_noticed_when_repaired(
    student: Checkpoint, found: list[data_sets.Sample], tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    data = data_sets.WRITERS["llava json"](tmp_path, found)
    images = sorted((tmp_path / "images").iterdir())
    good = {path: path.read_bytes() for path in images[:7]}
    for number, path in enumerate(good):
        if number % 2:
            path.unlink()
        else:
            path.write_bytes(good[path][: len(good[path]) // 2])
    with pytest.raises(DataError) as stopped:
        opened(data, student)
    text = str(stopped.value)
    assert "of 50 records have an image that is missing or damaged" in text
    assert text.count("field 'image'") == 5
    assert "--on_bad_image skip" in text
    listed = [json.loads(line) for line in (cache / "align-edge/data/llava.json.bad.jsonl").read_text().splitlines()]
    records = opened(data, student, on_bad_image="skip")
    assert len(records) == 50 - len(listed)
    assert not set(records.numbers) & {line["index"] for line in listed}
    assert "leaving out" in capsys.readouterr().err
    write_skipped(records, tmp_path / "run")
    assert [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()] == listed
    for index in range(len(records)):
        assert len(records[index].pixels) == len(found[records.numbers[index]].images)
    for path, content in good.items():
        path.write_bytes(content)
    assert len(opened(data, student)) == 50


def test_existence_alone_can_be_checked_and_a_later_failure_names_the_record(
    student: Checkpoint, found: list[data_sets.Sample], tmp_path: Path
) -> None:
    data = data_sets.WRITERS["llava json"](tmp_path, found)
    (tmp_path / "images/5-0.png").write_bytes(b"no image")
    records = opened(data, student, decode=False)
    assert len(records) == 50
    with pytest.raises(DataError, match=r"record 5: field 'image': .*5-0.png is not a readable image"):
        records[5]


def test_the_check_is_remembered_until_the_data_changes(
    student: Checkpoint, found: list[data_sets.Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.data import survey

    data = data_sets.WRITERS["messages jsonl"](tmp_path, found)
    first = opened(data, student)
    looked: list[int] = []
    original = survey._Check.chunk
    monkeypatch.setattr(survey._Check, "chunk", lambda self, chunk: looked.extend(chunk) or original(self, chunk))
    again = opened(data, student)
    assert not looked
    assert (again.lengths == first.lengths).all()
    with data.open("a") as f:
        f.write(data.read_text().splitlines()[0] + "\n")
    assert len(opened(data, student)) == 51
    assert looked == list(range(51))


def test_several_processes_find_what_one_finds(
    student: Checkpoint, found: list[data_sets.Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.data import survey

    data = data_sets.WRITERS["llava tar shards"](tmp_path, found)
    alone = opened(data, student).survey
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(survey, "CHUNK", 4)
    monkeypatch.setattr(survey.os, "cpu_count", lambda: 2)
    shared = opened(data, student).survey
    for name in survey.ARRAYS:
        assert (getattr(alone, name) == getattr(shared, name)).all()
    lines = [data_sets.llava(sample, ()) for sample in found if not sample.images]
    for number in (7, 9):
        lines[number] = {"conversations": number}
    monkeypatch.setattr(survey, "CHUNK", 2)
    with pytest.raises(DataError, match=r"record 7.*got 7"):
        opened(data_sets.json_lines(tmp_path / "bad.jsonl", lines), student)


def test_lengths_are_known_without_images_and_equal_the_examples(
    student: Checkpoint, found: list[data_sets.Sample], tmp_path: Path
) -> None:
    records = opened(data_sets.WRITERS["llava tar shards"](tmp_path, found), student)
    assert records.lengths.tolist() == [len(records[i].ids) for i in range(50)]


def test_a_data_set_travels_to_a_worker_process(
    student: Checkpoint, found: list[data_sets.Sample], tmp_path: Path
) -> None:
    source = TextSource(data_sets.WRITERS["messages jsonl"](tmp_path, found))
    assert pickle.loads(pickle.dumps(source))[3].value == source[3].value


def test_the_loader_resumes_at_the_same_sample(student: Checkpoint, tmp_path: Path) -> None:
    """Through the library's own skipping of batches, in a later epoch."""
    from accelerate import Accelerator, skip_first_batches
    from torch.utils.data import DataLoader

    records = opened(data_sets.WRITERS["llava json"](tmp_path, data_sets.samples(23)), student)

    def batches_of(skip: int, epoch: int) -> list[torch.Tensor]:
        loader = Accelerator(cpu=True).prepare(
            DataLoader(
                records,
                batch_size=3,
                sampler=LengthGrouped(records, 6, seed=4),
                collate_fn=Collator(student.tokenizer.spec.pad_token_id),
                drop_last=True,
            )
        )
        loader = skip_first_batches(loader, skip) if skip else loader
        loader.set_epoch(epoch)
        return [batch["input_ids"] for batch in loader]

    whole = batches_of(0, 3)
    assert len(whole) == 7
    rest = batches_of(4, 3)
    assert len(rest) == 3
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(whole, batches_of(0, 2), strict=True))


def naive_collate(examples: list[Example], pad: int, left: bool) -> dict[str, torch.Tensor]:
    width = max(len(example.ids) for example in examples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
    for name in ("image", "instruction", "response"):
        rows[name] = []
    for example in examples:
        gap = width - len(example.ids)
        before, after = (gap, 0) if left else (0, gap)
        rows["input_ids"].append([pad] * before + list(example.ids) + [pad] * after)
        rows["attention_mask"].append([0] * before + [1] * len(example.ids) + [0] * after)
        for name in ("image", "instruction", "response"):
            rows[name].append([0] * before + [int(span == name) for span in example.spans] + [0] * after)
    return {name: torch.tensor(value) for name, value in rows.items()}


@pytest.mark.parametrize("left", [False, True])
def test_collator_equals_the_naive_one(student: Checkpoint, tmp_path: Path, left: bool) -> None:
    records = opened(data_sets.WRITERS["llava json"](tmp_path, data_sets.samples(10)), student)
    examples = [records[i] for i in range(10)]
    pad = student.tokenizer.spec.pad_token_id
    ours = Collator(pad, left)(examples)
    for name, value in naive_collate(examples, pad, left).items():
        assert torch.equal(ours[name].long(), value), name
    assert ours["pixel_values"].shape[0] == sum(len(example.pixels) for example in examples)
    assert next(batches(examples, range(10), 10, Collator(pad), "cpu")).pixels_NCHW is not None


def user_parts(student: Checkpoint, tmp_path: Path, content: Any, images: int) -> list[dict[str, str]]:
    names = [row[0] for row in data_sets.image_files(data_sets.samples(images), tmp_path)]
    key, role = ("messages", "role") if isinstance(content, list) else ("conversations", "from")
    text = "content" if key == "messages" else "value"
    record = {key: [{role: "user", text: content}, {role: "assistant", text: "7"}], "images": names}
    records = opened(data_sets.json_list(tmp_path / "d.json", [record]), student)
    parts: list[dict[str, str]] = records.record(0).messages[0]["content"]
    return parts


IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    ("content", "images", "expected"),
    [
        ("<image>\nQ", 1, [IMAGE, "\nQ"]),
        ("Q\n<image>", 1, [IMAGE, "\nQ"]),
        ("<image>Q", 1, [IMAGE, "\nQ"]),
        ("before <image> after", 1, [IMAGE, "\nbefore after"]),
        ("<image>\n<image>\nQ", 2, [IMAGE, IMAGE, "\nQ"]),
        ("Q <image> <image>", 2, [IMAGE, IMAGE, "\nQ"]),
        ("A <image> or B <image>?", 2, ["A ", IMAGE, " or B ", IMAGE, "?"]),
        ("<image>", 1, [IMAGE]),
        ([IMAGE, {"type": "text", "text": "Q"}], 1, [IMAGE, "\nQ"]),
        ([{"type": "text", "text": "Q"}, IMAGE], 1, [IMAGE, "\nQ"]),
        ([{"type": "image", "index": 1}, {"type": "image", "index": 0}, "Q"], 2, [IMAGE, IMAGE, "\nQ"]),
    ],
)
def test_images_go_before_the_words_they_are_asked_about(
    student: Checkpoint, tmp_path: Path, content: Any, images: int, expected: list[Any]
) -> None:
    shown = user_parts(student, tmp_path, content, images)
    assert shown == [{"type": "text", "text": part} if isinstance(part, str) else part for part in expected]


def test_numbered_images_are_taken_by_number(student: Checkpoint, tmp_path: Path) -> None:
    found = data_sets.samples(3)
    names = [row[0] for row in data_sets.image_files([found[0], found[1], found[2]], tmp_path)]
    parts = [{"type": "image", "index": 2}, {"type": "image", "index": 0}, {"type": "image", "index": 1}]
    turns = [{"role": "user", "content": [*parts, "Q"]}, {"role": "assistant", "content": "7"}]
    data = data_sets.json_list(tmp_path / "d.json", [{"messages": turns, "images": names}])
    assert [path.name for path in opened(data, student).record(0).images] == ["2-0.png", "0-0.png", "1-0.png"]  # type: ignore[union-attr]


def test_images_within_the_record(student: Checkpoint, tmp_path: Path) -> None:
    """Paths and data URLs inside the parts, and text-only turns beside an image column."""
    import base64

    sample = data_sets.samples(1)[0]
    data_sets.image_files([sample], tmp_path)
    url = "data:image/png;base64," + base64.b64encode(data_sets.png(sample.images[0])).decode()
    answer = {"role": "assistant", "content": "7"}
    own = [
        {"type": "image", "image": "images/0-0.png"},
        {"type": "image", "url": url},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    rows = [{"messages": [{"role": "user", "content": [part, {"type": "text", "text": "Q"}]}, answer]} for part in own]
    rows.append({"messages": [{"role": "user", "content": "Q"}, answer], "images": ["images/0-0.png"]})
    records = opened(data_sets.json_list(tmp_path / "d.json", rows), student)
    for index in range(1, 4):
        assert records[index].ids == records[0].ids
        assert (records[index].pixels[0] == records[0].pixels[0]).all()


def test_json_lists_are_indexed_whatever_the_text_holds(tmp_path: Path) -> None:
    """Brackets, quotes and escapes inside strings, nested values, odd white space."""
    drawn = random.Random(3)
    letters = '[]{}",:\\ \n\té<image>☃'

    def value(depth: int) -> Any:
        if depth == 0 or drawn.random() < 0.4:
            return "".join(drawn.choice(letters) for _ in range(drawn.randint(0, 12)))
        if drawn.random() < 0.5:
            return [value(depth - 1) for _ in range(drawn.randint(0, 3))]
        return {value(0): value(depth - 1) for _ in range(drawn.randint(0, 3))}

    for turn in range(200):
        records = [{"k": value(3), "n": turn} for _ in range(drawn.randint(1, 6))]
        text = json.dumps(records, indent=drawn.choice([None, 0, 3]), ensure_ascii=drawn.random() < 0.5)
        file = tmp_path / "d.json"
        file.write_bytes(drawn.choice([b"", b"\xef\xbb\xbf", b"\n "]) + text.encode() + drawn.choice([b"", b"\n"]))
        source = TextSource(file)
        assert [source[i].value for i in range(len(source))] == records
