"""The profiler end to end: scripted backend and tiny real models, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from runtime.api import STAGES
from runtime.compare import Limit, read_profile
from runtime.latency import Timing
from runtime.options import LoadOptions
from runtime.profile_command import parse_slo
from runtime.profiler import Measured, ProfileOptions, Profiler, Session
from runtime.report import report
from runtime.runner import ProcessRunner, turn
from runtime.tables import csv_text, jsonl, markdown, mbu_text, tables
from runtime.workload import Workload, make_workload
from vlm.errors import MissingPiece, UserError

from .conftest import Command

WORK = Workload("digits", 0)


@pytest.fixture(scope="module")
def two_fakes() -> list[Measured]:
    options = ProfileOptions(backend="fake", requests=4, output_tokens=5, extra=2)
    return Profiler(options, WORK).run(["first", "second"]).results


def test_requests_take_turns(two_fakes: list[Measured]) -> None:
    first, second = two_fakes
    order = sorted([(t, "a") for t in first.started_s] + [(t, "b") for t in second.started_s])
    assert "".join(name for _, name in order) == "abababab"


def test_no_image_comes_twice_to_one_model(two_fakes: list[Measured]) -> None:
    for result in two_fakes:
        assert len(set(result.digests)) == len(result.digests) == result.warm_runs + 4 + 4 * 2
    assert two_fakes[0].digests[-12:] == two_fakes[1].digests[-12:], "both models must see the same images"


def test_warm_up_is_bounded_and_kept_apart(two_fakes: list[Measured]) -> None:
    for result in two_fakes:
        assert 6 <= result.warm_runs <= 20
        assert result.cold_ttft_ms is not None
        assert len(result.timings) == 4


def test_profile_json_of_a_scripted_backend(two_fakes: list[Measured]) -> None:
    options = ProfileOptions(backend="fake", requests=4, output_tokens=5)
    value = json.loads(json.dumps(report(Session(two_fakes), options, WORK), allow_nan=False))
    assert (value["schema"], value["valid"]) == ("vlm-profile/1", True)
    assert value["environment"]["host"]["cores"] >= 1
    first = value["profiles"][0]
    assert first["model"]["backend"] == "fake"
    assert first["model"]["artifact_bytes"] is None
    assert (first["energy"], first["roofline"], first["memory_mb"]["peak_device"]) == (None, None, None)
    counts = first["counts"]
    assert (counts["requests"], counts["failed"], counts["cached_tokens"]) == (4, 0, 0)
    assert counts["cancelled"] + counts["not_cancelled"] == 2
    assert first["follow_up"]["n"] == 2
    tokens = first["follow_up"]["prompt_tokens"]
    assert tokens["image"] == tokens["text"]
    assert first["synchronised"]["n"] == 2
    assert first["metrics"]["ttft_ms"]["n"] == 4
    assert first["metrics"]["ttft_ms"]["p90"] is None
    assert first["metrics"]["itl_ms"]["n"] == 4 * 4
    assert first["scenario"]["output_tokens"] == 5
    assert first["memory_mb"]["peak_rss"] > 10
    assert set(first["stages_ms"]) == set(STAGES)
    text = tables(value)
    assert "first" in text
    assert "4 requests are too few" in text


def test_real_models_side_by_side(command: Command, onnx_artifact: Path, gguf_artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    arguments = ["profile", onnx_artifact, gguf_artifact, "--requests", "3", "--output-tokens", "6", "--json"]
    result = command(["runtime", *arguments, "--extra", "1", "--out", out, "--out", tmp_path / "p.html"])
    assert result.returncode == 0, result.stderr
    value = json.loads(out.read_text())
    assert value == json.loads(result.stdout.splitlines()[-1])
    assert value["valid"]
    assert [p["model"]["backend"] for p in value["profiles"]] == ["onnx", "gguf"]
    for profile in value["profiles"]:
        assert profile["scenario"]["image_tokens"] == 16
        assert profile["counts"]["cached_tokens"] == 0
        assert profile["follow_up"]["cached_images"] == 1
        assert profile["roofline"]["mbu_measured"] > 0
        assert profile["warmup"]["cold_load_s"] > 0
        means = [stage["mean"] for stage in profile["stages_ms"].values() if stage]
        assert sum(means) == pytest.approx(profile["metrics"]["e2el_ms"]["mean"], rel=0.01)
    page = (tmp_path / "p.html").read_text()
    assert page.count("<svg") == 4
    assert "http" not in page.replace("http://www.w3.org", "")
    ids = {p["model"]["weights_sha256"] for p in value["profiles"]}
    assert len(ids) == 1, "both were made of one student"


def made_up(prompt_tokens: int, stages: dict[str, float]) -> Timing:
    return Timing(5.0, 2.0, (2.0,), 7.0, stages, prompt_tokens, 4, 0, 2)


def measured(prompt_tokens: int, stages: dict[str, float] | None = None) -> Measured:
    info: dict[str, Any] = dict.fromkeys(
        (
            *("name", "weights_sha256", "backend", "device", "precision", "artifact_bytes", "decoder_weight_bytes"),
            *("lm_head_bytes", "kv_bytes_per_token", "context_length", "threads", "verified"),
        )
    )
    times = [made_up(prompt_tokens, stages or {"prefill": 5.0, "decode": 2.0})]
    return Measured("x", {**info, "name": "x"}, 1.0, timings=times, started_s=[0.0], memory_method="m")


def test_different_work_is_not_comparable() -> None:
    options = ProfileOptions(requests=1)
    assert report(Session([measured(20), measured(20)]), options, WORK)["valid"]
    value = report(Session([measured(20), measured(21)]), options, WORK)
    assert not value["valid"]
    assert "not comparable: prompt_tokens differs (20, 21)" in value["warnings"]


def test_stages_that_did_not_happen_are_null() -> None:
    profile = report(Session([measured(20)]), ProfileOptions(requests=1), WORK)["profiles"][0]
    assert profile["stages_ms"]["vision_encode"] is None
    assert profile["stages_ms"]["prefill"]["p50"] == 5.0
    assert profile["memory_mb"]["peak_rss"] is None
    assert profile["throughput"]["decode_tok_s"] == pytest.approx(500.0)


def test_unsettled_warm_up_is_a_warning() -> None:
    result = measured(20)
    result.warm_runs, result.warm_cv = 20, 0.4
    assert "varied by 40 %" in report(Session([result]), ProfileOptions(requests=1), WORK)["warnings"][0]


def test_a_dead_model_process_is_reported() -> None:
    runner = ProcessRunner("fake", "fake", LoadOptions())
    try:
        os.kill(runner._child.pid, signal.SIGKILL)
        with pytest.raises(MissingPiece, match="ended with status -9"):
            runner.ask({"turns": [turn("user", "x")], "output_tokens": 2, "reuse": "none", "sync": "none"})
    finally:
        runner.close()


def test_faults_of_the_artefact_reach_the_caller(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a directory"):
        Profiler(ProfileOptions(requests=1), WORK).run([str(tmp_path / "nothing")])


def test_formats_this_machine_lacks_are_left_out_by_name(damaged: Path, gguf_artifact: Path) -> None:
    manifest = damaged / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": "tensorrt"}))
    options = ProfileOptions(requests=1, output_tokens=2, extra=0)
    session = Profiler(options, WORK).run([str(damaged), str(gguf_artifact)])
    assert [result.artifact for result in session.results] == [str(gguf_artifact)]
    value = report(session, options, WORK)
    assert "tensorrt" in value["skipped"][str(damaged)]
    assert any("was left out" in warning for warning in value["warnings"])
    with pytest.raises(MissingPiece, match="tensorrt"):
        Profiler(options, WORK).run([str(damaged)])


def test_answers_shorter_than_asked_are_refused() -> None:
    options = ProfileOptions(backend="fake", requests=1, output_tokens=5000, load=LoadOptions(context=64))
    with pytest.raises(UserError, match="of 5000 output tokens"):
        Profiler(options, WORK).run(["fake"])


def test_workload_repeats_by_seed_and_differs_by_index(tmp_path: Path) -> None:
    from PIL import Image as Pillow

    assert WORK.png(3) == WORK.png(3) != WORK.png(4)
    assert Workload("digits", 1).png(3) != WORK.png(3)
    Pillow.new("RGB", (30, 20), (200, 100, 50)).save(tmp_path / "photo.jpg")
    work = make_workload(tmp_path / "photo.jpg", 0)
    assert (work.name, work.size) == ("photo.jpg + noise", (30, 20))
    assert work.png(0) != work.png(1)


@pytest.mark.parametrize("options", [{"requests": 0}, {"output_tokens": 1}, {"extra": -1}, {"slo": (("speed", 1),)}])
def test_scenarios_without_a_result_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        ProfileOptions(**options)


def profile_file(path: Path, ttft: list[float]) -> Path:
    info = {**measured(20).info, "backend": "onnx", "precision": "fp32", "device": "cpu", "threads": 1}
    times = [Timing(t, 2.0, (2.0,), t + 2, {"prefill": t, "decode": 2.0}, 20, 4, 0, 2) for t in ttft]
    result = Measured(
        "x", {**info, "name": path.stem}, 1.0, timings=times, started_s=[float(i) for i in range(len(ttft))]
    )
    path.write_text(json.dumps(report(Session([result]), ProfileOptions(requests=len(ttft)), WORK)))
    return path


def test_compare_gives_ratios_and_gates_beyond_noise(command: Command, tmp_path: Path) -> None:
    before = profile_file(tmp_path / "a.json", [10.0, 10.1, 9.9] * 10)
    slower = profile_file(tmp_path / "b.json", [12.0, 12.1, 11.9] * 10)
    noisy = profile_file(tmp_path / "c.json", [5.0, 12.0, 30.0] * 3)
    result = command(["runtime", "compare", before, slower, "--json"])
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert [row["metric"] for row in rows] == ["ttft_ms", "tpot_ms", "e2el_ms"]
    assert rows[0]["ratio"] == pytest.approx(1.2)
    assert rows[0]["interval"][0] > 1.1
    failed = command(["runtime", "compare", before, slower, "--fail-if", "ttft_ms.p90+5%"])
    assert failed.returncode == 1
    failed = command(["runtime", "compare", before, slower, "--fail-if", "ttft_ms+5%"])
    assert "ttft_ms is 20.0 % slower" in failed.stderr
    assert command(["runtime", "compare", before, noisy, "--fail-if", "ttft_ms+5%"]).returncode == 0


@pytest.mark.parametrize("text", ["ttft_ms", "ttft_ms+5", "speed+5%", "ttft_ms.p75+5%"])
def test_compare_limits_are_checked(text: str) -> None:
    with pytest.raises(UserError, match="METRIC"):
        Limit.parse(text)


def test_compare_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    for name in ("x.json", "nowhere.json"):
        with pytest.raises(UserError, match="profile --out"):
            read_profile(tmp_path / name)


def test_requests_come_out_as_rows(two_fakes: list[Measured]) -> None:
    options = ProfileOptions(backend="fake", requests=4, output_tokens=5)
    value = report(Session(two_fakes), options, WORK)
    lines = [json.loads(line) for line in jsonl(value).splitlines()]
    assert len(lines) == 8
    assert lines[0]["artifact"] == "first"
    assert lines[0]["image_decode_ms"] > 0
    head, *rows = csv_text(value).splitlines()
    assert head.startswith("artifact,model,backend,dtype,request,started_s,ttft_ms")
    assert len(rows) == 8
    assert "| artefact |" in markdown(value)


def test_limits_on_latency_are_read_by_name() -> None:
    assert parse_slo("ttft_ms=200, tpot_ms=5.5") == (("ttft_ms", 200.0), ("tpot_ms", 5.5))
    for text in ("ttft_ms", "ttft_ms=x", "ttft_ms=1;tpot_ms=2"):
        with pytest.raises(UserError, match="write ttft_ms=200"):
            parse_slo(text)


def test_out_needs_a_known_ending(command: Command, tmp_path: Path) -> None:
    result = command(["runtime", "profile", "x", "--backend", "fake", "--out", tmp_path / "p.pdf"])
    assert result.returncode == 2
    assert "known: .json, .jsonl, .csv, .md, .html" in result.stderr


def test_a_profile_that_lacks_a_section_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "half.json"
    path.write_text('{"schema": "vlm-profile/1", "valid": true}')
    with pytest.raises(UserError, match="lacks 'environment'"):
        read_profile(path)


def test_weights_in_the_cache_have_no_share_of_memory_speed() -> None:
    assert mbu_text({"mbu_measured": 1.66, "fits_cache": True}) == "in cache"
    assert mbu_text({"mbu_measured": 0.42, "fits_cache": False}) == "42 %"
    assert mbu_text({"mbu_measured": None}) == "-"
