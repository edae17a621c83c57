"""A cache on disk: whole parts or none, killed writers, altered files, several writers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cache_codec import Compression, PackedRows, compress
from distill.cache_store import FORMAT, INFO, Entry, Missing, Reader, Writer, read_index
from vlm.errors import UserError

ROOT = Path(__file__).parent.parent.parent
SAMPLES = 7


def entry(number: int, dense: bool = False, candidates: int = 2) -> Entry:
    """A sample with as many response rows as its number, and some visual ones; the same on every call."""
    generator = torch.Generator().manual_seed(number)
    kept_J = torch.rand(5, generator=generator) < 0.6
    count = number + int(kept_J.sum()) + number * candidates
    logits_RV = torch.randn(count, 30, generator=generator) * 3
    uniform_R = torch.rand(count, generator=generator)
    rows = logits_RV.bfloat16() if dense else compress(logits_RV, uniform_R, Compression(4, 2, 1e-3))
    ids_NC = torch.randint(0, 30, (number, candidates), generator=generator)
    return Entry(bytes([number]) * 32, 100 + number, torch.rand(5, generator=generator), kept_J, ids_NC, rows)


def info(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / INFO).write_text(json.dumps({"format": FORMAT}))
    return folder


def fill(folder: Path, numbers: list[int], shard: tuple[int, int] = (0, 1), dense: bool = False) -> Path:
    writer = Writer(info(folder), *shard, data="d", samples_a_part=2)
    there = Reader(folder).records("d")
    for number in numbers:
        if 100 + number not in there:
            writer.add(entry(number, dense))
    writer.flush()
    writer.close()
    return folder


def same(a: Entry, b: Entry) -> bool:
    def flat(item: Entry) -> list[Any]:
        rows = vars(item.rows).values() if isinstance(item.rows, PackedRows) else [item.rows]
        return [item.weight_J, item.kept_J, item.candidate_NC, *rows]

    return (a.key, a.record) == (b.key, b.record) and all(
        x.dtype == y.dtype
        and torch.equal(x.long() if x.dtype == torch.uint16 else x, y.long() if y.dtype == torch.uint16 else y)
        for x, y in zip(flat(a), flat(b), strict=True)
    )


@pytest.mark.parametrize("dense", [False, True])
def test_what_was_written_is_read(tmp_path: Path, dense: bool) -> None:
    reader = Reader(fill(tmp_path, list(range(SAMPLES)), dense=dense))
    assert len(reader) == SAMPLES
    assert reader.records("d") == {100 + number for number in range(SAMPLES)}
    assert reader.records("other") == set()
    for number in range(SAMPLES):
        assert same(reader.get(entry(number).key), entry(number, dense))
    with pytest.raises(Missing, match="holds nothing for sample 6363"):
        reader.get(b"c" * 32)


def test_sizes_are_those_of_the_rows() -> None:
    for dense in (False, True):
        made = entry(4, dense)
        without = made.size() - 4 * len(made.weight_J) - len(made.kept_J)
        assert sum(made.row_sizes(4)) == without


def test_several_writers_make_one_cache(tmp_path: Path) -> None:
    one = Reader(fill(tmp_path / "one", list(range(SAMPLES))))
    for shard in range(2):
        fill(tmp_path / "two", list(range(shard, SAMPLES, 2)), (shard, 2))
    two = Reader(tmp_path / "two")
    assert set(one) == set(two)
    assert all(same(one.get(key), two.get(key)) for key in one)
    # another number of writers goes on without doing anything twice
    fill(tmp_path / "two", list(range(SAMPLES)))
    assert len(Reader(tmp_path / "two").parts) == len(two.parts)


KILLED = """
import os, sys
from pathlib import Path
import distill.cache_store as store
from tests.distill.test_cache_store import fill, SAMPLES
folder, moment = Path(sys.argv[1]), sys.argv[2]
kill = lambda: os.kill(os.getpid(), 9)
write, calls = store.write_atomic, []
def watched(path, data):
    calls.append(path)
    if len(calls) == 2 and moment == "inside":
        path.with_name(f".{path.name}.half").write_bytes(data[: len(data) // 2])
        kill()
    write(path, data)
    if len(calls) == 2 and moment == "part":
        kill()
    if len(calls) == 2 and moment == "line":
        with next(folder.glob("index-*.jsonl")).open("a") as file:
            file.write('{"file": "part-0of1-0000')
        kill()
store.write_atomic = watched
fill(folder, list(range(SAMPLES)))
"""


@pytest.mark.parametrize("moment", ["inside", "part", "line"])
def test_a_killed_writer_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, moment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed"), moment], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == -9, done.stderr
    assert len(Reader(tmp_path / "killed")) == 2  # the first part
    fill(tmp_path / "killed", list(range(SAMPLES)))
    fill(tmp_path / "whole", list(range(SAMPLES)))
    assert len([*(tmp_path / "killed").iterdir()]) == len([*(tmp_path / "whole").iterdir()])
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()
    Reader(tmp_path / "killed").verify()


def test_an_altered_part_is_named_and_only_when_it_is_needed(tmp_path: Path) -> None:
    fill(tmp_path, list(range(SAMPLES)))
    parts = read_index(tmp_path / "index-0of1.jsonl")
    damaged = tmp_path / parts[1].file
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    reader = Reader(tmp_path)
    reader.get(entry(0).key)
    for ask in (lambda: reader.get(entry(2).key), lambda: reader.get(b"c" * 32), reader.verify):
        with pytest.raises(UserError, match=rf"{damaged.name} was altered .*delete its line from index-0of1.jsonl"):
            ask()
    # what the message says to do works
    lines = (tmp_path / "index-0of1.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "index-0of1.jsonl").write_text("".join(line for line in lines if damaged.name not in line))
    fill(tmp_path, list(range(SAMPLES)))
    again = Reader(tmp_path)
    assert len(again) == SAMPLES
    again.verify()


@pytest.mark.parametrize("damage", ["cut", "gone", "header"])
def test_a_part_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    fill(tmp_path, [1, 2, 3])
    path = tmp_path / read_index(tmp_path / "index-0of1.jsonl")[0].file
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-10] if damage == "cut" else b"\xff" * 16 + data[16:])
    with pytest.raises(UserError, match=path.name):
        Reader(tmp_path)


def test_one_process_writes_a_shard(tmp_path: Path) -> None:
    first = Writer(info(tmp_path), 0, 2, data="d")
    with pytest.raises(UserError, match="another process is writing shard 0of2"):
        Writer(tmp_path, 0, 2, data="d")
    Writer(tmp_path, 1, 2, data="d").close()
    first.close()
    Writer(tmp_path, 0, 2, data="d").close()


@pytest.mark.parametrize(
    ("text", "reason"), [(None, "holds no teacher cache"), ("{", "cannot be read"), ("[]", "format")]
)
def test_a_folder_without_a_cache_is_refused(tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / INFO).write_text(text)
    with pytest.raises(UserError, match=reason):
        Reader(tmp_path)
