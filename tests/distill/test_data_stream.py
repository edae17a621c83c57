"""Streams by number, and whole runs on data sets: held-out figures, skipped records, exact resume."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill import check, irs, report_data, visual
from distill.config import TrainConfig
from distill.data import Collator, DataOptions, Streamed, StreamOptions, train_sampler, write_skipped
from distill.run import Data
from distill.train import train
from tests.distill import data_sets
from tests.distill.conftest import interrupt_at
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
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_sets.WRITERS["messages parquet shards"](tmp_path_factory.mktemp("rows"), data_sets.samples(20))


def streamed(data: Path, student: Checkpoint, samples: int = 50, buffer: int = 4, **options: Any) -> Streamed:
    stream = StreamOptions(samples, seed=3, context=512, buffer=buffer)
    return Streamed(data, DataOptions(**options), stream, student.tokenizer, student.image)


def test_a_stream_is_a_function_of_the_number(student: Checkpoint, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill.data import stream

    monkeypatch.setattr(stream, "HEAD", 3)
    one = streamed(rows, student)
    ids = [one[i].ids for i in range(50)]
    # each pass over the rows holds all of them, in another order
    assert sorted(ids[:20]) == sorted(ids[20:40])
    assert ids[:20] != ids[20:40]
    assert isinstance(train_sampler(one, 4, 0, True), torch.utils.data.SequentialSampler)
    other = streamed(rows, student)
    assert other[33].ids == ids[33]
    assert other[2].ids == ids[2]
    assert other[7].ids == ids[7]  # back: begins again
    # as two processes see it: every second batch of two
    assert [other[i].ids for i in (10, 11, 14, 15)] == [ids[i] for i in (10, 11, 14, 15)]
    plain = streamed(rows, student, buffer=0)
    assert sorted(plain[i].ids for i in range(20)) == sorted(ids[:20])


def test_looking_before_training_reads_a_stream_no_further_than_its_head(
    student: Checkpoint, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.data import stream

    monkeypatch.setattr(stream, "HEAD", 12)
    one = streamed(rows, student)
    monkeypatch.setattr(one, "_begin_epoch", None)
    pairs = irs.build_pairs(one, 8)
    assert pairs.found
    assert pairs.looked_at <= 12
    drawn, _, _ = check._draw(one, seed=0)
    assert sorted(example.ids for example in drawn) == sorted(one[i].ids for i in range(12))
    shown = report_data.evenly(one, 4)
    assert [example.ids for example in shown] == [one[i].ids for i in (0, 3, 6, 9)]
    facts = report_data._data_facts(SimpleNamespace(data=Data(one, None, None, {})), seed=0)  # type: ignore[arg-type]
    assert facts["figures"]
    seen = visual.probe(one, 8, Collator(student.tokenizer.spec.pad_token_id))
    assert seen is not None
    assert one._next == 12, "training goes on from here"


def test_a_record_that_cannot_be_used_stops_or_is_listed(
    student: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.data import stream

    monkeypatch.setattr(stream, "HEAD", 2)
    table = data_sets.table(data_sets.samples(10))
    broken = [
        {**row, "images": [{"bytes": b"x", "path": "a.png"}]} if n == 5 else row for n, row in enumerate(_rows(table))
    ]
    type(table).from_list(broken, features=table.features).to_parquet(tmp_path / "d.parquet")
    stopping = streamed(tmp_path / "d.parquet", student, buffer=0)
    with pytest.raises(DataError, match=r"record 5: field 'image': .*not a readable image.*--on_bad_image skip"):
        stopping[5]
    skipping = streamed(tmp_path / "d.parquet", student, buffer=0, on_bad_image="skip")
    write_skipped(skipping, tmp_path / "run")
    assert skipping[5].ids == skipping[6].ids
    assert skipping[4].ids != skipping[6].ids
    lines = (tmp_path / "run/skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [5]
    monkeypatch.setattr(stream, "HEAD", 8)
    with pytest.raises(DataError, match="record 5"):
        streamed(tmp_path / "d.parquet", student, buffer=0)


def _rows(table: Any) -> list[dict[str, Any]]:
    from distill.data.tables import undecoded

    return list(undecoded(table))


def config(student: Checkpoint, out: Path, data: Path, **changes: Any) -> TrainConfig:
    base = TrainConfig(
        student=str(student.directory),
        data=data,
        objective="sft",
        out=out,
        steps=6,
        batch_size=2,
        accumulate=2,
        lr=1e-3,
        holdout=8,
        eval_every=3,
        eval_samples=8,
        save_every=2,
        log_every=1,
        visual_every=0,
        threads=1,
    )
    return dataclasses.replace(base, **changes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


@pytest.mark.parametrize("streaming", [False, True], ids=["in place", "stream"])
def test_an_interrupted_run_on_a_data_set_ends_with_the_same_bits(
    student: Checkpoint, tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    """12 records for training and 4 a step: the second and the interrupted third step lie in different epochs."""
    held = data_sets.WRITERS["llava json"](tmp_path, data_sets.samples(28)[20:])
    changes = {"streaming": True, "holdout": 0, "eval_data": held} if streaming else {}
    whole = config(student, tmp_path / "whole", rows, **changes)
    result = train(whole)
    assert result.n == 8
    lines = [json.loads(line) for line in (whole.out / "metrics.jsonl").read_text().splitlines()]
    assert {"eval_sft", "eval_exact_match"} <= set().union(*lines)
    data = json.loads((whole.out / "student/vlm.json").read_text())["data"]
    assert data["format"] == "messages"
    assert data["samples"] == (24 if streaming else 12)
    stopped = dataclasses.replace(whole, out=tmp_path / "stopped")
    interrupt_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    monkeypatch.undo()
    train(dataclasses.replace(stopped, resume=True))
    one, other = weights(whole.out), weights(stopped.out)
    assert all(torch.equal(other[name], value) for name, value in one.items())


def test_a_run_lists_what_it_left_out(student: Checkpoint, tmp_path: Path) -> None:
    data = data_sets.WRITERS["llava json"](tmp_path, data_sets.samples(20))
    (tmp_path / "images/4-0.png").unlink()
    run = config(student, tmp_path / "run", data, on_bad_image="skip", steps=2, eval_every=0)
    train(run)
    lines = [json.loads(line) for line in (run.out / "skipped.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [4]
    assert "4-0.png" in lines[0]["problem"]
    assert json.loads((run.out / "student/vlm.json").read_text())["data"]["skipped"] == 1
