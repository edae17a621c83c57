"""The real commands in processes of their own: answers, and one line with exit code 2 for every kind of bad input."""

from __future__ import annotations

import json
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from PIL import Image as Pillow

from runtime.cli import main
from vlm import digits
from vlm.console import run_command

from .conftest import Command


def one_line(result: subprocess.CompletedProcess[str], exit_code: int = 2) -> str:
    lines = result.stderr.strip().splitlines()
    assert result.returncode == exit_code, result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def inside(capsys: pytest.CaptureFixture[str]) -> Command:
    """The same command without a process of its own, for cases that differ in nothing but their arguments."""

    def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        with pytest.raises(SystemExit) as end:
            run_command(main, arguments)
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(end.value.code or 0), out, err)

    return run


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "digits.png"
    digits.sample("test", 0).image.save(path)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(path: Path, side: int = 10_000) -> Path:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_ask_streams_the_answer_and_ends_with_json(command: Command, gguf_artifact: Path, png: Path) -> None:
    arguments = ["ask", gguf_artifact, "--image", png, "--image", png, "Read it.", "--max-new-tokens", "5", "--json"]
    result = command(["runtime", *arguments])
    assert result.returncode == 0, result.stderr
    *text, last = result.stdout.splitlines()
    value = json.loads(last)
    assert "\n".join(text) == value["text"]
    assert value["tokens"] == 5
    assert value["prompt_tokens"] > 32
    assert sum(value["stages_ms"].values()) == pytest.approx(value["e2el_ms"], rel=0.01)
    assert {"image_decode", "preprocess", "vision_encode", "prefill", "decode"} <= set(value["stages_ms"])
    assert value["ttft_ms"] > 0
    assert value["tpot_ms"] > 0
    assert "stages in ms" in result.stderr


def test_ask_without_image_or_json(command: Command) -> None:
    result = command(["runtime", "ask", "anything", "hi", "--backend", "fake"])
    assert (result.returncode, result.stdout) == (0, "7\n")


def test_same_seed_same_answer(command: Command, gguf_artifact: Path, png: Path) -> None:
    arguments = [
        "runtime",
        "ask",
        gguf_artifact,
        "--image",
        png,
        "Hi",
        "--temperature",
        "1.5",
        "--max-new-tokens",
        "12",
    ]
    answers = [command([*arguments, "--seed", seed]).stdout for seed in ("1", "1", "2")]
    assert answers[0] == answers[1] != answers[2]


def test_eval_prints_score_and_interval(command: Command, onnx_artifact: Path, tmp_path: Path) -> None:
    given = [
        "runtime",
        "eval",
        onnx_artifact,
        "--task",
        "digits",
        "--samples",
        "3",
        "--out",
        tmp_path / "run",
        "--json",
    ]
    result = command(given)
    assert result.returncode == 0, result.stderr
    value = json.loads(result.stdout.splitlines()[-1])
    assert (value["task"], value["n"]) == ("digits", 3)
    assert 0 <= value["interval"][0] <= value["score"] <= value["interval"][1] <= 1


def test_eval_answers_of_onnx_equal_pytorchs(
    inside: Command, student: Path, onnx_artifact: Path, tmp_path: Path
) -> None:
    runs = []
    for model in (student, onnx_artifact):
        given = ["eval", str(model), "--samples", "8", "--max-new-tokens", "8", "--out", str(tmp_path / model.name)]
        assert inside(given).returncode == 0
        runs.append([json.loads(line) for line in (tmp_path / model.name / "samples.jsonl").read_text().splitlines()])
    answers = [[(row["id"], row["prediction"], row["score"]) for row in run] for run in runs]
    assert answers[0] == answers[1]
    value = json.loads(
        inside(
            ["compare", str(tmp_path / student.name), str(tmp_path / onnx_artifact.name), "--json"]
        ).stdout.splitlines()[-1]
    )
    assert (value["p"], value["changed"]) == (1.0, [])


def test_doctor_names_the_command_that_mends_each_gap(command: Command) -> None:
    result = command(["runtime", "doctor", "--json"])
    assert result.returncode == 0, result.stderr
    value = json.loads(result.stdout.splitlines()[-1])
    assert {finding["status"] for finding in value["findings"]} <= {"ok", "missing"}
    for finding in value["findings"]:
        mends = ("pip install 'align-edge[", "sudo chmod", "nothing to install")
        assert (finding["status"] == "missing") == finding["mend"].startswith(mends)
    assert value["environment"]["packages"]["numpy"]


