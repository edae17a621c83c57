"""Long writes meet full disks, kills and read-only targets: nothing half-done verifies, and the next run goes on."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import export
import vlm
from export import to_onnx, to_tensorrt
from export.artefact import build
from export.cli import main
from export.options import ExportOptions
from export.parity import GATES
from export.precision import parse_precision
from export.stages import Stages, code_sha256
from export.student import open_student
from export.trt_precision import parse_trt_precision
from export.verify import verify
from tests.tiny import make_student
from vlm.errors import UserError
from vlm.load import open_checkpoint
from vlm.manifest import read_manifest

QUICK = ["--target", "onnx", "--samples", "0", "--no-ablation"]


def test_a_stage_is_made_once_and_again_when_its_key_or_its_files_change(tmp_path: Path) -> None:
    calls = []

    def make(folder: Path) -> list[tuple[Path, str]]:
        calls.append(folder)
        (folder / "onnx").mkdir(exist_ok=True, parents=True)
        (folder / "onnx" / "a").write_text("content")
        return [(folder / "onnx" / "a", "role")]

    (tmp_path / "stages").mkdir()
    stages = Stages(tmp_path / "stages")

    def ask(key: Any, root: str) -> None:
        files = stages.files("graph", key, tmp_path / root, make)
        assert files == [(tmp_path / root / "onnx" / "a", "role")]
        assert files[0][0].read_text() == "content"

    ask({"k": 1}, "one")
    ask({"k": 1}, "two")
    assert len(calls) == 1
    ask({"k": 2}, "three")
    assert len(calls) == 2
    kept = next((tmp_path / "stages").glob("graph-*/onnx/a"))
    kept.unlink()
    kept.write_text("damaged")
    ask({"k": 2}, "four")
    assert len(calls) == 3


class Asked(Stages):
    """Remembers the first key it is asked for, and stops there."""

    def files(self, name: str, key: Any, *_rest: Any, **_more: Any) -> list[Any]:
        raise InterruptedError(json.dumps(key, sort_keys=True))


def _key(student: Any, directory: Path, target: Any, llama_cpp: Path | None = None) -> str:
    student = dataclasses.replace(student, checkpoint=open_checkpoint(directory))
    run = ExportOptions(
        target, directory, directory / "out", "f16" if target == "gguf" else "fp32", llama_cpp=llama_cpp
    )
    storage = to_tensorrt.TrtStorage(parse_trt_precision("fp32")) if target == "tensorrt" else None
    nothing: Any = None
    with pytest.raises(InterruptedError) as caught:
        build(student, nothing, run, directory, storage, Asked(None))
    return str(caught.value)


FILES = (
    "config.json",
    "vlm.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "chat_template.jinja",
)


@pytest.mark.parametrize("target", ["onnx", "tensorrt", "gguf"])
def test_whatever_a_student_says_of_itself_is_in_the_key(
    students: Callable[..., Any], tmp_path: Path, target: str
) -> None:
    """After a correction of any of its files nothing is taken from the run before."""
    opened = students("siglip", "qwen2")
    directory = Path(shutil.copytree(opened.directory, tmp_path / "student"))
    keys = [_key(opened.student, directory, target), _key(opened.student, directory, target)]
    assert keys[0] == keys[1]
    for name in FILES:
        (directory / name).write_text((directory / name).read_text() + "\n")
        keys.append(_key(opened.student, directory, target))
    assert len(set(keys)) == 1 + len(FILES)


@pytest.mark.parametrize("package", [export, vlm])
def test_the_text_of_both_packages_is_in_the_key(monkeypatch: pytest.MonkeyPatch, package: ModuleType) -> None:
    """An upgrade between an interrupted export and its next run may read a student differently."""
    before, read = code_sha256(), Path.read_bytes
    folder = Path(package.__file__ or "").parent
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path == folder / "__init__.py"))
    assert code_sha256() != before


def test_another_converter_is_in_the_key(students: Callable[..., Any], tmp_path: Path) -> None:
    opened = students("siglip", "qwen2")
    checkout = tmp_path / "llama.cpp"
    for name in ("convert_hf_to_gguf.py", "conversion/base.py", "gguf-py/gguf/constants.py"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("a = 1")
    keys = {_key(opened.student, opened.directory, "gguf", checkout) for _ in range(2)}
    for name in ("convert_hf_to_gguf.py", "conversion/base.py", "gguf-py/gguf/constants.py"):
        (checkout / name).write_text("a = 2")
        keys.add(_key(opened.student, opened.directory, "gguf", checkout))
    assert len(keys) == 4


@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
def test_a_stage_found_finished_still_tells_what_fell_back(
    students: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    """Rows that fill no block: the card of a resumed export says so as the first run's would have."""
    student = students("siglip", "qwen2", hidden=64, head_dim=16, intermediate=100, layers=1, vision_layers=1).student
    (tmp_path / "stages").mkdir()
    stages = Stages(tmp_path / "stages")

    def section(root: Path) -> dict[str, Any]:
        root.mkdir()
        if target == "onnx":
            return to_onnx.write(student, root, to_onnx.Storage(parse_precision("int4"), "portable"), stages)[2]
        storage = to_tensorrt.TrtStorage(parse_trt_precision("int4"))
        return to_tensorrt.write(student, root, storage, stages, "0" * 16)[2]

    first = section(tmp_path / "one")
    assert first["embed_tokens" if target == "onnx" else "decoder"]["fallbacks"]
    assert "found finished" not in capsys.readouterr().err
    assert section(tmp_path / "two") == first
    assert capsys.readouterr().err.count("found finished") == (3 if target == "onnx" else 2)


