"""What cuts, orders or shares a sample keeps all that belongs to it: reasonings, latents, images in archives, stored columns."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from distill import irs, latents, report_data
from distill.batch import Normaliser
from distill.config import Align, LossWeights
from distill.data import Collator, DataOptions, Streamed, StreamOptions, tables, to_batch
from distill.data.record import Raw, parse
from distill.data.tar import TarSource
from distill.evaluate import held_out_terms
from distill.objective import Objective
from distill.teacher import LiveTeacher
from distill.visual import FEWEST, Gain, Reading, VisualWatch
from tests.distill import data_sets
from tests.distill.conftest import Pair
from vlm.errors import DataError
from vlm.load import load_model, open_checkpoint


def test_a_reasoning_cut_to_its_prompt(qwen2_pair: Pair) -> None:
    """Its steps go with the answer: IRS and the report ask the prompt alone."""
    from distill.data import DigitsExamples

    checkpoint = qwen2_pair.checkpoint
    examples = DigitsExamples("train", 12, checkpoint.tokenizer, checkpoint.image, steps=True)
    assert examples[0].steps is not None
    collate = Collator(checkpoint.tokenizer.spec.pad_token_id)
    scores = irs.layer_scores(qwen2_pair.teacher, examples, 4, collate)
    assert len(scores.scores) == 3
    pair: Any = SimpleNamespace(student=qwen2_pair.student, teacher=None, student_source=checkpoint)
    shown = report_data.answers(pair, [examples[0]])
    assert shown[0]["reference"]
    assert shown[0]["student"] is not None


def test_teacher_terms_are_means_over_what_the_teacher_is_asked(qwen2_pair: Pair, tmp_path: Path) -> None:
    """Latents put into the answers neither thin kd and tpa out nor become candidates."""
    source = qwen2_pair.checkpoint
    opened = open_checkpoint(latents.extend(load_model(source), source, 4, tmp_path / "student", seed=0))
    student, ids = load_model(opened), opened.tokenizer.spec.latent_token_ids
    plain, long = (to_batch(Collator(0, latents=given)(qwen2_pair.examples())) for given in ((), ids))
    assert float(long.response_tokens()) > float(plain.response_tokens()) == float(long.response_tokens(taught=True))
    asked: list[torch.Tensor] = []

    class Watched(LiveTeacher):
        def __call__(self, batch: Any, *more: Any) -> Any:
            seen = super().__call__(batch, *more)
            original = seen.candidates

            def candidates(found: Any) -> Any:
                asked.append(found.ids_BC[found.keep_BC])
                return original(found)

            object.__setattr__(seen, "candidates", candidates)
            return seen

    align = Align(tpa_share=1.0, candidates=8)
    teacher = Watched(qwen2_pair.teacher, align, 1)
    objective = Objective(("sft", "kd", "tpa"), LossWeights(), align, teacher, 500)
    with torch.no_grad():  # the latents are as likely as anything
        student.get_output_embeddings().weight[list(ids)] *= 20
    normaliser = Normaliser.of(long)
    values = objective(student, long, normaliser)[1]
    whole = objective(student, long, Normaliser(1.0, 1.0))[1]
    for name, count in (
        ("sft", long.response_tokens()),
        ("kd", plain.response_tokens()),
        ("tpa", plain.response_tokens()),
    ):
        torch.testing.assert_close(values[name], whole[name] / float(count), rtol=1e-5, atol=1e-7)
    drawn = torch.cat(asked)
    assert len(drawn) > 100
    assert not set(drawn.tolist()) & set(ids)
    examples: Any = qwen2_pair.examples()
    held = held_out_terms(student, objective, examples, 5, Collator(0, latents=ids), 5)
    assert held["kd"] == pytest.approx(float(values["kd"]), rel=1e-4)


def test_images_of_an_archive_come_by_number(tmp_path: Path) -> None:
    """`tar --sort=name` puts 10.png before 2.png."""
    names = sorted(f"{number}.png" for number in range(12))
    turns = [{"from": "human", "value": "<image>" * 12 + "?"}, {"from": "gpt", "value": "7"}]
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        record = json.dumps({"conversations": turns}).encode()
        for name, data in [("a.json", record), *((f"a.{name}", name.encode()) for name in names)]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    found = TarSource([tmp_path / "s.tar"])[0]
    assert found.images is not None
    assert [image.read() for image in found.images] == [f"{number}.png".encode() for number in range(12)]  # type: ignore[union-attr]


def test_a_saved_data_set_with_images_is_read_where_it_is(tmp_path: Path) -> None:
    """Casting its columns would write all of it again, into the user's folder."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (1, 2, 3)).save(buffer, "PNG")
    rows = {"images": [[{"bytes": buffer.getvalue(), "path": None}]] * 3, "text": ["a", "b", "c"]}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "saved"))
    before = sorted(path.name for path in (tmp_path / "saved").iterdir())
    table = datasets.load_from_disk(str(tmp_path / "saved"))
    source = tables.TableSource(table, "saved", [], ["saved"], [3])
    assert source[1].value == {"images": [{"bytes": buffer.getvalue(), "path": None}], "text": "b"}
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == before


def test_half_a_character_in_the_system_text_is_named() -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    with pytest.raises(DataError, match=r"record 0: field 'system'"):
        parse(Raw({"system": "half \ud83d", "conversations": turns}), "d.json record 0", "llava", Path())


def test_a_stream_that_breaks_in_the_middle_is_named(
    qwen2_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from distill.data import stream as module

    monkeypatch.setattr(module, "HEAD", 3)
    rows = data_sets.WRITERS["messages parquet shards"](tmp_path, data_sets.samples(20))
    found = Streamed(
        rows,
        DataOptions(),
        StreamOptions(50, seed=3, context=512, buffer=0),
        qwen2_pair.checkpoint.tokenizer,
        qwen2_pair.checkpoint.image,
    )

    def broken() -> Any:
        yield from ()
        raise OSError("Couldn't deserialize thrift")

    found._opened = [broken()]
    found._epoch, found._next = 0, 5
    with pytest.raises(DataError, match=r"stream record 5: cannot be read .OSError: Couldn't deserialize"):
        found._row(6)


def test_too_few_samples_accuse_nobody() -> None:
    def reading(gain: Gain) -> Reading:
        return Reading(gain, 1.0, 2.0)

    few = Gain.of([4.0, 3.5, 5.0])
    assert few.low <= 0
    assert VisualWatch(100, reading(few)).verdict(1, reading(Gain(0.1, -0.1, 0.3, 32))) == "early"
    many = Gain(0.0, -0.1, 0.1, FEWEST)
    assert VisualWatch(100, reading(many)).verdict(1, reading(few)) == "mismatched"