@pytest.mark.parametrize("name", ["", "ask", "profile", "compare", "eval", "serve", "doctor"])
def test_help_has_an_example(inside: Command, name: str) -> None:
    result = inside([*filter(None, [name]), "--help"])
    assert result.returncode == 0
    assert f"example:\n  python -m runtime {name}" in result.stdout


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "no image at"),
        ("directory", "is a directory"),
        ("truncated", "is damaged"),
        ("bomb", "megapixels"),
        ("text", "is not a readable image"),
        ("empty", "is not a readable image"),
    ],
)
def test_bad_images(command: Command, tmp_path: Path, png: Path, case: str, message: str) -> None:
    path = tmp_path / f"{case}.png"
    if case == "directory":
        path.mkdir()
    elif case == "truncated":
        Pillow.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:500])
    elif case == "bomb":
        bomb(path)
    elif case in ("text", "empty"):
        path.write_text("hello" * (case == "text"))
    line = one_line(command(["runtime", "ask", "x", "--backend", "fake", "--image", png, "--image", path, "hi"]))
    assert message in line
    assert str(path) in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "x", "hi", "--backend", "nope"], "unknown backend 'nope'; known: auto, torch, onnx, gguf"),
        (["ask", "nowhere", "hi"], "nowhere is not a directory"),
        (["ask", "tests", "hi"], "tests is not an artefact"),
        (["ask", "tests", "hi", "--backend", "torch"], "has no config.json"),
        (["ask", "x"], "required: question"),
        (["ask", "x", "hi", "--max-new-tokens", "0", "--backend", "fake"], "max_new_tokens is 0"),
        (["ask", "x", "hi", "--threads", "0"], "threads is 0"),
        (["ask", "x", "hi", "--device", "tpu"], "device is 'tpu'"),
        (["ask", "x", "hi", "--context", "2", "--backend", "fake"], "needs 3 tokens of context, the model has 2"),
        (["eval", "x", "--task", "nope"], "unknown task 'nope'"),
        (["profile", "x", "--requests", "0"], "requests is 0"),
        (["profile", "x", "--slo", "fast"], "slo is 'fast'"),
        (["serve", "x", "--backend", "fake", "--host", "0.0.0.0"], "open to other machines; give --api-key"),
        (["serve", "x", "--backend", "fake", "--port", "70000"], "cannot listen on 127.0.0.1:70000"),
        (["serve", "nowhere", "--port", "0", "--max-images", "0"], "images is 0"),
        (["ask", "http://127.0.0.1:1", "hi"], "nothing answers at http://127.0.0.1:1"),
        (["profile", "nowhere"], "nowhere is not a directory"),
        (["profile", "x", "--image", "nowhere.png"], "no image at nowhere.png"),
        ([], "COMMAND"),
    ],
)
def test_wrong_arguments(inside: Command, arguments: list[str], message: str) -> None:
    assert message in one_line(inside(arguments))


def test_context_overflow_is_one_line(command: Command, onnx_artifact: Path, png: Path) -> None:
    line = one_line(command(["runtime", "ask", onnx_artifact, "--image", png, "Read it.", "--context", "20"]))
    assert "tokens of context, the model has 20" in line


@pytest.mark.parametrize("token", ["<image>", "<|im_end|>"])
def test_reserved_token_in_the_question_is_refused(command: Command, onnx_artifact: Path, token: str) -> None:
    line = one_line(command(["runtime", "ask", onnx_artifact, f"what is {token}\n?"]))
    assert f"reserved token {token!r}" in line


def test_backend_of_another_format_is_refused(command: Command, onnx_artifact: Path) -> None:
    for backend in ("gguf", "torch"):
        line = one_line(command(["runtime", "ask", onnx_artifact, "hi", "--backend", backend]))
        assert "use `--backend auto`" in line


@pytest.mark.parametrize("name", ["onnx/decoder_model_merged.onnx_data", "tokenizer.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_damaged_files_are_refused_by_name(command: Command, damaged: Path, name: str, harm: str) -> None:
    path = damaged / name
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif harm == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    line = one_line(command(["runtime", "ask", damaged, "hi"]))
    assert str(path) in line
    assert {"flip": "altered", "truncate": "truncated", "remove": "missing"}[harm] in line


def test_unverified_artefacts_answer_with_a_warning(command: Command, damaged: Path) -> None:
    manifest = damaged / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "verified": False}))
    result = command(["runtime", "ask", damaged, "hi", "--max-new-tokens", "2"])
    assert result.returncode == 0
    assert "did not pass its checks at export" in result.stderr


def test_tensorrt_says_what_is_missing(command: Command, damaged: Path) -> None:
    manifest = damaged / "manifest.json"
    value = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**value, "format": "tensorrt"}))
    line = one_line(command(["runtime", "ask", damaged, "hi"]), exit_code=3)
    assert "tensorrt" in line
