"""`distill check`: its tables against the batch, its figures against real runs, and that it fails where it should."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill import check, check_blind, check_parts, check_steps, cli, presets
from distill.__main__ import main
from distill.check_steps import Point
from distill.data import Collator, Example, to_batch
from tests.distill.conftest import Pair, interrupt_at
from tests.tiny import make_student
from vlm import digits
from vlm.errors import GateFailed, UserError
from vlm.load import load_model, open_checkpoint

SIZES = {"hidden": 64, "head_dim": 16, "intermediate": 96, "spread": 2.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher that knows nothing, and 40 questions about images on disk."""
    folder = tmp_path_factory.mktemp("check")
    make_student(folder / "student", seed=2, layers=1, **SIZES)
    make_student(folder / "ignorant", seed=3, layers=1, **SIZES)
    records = []
    for index in range(40):
        sample = digits.sample("train", index)
        sample.image.save(folder / f"{index}.png")
        turns = [{"from": "human", "value": f"<image>\n{sample.question}"}, {"from": "gpt", "value": sample.answer}]
        records.append({"id": index, "image": f"{index}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def words(world: Path, *more: str, teacher: str | None = None) -> list[str]:
    found = {
        "--teacher": teacher or str(presets.digits_teacher()),
        "--student": str(world / "student"),
        "--data": str(world / "data.json"),
        "--steps": "20",
        "--batch_size": "4",
        "--lr": "1e-4",
        "--threads": "1",
        "--blind_samples": "12",
    }
    return ["check", *(word for pair in found.items() for word in pair), *more]


def test_a_healthy_pair_passes_and_says_everything(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(world, "--json")) == 0
    out = capsys.readouterr().out
    value = json.loads(out.splitlines()[-1])
    stage = value["stages"][0]
    assert value["holds"] is True
    assert stage["data"]["samples"] == 40
    assert stage["data"]["images_per_sample"] == 1
    assert [point["size"] for point in stage["memory"]["measured"]] == [1, 2, 4]
    assert set(stage["first_step"]) == {"loss", "sft", "kd", "iva", "tpa", "gradient norm"}
    assert stage["seconds"]["total"] == pytest.approx(20 * stage["seconds"]["step"])
    gains = {(gain["who"], gain["term"]): gain for gain in stage["blind_test"]}
    assert gains["teacher", "sft"]["sees"] is True
    assert gains["teacher", "sft"]["n"] == 12
    assert stage["vocabulary"]["special_tokens_that_differ"] == []
    for heading in ("data", "tokens", "vocabulary", "first step", "memory and time", "blind-image test", "checks"):
        assert f"\n{heading}" in out, heading
    assert "FAIL" not in out


def test_a_teacher_that_does_not_see_fails_the_check(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GateFailed, match="teacher looks at the image"):
        main(words(world, "--align.iva_layer=0", teacher=str(world / "ignorant")))
    assert "FAIL  teacher looks at the image" in capsys.readouterr().out


def test_cut_off_and_broken_gradients_fail_the_check(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill import train

    original = train.load_run

    def damaged(config: Any) -> Any:
        run = original(config)
        projector = run.student.model.multi_modal_projector
        projector.linear_1.register_forward_hook(lambda _m, _i, output: output.detach())
        run.student.model.language_model.norm.weight.register_hook(lambda grad: grad * float("nan"))
        return run

    monkeypatch.setattr(train, "load_run", damaged)
    config = cli.parse(words(world, "--objective=sft")[1:], "check", check.EXTRAS).stages[0].config
    findings = {finding.name: finding for finding in check.check_stage("", config, 0).findings}
    idle = findings["every parameter learns"]
    assert idle.status == "fail"
    assert "multi_modal_projector.linear_1" in idle.text or "vision_tower" in idle.text
    assert findings["finite gradients"].status == "fail"


def test_what_a_frozen_part_or_the_feature_layer_leaves_out_is_not_missed(tmp_path: Path) -> None:
    clip = make_student(tmp_path / "clip", tower="clip", feature_layer=-2, layers=1, **SIZES)
    student = load_model(open_checkpoint(clip))
    unused = check_steps.unused_tower(student)
    left_out = {name for name, _ in student.named_parameters() if unused(name)}
    assert {name.split(".layers.")[1][0] for name in left_out if ".layers." in name} == {"1"}
    assert any("post_layernorm" in name for name in left_out)
    gradients = check_steps.Gradients()
    gradients.seen = {name for name, _ in student.named_parameters() if name not in left_out}
    assert all(f.status == "ok" for f in check_steps.gradient_findings(student, gradients, has_images=True))
    student.model.multi_modal_projector.linear_1.weight.requires_grad_(False)
    gradients.seen -= {"model.multi_modal_projector.linear_1.weight", "model.multi_modal_projector.linear_2.weight"}
    found = {f.name: f for f in check_steps.gradient_findings(student, gradients, has_images=True)}
    assert "linear_2" in found["every parameter learns"].text
    assert "linear_1" not in found["every parameter learns"].text


@pytest.mark.parametrize("pad_left", [False, True])
def test_the_token_table_is_the_batch(qwen2_pair: Pair, pad_left: bool) -> None:
    examples, tokenizer = qwen2_pair.examples(), qwen2_pair.checkpoint.tokenizer
    batch = qwen2_pair.collate(examples, pad_left)
    width = batch.input_ids_BT.shape[1]
    for row, example in enumerate(examples):
        rows = check_parts.token_rows(batch, row, tokenizer)
        assert [r.first for r in rows] + [width] == [0] + [r.last + 1 for r in rows]
        spans = [r.span for r in rows for _ in range(r.first, r.last + 1)]
        assert [span for span in spans if span != "padding"] == list(example.spans)
        assert spans.count("padding") == width - len(example.ids)
        tokens = [r.token for r in rows for _ in range(r.first, r.last + 1)]
        assert tokens == batch.input_ids_BT[row].tolist()
        assert sum(r.trained for r in rows) == example.spans.count("response")
        assert next(r.position for r in rows if r.position is not None) == 0
        collapsed = [r for r in rows if r.span == "image"]
        assert len(collapsed) == len(example.pixels)
        assert all(len(r.cells()) == 6 for r in rows)


def test_an_answer_without_its_end_is_noted(qwen2_pair: Pair) -> None:
    tokenizer, example = qwen2_pair.checkpoint.tokenizer, qwen2_pair.examples()[0]
    good = check_parts.alignment_findings(example, tokenizer, True)
    assert {finding.status for finding in good} == {"ok"}
    end = max(i for i, span in enumerate(example.spans) if span == "response")
    cut = dataclasses.replace(example, ids=example.ids[:end], spans=example.spans[:end])
    found = {f.name: f for f in check_parts.alignment_findings(cut, tokenizer, True)}
    assert found["trained tokens"].status == "warn"
    assert "stop" in found["trained tokens"].text
    doubled = dataclasses.replace(example, pixels=example.pixels * 2)
    found = {f.name: f for f in check_parts.alignment_findings(doubled, tokenizer, True)}
    assert found["image tokens"].status == "fail"
    silent = dataclasses.replace(example, spans=tuple("template" if s == "response" else s for s in example.spans))
    found = {f.name: f for f in check_parts.alignment_findings(silent, tokenizer, True)}
    assert found["trained tokens"].status == "fail"


def test_a_gain_is_the_difference_the_images_make() -> None:
    rng = np.random.default_rng(0)
    right = rng.normal(1.0, 0.3, 40)
    seeing = check_blind._gain("teacher", "sft", list(zip(right, right + rng.normal(0.5, 0.2, 40), strict=True)))
    blind = check_blind._gain("teacher", "sft", list(zip(right, right + rng.normal(0.0, 0.2, 40), strict=True)))
    assert seeing.sees
    assert seeing.gain == pytest.approx(0.5, abs=0.1)
    assert not blind.sees
    few = [dataclasses.replace(seeing, n=3)]
    assert check_blind.findings(few, True)[0].status == "warn"
    assert check_blind.findings([blind], True)[0].status == "fail"
    assert check_blind.findings([seeing], True)[0].status == "ok"
    assert check_blind.findings([], False)[0].status == "warn"


def test_special_tokens_and_padded_rows_are_reported(world: Path) -> None:
    student = open_checkpoint(world / "student")
    text = {**student.config["text_config"], "vocab_size": 1024}
    wider = dataclasses.replace(student, config={**student.config, "text_config": text})
    value = check_parts.vocabulary(wider, student, 384)
    tokens = value["student"]["tokens"]
    assert value["teacher"] == {"tokens": tokens, "rows": 1024, "padded_rows": 1024 - tokens}
    other = open_checkpoint(world / "ignorant")
    other.tokenizer.special_ids = frozenset(sorted(other.tokenizer.special_ids)[1:])
    differing = check_parts.vocabulary(other, student, 384)["special_tokens_that_differ"]
    assert [item["teacher"] for item in differing] == [None]


def test_sizes_grow_to_the_batch_size_and_beyond_it_a_line_goes_on() -> None:
    assert list(check_steps.sizes(1)) == [1]
    assert list(check_steps.sizes(6)) == [1, 2, 4, 6]
    points = [Point(1, 0.5, 110), Point(2, 0.6, 120)]
    assert check_steps.line(points, "peak_bytes")(2) == 120
    assert check_steps.line(points, "peak_bytes")(8) == 180
    assert check_steps.line(points[:1], "peak_bytes")(8) == 880
    assert check_steps.line([Point(1, 1, 100), Point(2, 1, 90)], "peak_bytes")(8) == 90


def test_measuring_stops_before_memory_ends_and_says_why() -> None:
    class Small(check_steps.Memory):
        available = 1000

        def peak(self) -> int:
            return 300 * len(taken)

    taken: list[int] = []

    def batch_of(size: int) -> Any:
        taken.append(size)
        return size

    points, why = check_steps.measure(lambda batch: {}, batch_of, 64, Small())
    assert [point.size for point in points] == [1, 2]
    assert "batch size 4" in why


def test_peak_memory_sees_an_allocation_and_forgets_it_after_reset() -> None:
    memory = check_steps.Memory()
    if memory.device != "cpu" or not memory.resettable:
        pytest.skip("the kernel's high-water mark cannot be reset here")
    memory.reset()
    before = memory.peak()
    block = torch.ones(64 << 18)
    assert memory.peak() - before > 60 << 20
    del block
    memory.reset()
    assert memory.peak() - before < 30 << 20


def test_a_checkpoint_takes_the_disk_that_was_announced(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.train import load_run, train

    asked = cli.parse(words(world, "--objective=sft")[1:], "check", check.EXTRAS).stages[0].config
    config = dataclasses.replace(asked, out=tmp_path / "run", save_dtype="float16", freeze="vision")
    interrupt_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    folder = next((config.out / "checkpoints").glob("checkpoint-*"))
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    student = load_run(config).student
    announced = check_steps.disk(config, student, 3)
    assert announced.checkpoint == pytest.approx(written, rel=0.1, abs=100_000)
    assert announced.peak == 2 * announced.checkpoint + announced.student
    judged = check_steps.disk(dataclasses.replace(config, eval_every=1, holdout=0.2), student, 3)
    assert judged.peak == announced.peak + 2 * judged.best
    assert judged.best > announced.student  # float16; the best is kept as it trains


@pytest.mark.parametrize(
    ("more", "seen"),
    [
        (["--resume"], "drop --resume"),
        (["--blind_samples=-1"], "blind_samples"),
        (["--stepz=3"], "did you mean --steps"),
        (["--batch_size=500"], "do not fill one batch"),
        (["--teacher=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_refused(world: Path, more: list[str], seen: str) -> None:
    argv = ["check", *more] if "--resume" in more else words(world, *more)
    with pytest.raises(UserError, match=seen):
        main(argv)


@pytest.mark.parametrize("name", [name for name in cli.recipes() if name != "digits-stages"])
def test_recipes_of_the_package_check_out_on_tiny_models(
    world: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe's own objectives, frozen parts, layouts and types; sizes and quantised loading as a CPU allows."""
    cpu = ["--recipe", name, "--accumulate=1", "--batch_size=1", "--teacher_load=none", "--blind_samples=8", "--json"]
    assert main([word for word in words(world, *cpu) if word not in ("--lr", "1e-4", "--batch_size", "4")]) == 0
    value = json.loads(capsys.readouterr().out.splitlines()[-1])
    recipe = cli.read_recipe(cli.recipe_path(name))
    assert [stage["stage"] for stage in value["stages"]] == [stage["name"] for stage in recipe["stages"]]


def test_text_only_samples_do_not_stop_it(qwen2_pair: Pair) -> None:
    text_only = [Example(e.ids, e.spans, ()) for e in qwen2_pair.examples() if not e.pixels]
    figures = check_parts.data_figures(text_only, text_only, [len(e.ids) for e in text_only])
    assert figures.without_image == len(text_only)
    collate = Collator(qwen2_pair.checkpoint.tokenizer.spec.pad_token_id)
    assert not [
        r
        for r in check_parts.token_rows(to_batch(collate(text_only)), 0, qwen2_pair.checkpoint.tokenizer)
        if r.span == "image"
    ]