def test_full_disk_leaves_the_old_artefact_and_the_rerun_goes_on(
    exported: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = exported("onnx", "fp32", "siglip", "llama")
    out = made.copy_to(tmp_path / "out")
    before = (out / "manifest.json").read_bytes()
    real, limits = to_onnx.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(model: Any, path: Path) -> Any:
        if not path.stem.startswith("decoder"):
            return real(model, path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a short write, as a full disk gives
        try:
            return real(model, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    command = [*QUICK, "--student", str(made.subject.directory), "--out", str(out)]
    monkeypatch.setattr(to_onnx, "save", full)
    with pytest.raises(UserError, match="disk full"):
        main(command)
    assert (out / "manifest.json").read_bytes() == before
    assert sorted(p.name.rsplit("-", 1)[0] for p in (tmp_path / ".out.stages").iterdir()) == [
        "embed_tokens",
        "vision_encoder",
    ]
    monkeypatch.setattr(to_onnx, "save", real)
    capsys.readouterr()
    assert main(command) == 0
    assert "vision_encoder: found finished" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out]
    assert verify(out)["verified"]


KILL = """
import os, signal, sys
from export import to_onnx
real = to_onnx.save
def save(model, path):
    if path.stem.startswith("embed"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return real(model, path)
to_onnx.save = save
from export.cli import main
main(sys.argv[1:])
"""


def test_kill_during_a_write_publishes_nothing(subjects: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*QUICK, "--student", str(subjects("siglip", "llama").directory), "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", KILL, *command], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    with pytest.raises(UserError, match="not an artefact"):
        verify(out)
    assert main(command) == 0
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("target", ["onnx", "gguf"])
def test_read_only_target_is_refused_before_any_work(
    subjects: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # what a read-only mount answers, also to root
    command = ["--target", target, "--student", str(subjects("siglip", "llama").directory)]
    with pytest.raises(UserError, match="cannot write"):
        main([*command, "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_refused_before_any_work(
    subjects: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    command = ["--target", "onnx", "--student", str(subjects("siglip", "llama").directory)]
    with pytest.raises(UserError, match="1000 are free"):
        main([*command, "--out", str(tmp_path / "out")])


def test_dry_run_asks_the_disk_that_is_written_to(
    subjects: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full system disk says nothing about a folder that is mounted elsewhere."""
    usage, asked = shutil.disk_usage(tmp_path), []

    def of(path: Any) -> Any:
        asked.append(Path(path))
        return usage if Path(path) == tmp_path else usage._replace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", of)
    command = ["--target", "gguf", "--precision", "f16", "--student", str(subjects("siglip", "llama").directory)]
    assert main([*command, "--out", str(tmp_path / "o"), "--dry-run"]) == 0
    assert set(asked) == {tmp_path}


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_dry_run_prints_the_files_and_sizes_of_the_real_run(
    exported: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    made = exported("onnx", precision, "siglip", {"fp16": "llama", "int4": "qwen2"}[precision])
    command = [*QUICK, "--precision", precision, "--student", str(made.subject.directory), "--out", str(tmp_path / "o")]
    assert main([*command, "--dry-run", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []
    real = {entry.path: entry.bytes for entry in made.manifest.files}
    said = {entry["path"]: entry["bytes"] for entry in answer["files"]}
    assert set(said) == set(real) | {"README.md", "manifest.json"}
    for path, size in real.items():  # a random student's equal norms are written once, some kilobytes less
        assert said[path] == pytest.approx(size, rel=0.05, abs=6000), path
    assert answer["bytes"] == pytest.approx(sum(real.values()) + said["README.md"] + said["manifest.json"], rel=0.05)
    assert answer["seconds"] > 0
    assert answer["peak_rss_bytes"] > 0


def test_deep_students_are_estimated_from_two_shallow_traces(tmp_path: Path) -> None:
    """Six layers against their full trace."""
    from export.dry_run import _count, _graph_files
    from export.precision import parse_precision
    from export.student import outline
    from tests.tiny import make_student
    from vlm.load import open_checkpoint

    checkpoint = open_checkpoint(make_student(tmp_path / "deep", layers=6, hidden=64, head_dim=16, intermediate=64))
    storage = to_onnx.Storage(parse_precision("int4"), "ort")
    quick, full = _graph_files(checkpoint, storage, 2), _count(outline(checkpoint), storage, 2)
    assert quick.keys() == full.keys()
    for path, size in full.items():
        assert quick[path] == pytest.approx(size, rel=0.02)


def test_auto_precision_raises_the_part_that_fails(
    subjects: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = dataclasses.replace(GATES["onnx", "int4"], cosine=0.99999)
    monkeypatch.setitem(GATES, ("onnx", "int4"), strict)
    out = tmp_path / "out"
    command = [*QUICK, "--precision", "fp32,vision=int4", "--auto-precision", "--out", str(out)]
    assert main([*command, "--student", str(subjects("siglip", "llama").directory)]) == 0
    manifest = read_manifest(out)
    assert manifest.verified
    assert manifest.parity["auto_precision"] == ["fp32,vision=int8"]
    assert manifest.precision["vision_encoder"]["type"] == "int8"
    assert [p.name for p in (out / "onnx").glob("vision*.onnx")] == ["vision_encoder_int8.onnx"]
    assert "int8" in (out / "README.md").read_text()


def test_weights_above_two_gigabytes_are_written_and_read(subjects: Callable[..., Any], tmp_path: Path) -> None:
    """A protobuf ends at 2 GB; external data does not. The values are zeros, so memory stays small."""
    from torch import Tensor, nn, uint8

    from export.declare import BATCH, NEW, GraphSpec, Port
    from export.hold import hold
    from export.linear import gather
    from export.ort import session
    from export.to_onnx import save, trace

    if shutil.disk_usage(tmp_path).free < 4e9:
        pytest.skip("needs 4 GB of disk")
    rows, width = 2200, 1_000_000

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            hold(self, "weight", (rows, width), uint8, lambda: np.zeros((rows, width), np.uint8))

        def forward(self, input_ids: Tensor) -> Tensor:
            return gather(self.weight, input_ids).float()

    spec = GraphSpec(
        (Port("input_ids", "int64", (BATCH, NEW)),), (Port("inputs_embeds", "float32", (BATCH, NEW, width)),)
    )
    path = tmp_path / "big.onnx"
    save(trace(Table(), spec, subjects("siglip", "llama").student), path)
    assert (tmp_path / "big.onnx_data").stat().st_size == rows * width > 2**31
    (got,) = session(path).run(None, {"input_ids": np.array([[rows - 1]], np.int64)})
    assert got.shape == (1, 1, width)
    (tmp_path / "big.onnx_data").unlink()


def test_a_written_graph_lets_go_of_the_student(tmp_path: Path) -> None:
    """torch keeps traced modules; measuring a large student has no room for its weights as well."""
    directory = make_student(tmp_path / "student", vision_layers=1, layers=1)
    student = open_student(open_checkpoint(directory))
    alive = weakref.ref(student.model)
    to_onnx.write(student, tmp_path / "out", to_onnx.Storage(parse_precision("fp16")), Stages(None))
    del student
    gc.collect()
    assert alive() is None


def test_weights_left_in_the_file_are_the_same_weights(
    exported: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions of large float16 graphs widen one matrix at a time; here every graph counts as large."""
    from export import ort

    made = exported("onnx", "fp16", "siglip", "llama")
    opened: list[Path] = []
    original = ort.overridable
    monkeypatch.setattr(ort, "LARGE", 0)
    monkeypatch.setattr(ort, "LOGITS", 20 * 576)  # and the longest prompt goes in as several pieces
    monkeypatch.setattr(ort, "overridable", lambda path: [opened.append(path), original(path)][1])
    again = made.measure_again(made.root)
    assert len(set(opened)) == 3
    assert again.parity["failures"] == []
    for name, case in made.manifest.parity["cases"].items():
        assert again.parity["cases"][name] == pytest.approx(case, abs=2e-3), name
