"""The HTML report: complete, self-contained, safe against foreign text, and never in the way of training."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill import report, report_data, report_html, stages
from distill.__main__ import main
from distill.config import TrainConfig
from distill.data import Collator
from distill.report import read_metrics
from distill.stored import config_to_json
from tests.distill.conftest import Pair
from tests.tiny import make_student
from vlm import digits, preprocess
from vlm.errors import UserError

VOID = {"meta", "img", "br", "hr", "path", "use", "link"}


class Page(HTMLParser):
    """Collects what a page holds and complains about what does not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def refers_outside(text: str) -> list[str]:
    """Everything a browser would fetch."""
    found = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"' >]+)", text) + re.findall(r"url\(([^)]+)\)", text)
    return [value for value in found if not value.startswith(("#", "data:"))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny finished run of the command line, with its report."""
    folder = tmp_path_factory.mktemp("report")
    sizes = {"hidden": 64, "head_dim": 16, "intermediate": 96, "spread": 2.0}
    make_student(folder / "student", seed=2, layers=1, **sizes)
    words = ["--preset", "digits", "--student", str(folder / "student"), "--out", str(folder / "run")]
    words += ["--steps=6", "--batch_size=4", "--samples=100", "--eval_samples=20", "--eval_every=3", "--save_every=3"]
    words += ["--log_every=2", "--threads=1", "--visual_every=2", "--visual_samples=8", "--align.irs_pairs=10"]
    assert main(["train", *words]) == 0
    return folder / "run"


def test_training_leaves_a_complete_page_that_needs_nothing_else(run: Path) -> None:
    text = (run / "report.html").read_text()
    page = Page(text)
    assert refers_outside(text) == []
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags
    assert tags.count("svg") == 3, "terms, scores, IRS"
    for heading in ("Training", "Answers", "Data", "Environment", "Recipe"):
        assert heading in page.text, heading
    for word in ("sft: next token", "tpa: divergence", "exact match, held out", "visual gain", "IRS of the teacher"):
        assert word in page.text, word
    facts = json.loads((run / "report.json").read_text())
    assert facts["split"] == "test"
    assert len(facts["samples"]) == report_data.SHOWN
    assert [tag for tag, _ in page.tags].count("img") == report_data.SHOWN
    first = facts["samples"][0]
    assert first["question"] == digits.sample("test", 0).question
    assert first["reference"] == digits.sample("test", 0).answer
    for sample in facts["samples"]:
        assert sample["question"] in page.text
        assert sample["reference"] in page.text
    # the committed teacher answers 0.9875 of unseen questions
    assert sum(sample["teacher"] == sample["reference"] for sample in facts["samples"]) >= report_data.SHOWN - 2
    result = json.loads((run / "student" / "vlm.json").read_text())
    assert f"{result['exact_match']:.3f}" in page.text
    assert facts["data"]["figures"]["samples"] == 100


def test_drawing_it_again_changes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "report.html").read_text()
    assert main(["report", str(run), "--json"]) == 0
    assert (run / "report.html").read_text() == before
    value = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert value["stages"][0]["objective"] == "align-ti"


def test_controls_stand_beside_it_and_stay(run: Path, tmp_path: Path) -> None:
    comparison = tmp_path / "compare"
    for seed, score in ((0, 0.2), (1, 0.4)):
        fake_run(comparison / f"sft-6steps-seed{seed}", {"objective": "sft", "seed": seed}, score)
    fake_run(comparison / "sweep-sft", {"objective": "sft", "seed": 9001}, 0.9)
    alone = fake_run(tmp_path / "kd-alone", {"objective": "kd"}, 0.7)
    samples = json.loads((run / "report.json").read_text())["samples"]
    (alone / "report.json").write_text(json.dumps({"samples": [{**samples[0], "student": "KD SAYS"}]}))
    assert main(["report", str(run), "--compare_to", str(comparison), str(alone)]) == 0
    page = Page((run / "report.html").read_text())
    assert "0.300 ± 0.141" in page.text, "mean and standard deviation over the seeds, the sweep left out"
    assert "kd-alone" in page.text
    assert "KD SAYS" in page.text
    assert main(["report", str(run)]) == 0
    assert "kd-alone" in Page((run / "report.html").read_text()).text


def test_methods_of_a_comparison_have_columns_of_their_own(run: Path, tmp_path: Path) -> None:
    comparison = tmp_path / "compare"
    for seed in (0, 1):
        for name, changes, score in (("sft", {}, 0.9), ("sft_optim=fira", {"optim": "fira"}, 0.1)):
            where = comparison / f"{name}-6steps-lr0.001-seed{seed}"
            fake_run(where, {"objective": "sft", "seed": seed, "steps": 6, **changes}, score)
    assert main(["report", str(run), "--compare_to", str(comparison)]) == 0
    page = Page((run / "report.html").read_text()).text
    assert "sft, 2 seeds" in page
    assert "sft_optim=fira, 2 seeds" in page
    assert "0.500" not in page


def test_a_metrics_line_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def fake_run(folder: Path, changes: dict[str, Any], score: float) -> Path:
    """A finished run as its files say, without the training."""
    (folder / "student").mkdir(parents=True)
    config = config_to_json(dataclasses.replace(TrainConfig(preset="digits", steps=6), **changes))
    (folder / "config.json").write_text(json.dumps(config))
    line = {"step": 6, "loss": 1.0, "sft": 1.0, "eval_sft": 0.5, "eval_exact_match": score}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    result = {
        "exact_match": score,
        "interval": [score, score],
        "n": 20,
        "seconds": 3.0,
        "created": "2026-01-01T00:00:00",
    }
    (folder / "student" / "vlm.json").write_text(json.dumps(result))
    return folder


def test_foreign_text_stays_text(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script><img src=x onerror=alert(1)>\" onload='x' &amp; |"
    run = fake_run(tmp_path / "a&b<i>", {"student": nasty}, 0.5)
    sample = {"question": nasty, "reference": nasty, "student": nasty, "teacher": nasty, "image": None}
    facts = {"samples": [sample], "split": nasty, "environment": {nasty: nasty}, "data": {"name": nasty}}
    (run / "report.json").write_text(json.dumps(facts))
    other = fake_run(tmp_path / "o<script>ther", {}, 0.5)
    assert main(["report", str(run), "--compare_to", str(other)]) == 0
    page = Page((run / "report.html").read_text())
    assert not [tag for tag, _ in page.tags if tag in ("script", "i") and tag == "script"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert nasty.replace("&amp;", "&amp;") in page.text


def test_a_run_that_has_just_begun_has_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config_to_json(TrainConfig(preset="digits"))))
    assert main(["report", str(tmp_path / "run")]) == 0
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert "not finished yet" in page.text
    assert "nothing logged yet" in page.text
    with pytest.raises(UserError, match="no student yet"):
        main(["report", str(tmp_path / "run"), "--samples", "3"])


def test_stages_share_a_page(tmp_path: Path) -> None:
    out = tmp_path / "run"
    entries = []
    for number, (name, objective) in enumerate((("align", "kd+iva"), ("sft", "sft")), 1):
        fake_run(out / f"stage-{number}-{name}", {"objective": objective}, 0.1 * number)
        entries.append({"name": name, "config": config_to_json(TrainConfig(preset="digits", objective=objective))})
    (out / stages.PLAN).write_text(json.dumps({"stages": entries}))
    assert main(["report", str(out)]) == 0
    page = Page((out / "report.html").read_text())
    assert "Stage 1: align" in page.text
    assert "Stage 2: sft" in page.text
    assert "kd+iva → sft" in page.text
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids)), "ids of one figure must not capture another's references"


@pytest.mark.parametrize(
    ("words", "seen"),
    [(["nowhere"], "no run"), ([], "RUN"), (["RUN", "--compare_to", "nowhere"], "no finished run")],
)
def test_bad_input_is_refused(tmp_path: Path, words: list[str], seen: str) -> None:
    run = fake_run(tmp_path / "run", {}, 0.5)
    with pytest.raises(UserError, match=seen):
        main(["report", *(str(run) if word == "RUN" else word for word in words)])


def test_a_failing_report_never_fails_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_html.finish(tmp_path / "nothing")
    run = fake_run(tmp_path / "run", {"student": "gone"}, 0.5)
    report_html.finish(run)
    printed = capsys.readouterr().err
    assert printed.count("no report: ") == 2
    assert "the student is whole" in printed


def test_an_answer_is_what_generate_gives(qwen2_pair: Pair) -> None:
    tokenizer = qwen2_pair.checkpoint.tokenizer
    collate = Collator(tokenizer.spec.pad_token_id)
    for example in qwen2_pair.examples():
        start = example.spans.index("response")
        prompt = dataclasses.replace(example, ids=example.ids[:start], spans=example.spans[:start])
        ours = report_data.answer(qwen2_pair.teacher, prompt, tokenizer, collate, 12)
        pixels = {"pixel_values": torch.from_numpy(np.stack(example.pixels))} if example.pixels else {}
        out = qwen2_pair.teacher.generate(
            input_ids=torch.tensor([prompt.ids]), **pixels, max_new_tokens=12, do_sample=False,
            eos_token_id=list(tokenizer.spec.eos_token_ids), pad_token_id=tokenizer.spec.pad_token_id,
        )[0, start:].tolist()  # fmt: skip
        ended = out[-1] in tokenizer.spec.eos_token_ids
        assert ours == tokenizer.decode(out).strip() + ("" if ended else " …")


def test_a_thumbnail_is_the_picture_the_model_saw(qwen2_pair: Pair) -> None:
    spec = qwen2_pair.checkpoint.image
    picture = digits.sample("test", 3).image
    url = report_data.thumbnail(preprocess.pixels(picture, spec), spec)
    head, _, body = url.partition(",")
    assert head == "data:image/png;base64"
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(body))), np.int16)
    assert abs(shown - np.asarray(preprocess.resize(picture, spec), np.int16)).max() <= 1


def test_two_figures_have_no_id_in_common() -> None:
    metrics = [{"step": s, "loss": 1 / s, "sft": 1 / s, "kd": 0.5} for s in (1, 2, 3)]
    one, other = (report.svg(report.term_panels(metrics), key) for key in ("a", "b"))
    found = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (one, other)]
    assert not found[0] & found[1]
    for text, ids in zip((one, other), found, strict=True):
        assert set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text)) <= ids
    assert "<text" in one
    assert report.term_panels([]) is None
    assert report.score_panels([{"step": 1, "loss": 1.0}]) is None


def test_questions_of_multi_turn_samples_are_the_first_ones(qwen2_pair: Pair) -> None:
    @dataclasses.dataclass
    class Some:
        student: Any
        teacher: Any
        student_source: Any

    pair = Some(qwen2_pair.student, None, qwen2_pair.checkpoint)
    found = report_data.answers(pair, qwen2_pair.examples())  # type: ignore[arg-type]
    sample = digits.sample("train", 3)
    assert (found[2]["question"], found[2]["reference"]) == (sample.question, sample.answer)
    assert found[-1]["image"] is None
    assert all("teacher" not in sample for sample in found)
