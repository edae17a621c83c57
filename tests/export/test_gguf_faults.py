"""What happens to GGUF files on their way: swapped, truncated, altered, on a full disk, killed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export import to_gguf
from export.backends import open_backend
from export.cli import main
from export.gguf_source import Weights
from export.student import read_facts
from export.verify import verify
from tests.tiny import make_student
from vlm.errors import ArtifactError, CheckpointError, UserError
from vlm.load import open_checkpoint
from vlm.manifest import file_entry, read_manifest, write_manifest

QUICK = ["--target", "gguf", "--samples", "0"]


def _sign_again(root: Path) -> None:
    """A manifest that agrees with whatever the files are now."""
    manifest = read_manifest(root)
    files = tuple(file_entry(root, root / f.path, f.role) for f in manifest.files)
    write_manifest(root, dataclasses.replace(manifest, files=files))


def test_mmproj_of_another_student_of_the_same_width(exported: Callable[..., Any], tmp_path: Path) -> None:
    """llama.cpp itself compares widths only and would answer nonsense."""
    first = exported("gguf", "f16", "siglip", "qwen3")
    student = make_student(tmp_path / "other", decoder="qwen3", seed=9)
    out = tmp_path / "out"
    assert main([*QUICK, "--precision", "f16", "--student", str(student), "--out", str(out)]) == 0
    root = first.copy_to(tmp_path / "swapped")
    shutil.copyfile(out / "mmproj-f16.gguf", root / "mmproj-f16.gguf")
    with pytest.raises(ArtifactError, match=r"mmproj-f16\.gguf was altered"):
        verify(root)
    _sign_again(root)
    with pytest.raises(ArtifactError, match=r"mmproj-f16\.gguf carries pair id"):
        verify(root)


def test_forged_pair_id_shows_in_the_features(exported: Callable[..., Any], tmp_path: Path) -> None:
    """Even with the right id written into the wrong file, the golden samples tell."""
    first = exported("gguf", "f16", "siglip", "qwen3")
    checkpoint = open_checkpoint(make_student(tmp_path / "other", decoder="qwen3", seed=9))
    weights = Weights(checkpoint.weights)
    root = first.copy_to(tmp_path / "forged")
    origin = to_gguf.origin_of(checkpoint, read_facts(checkpoint), weights, first.manifest.pair_id, "0")
    to_gguf.write_mmproj(origin, weights, root / "mmproj-f16.gguf", "f16")
    _sign_again(root)
    report = verify(root)
    assert not report["verified"]
    assert any("cosine" in line for line in report["failures"])


@pytest.mark.parametrize("role", ["text_gguf", "mmproj"])
@pytest.mark.parametrize("keep", [0.3, 0.999])
def test_truncated_file_that_the_manifest_agrees_with(
    exported: Callable[..., Any], tmp_path: Path, role: str, keep: float
) -> None:
    made = exported("gguf", "f16", "siglip", "qwen3")
    root = made.copy_to(tmp_path / "cut")
    victim = made.manifest.path_of(root, role)
    victim.write_bytes(victim.read_bytes()[: int(victim.stat().st_size * keep)])
    _sign_again(root)
    with pytest.raises(ArtifactError, match=victim.name):
        open_backend(root, read_manifest(root))


def test_altered_metadata_is_named(exported: Callable[..., Any], tmp_path: Path) -> None:
    """One number inside the file: the rotation base."""
    import gguf

    made = exported("gguf", "f16", "siglip", "qwen3")
    root = made.copy_to(tmp_path / "altered")
    path = made.manifest.path_of(root, "text_gguf")
    reader = gguf.GGUFReader(path, "r+")
    field = reader.get_field("qwen3.rope.freq_base")
    field.parts[field.data[0]][0] = 20000.0
    del reader, field
    with pytest.raises(ArtifactError, match=f"{path.name} was altered"):
        verify(root)
    _sign_again(root)
    assert not verify(root)["verified"]


def test_full_disk_keeps_the_old_artefact_and_names_it(
    exported: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text file meets a full disk after the mmproj is finished; the next run goes on from there."""
    made = exported("gguf", "q8_0", "siglip", "qwen3")
    out = made.copy_to(tmp_path / "out")
    before = (out / "manifest.json").read_bytes()
    real = to_gguf.quantise

    def full(source: Path, target: Path, *rest: Any) -> None:
        target.symlink_to("/dev/full")
        real(source, target, *rest)

    command = [*QUICK, "--precision", "q8_0", "--student", str(made.subject.directory), "--out", str(out)]
    monkeypatch.setattr(to_gguf, "quantise", full)
    with pytest.raises(UserError, match="disk full"):
        main(command)
    assert (out / "manifest.json").read_bytes() == before
    assert [p.name.rsplit("-", 1)[0] for p in (tmp_path / ".out.stages").iterdir()] == ["mmproj"]
    monkeypatch.setattr(to_gguf, "quantise", real)
    assert main(command) == 0
    assert list(tmp_path.iterdir()) == [out]
    assert verify(out)["verified"]


KILL = """
import os, signal, sys
from export import gguf_file, to_gguf
real = gguf_file.encode
def encode(block, kind, name):
    if name == "blk.1.ffn_up.weight":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(block, kind, name)
gguf_file.encode = encode
from export.cli import main
main(sys.argv[1:])
"""


def test_kill_in_the_middle_of_a_tensor_publishes_nothing(
    subjects: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [*QUICK, "--precision", "f16", "--student", str(subjects("siglip", "qwen3").directory), "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", KILL, *command], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    with pytest.raises(UserError, match="not an artefact"):
        verify(out)
    assert main(command) == 0
    assert "mmproj: found finished" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out]


def test_a_tensor_nobody_knows_is_named(tmp_path: Path) -> None:
    """A left-over adapter or an unknown bias must not be dropped in silence."""
    from safetensors.numpy import load_file, save_file

    student = make_student(tmp_path / "student", hidden=64, head_dim=16, intermediate=64)
    tensors = load_file(student / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.0.mlp.up_proj.weight"))
    tensors[name.replace("weight", "bias")] = tensors[name][:, 0].copy()
    save_file(tensors, student / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.bias has no place"):
        main([*QUICK, "--precision", "f16", "--student", str(student), "--out", str(tmp_path / "out"), "--dry-run"])


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    student = make_student(tmp_path / "student", hidden=64, head_dim=16, intermediate=64)
    tensors = load_file(student / "model.safetensors")
    del tensors[next(n for n in tensors if n.endswith("encoder.layers.0.mlp.fc2.bias"))]
    save_file(tensors, student / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks vision_tower\.encoder\.layers\.0\.mlp\.fc2\.bias"):
        main([*QUICK, "--precision", "f16", "--student", str(student), "--out", str(tmp_path / "out"), "--dry-run"])


def test_numbers_beyond_float16_are_named(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    student = make_student(tmp_path / "student", hidden=64, head_dim=16, intermediate=64)
    tensors = load_file(student / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.0.mlp.up_proj.weight"))
    tensors[name][0, 0] = 70000.0
    save_file(tensors, student / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"blk\.0\.ffn_up\.weight holds a number beyond float16; use --precision bf16"
    ):
        main([*QUICK, "--precision", "f16", "--student", str(student), "--out", str(tmp_path / "out")])


def test_not_a_checkout(subjects: Callable[..., Any], tmp_path: Path) -> None:
    command = [*QUICK, "--student", str(subjects("siglip", "qwen3").directory), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"holds no convert_hf_to_gguf\.py"):
        main([*command, "--llama-cpp", str(tmp_path)])


CONVERTER = """
import argparse, sys
parser = argparse.ArgumentParser()
parser.add_argument("model"); parser.add_argument("--outfile"); parser.add_argument("--outtype")
given = parser.parse_args()
sys.exit("ERROR: Model Qwen3ForCausalLM is not supported")
"""


def test_a_converter_that_refuses_is_quoted(subjects: Callable[..., Any], tmp_path: Path) -> None:
    checkout = tmp_path / "llama.cpp"
    (checkout / "conversion").mkdir(parents=True)
    (checkout / "convert_hf_to_gguf.py").write_text(CONVERTER)
    (checkout / "conversion" / "__init__.py").write_text("")
    (checkout / "conversion" / "base.py").write_text("class TextModel: pass\nclass ModelBase: pass\n")
    command = [*QUICK, "--precision", "f16", "--student", str(subjects("siglip", "qwen3").directory)]
    with pytest.raises(CheckpointError, match="Qwen3ForCausalLM is not supported"):
        main([*command, "--out", str(tmp_path / "out"), "--llama-cpp", str(checkout)])
    assert not (tmp_path / "out").exists()


def test_dry_run_of_json_names_what_falls_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = make_student(tmp_path / "student", hidden=96, head_dim=24, intermediate=96)
    command = [*QUICK, "--precision", "q5_k_m", "--student", str(student), "--out", str(tmp_path / "out")]
    assert main([*command, "--dry-run", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["fallbacks"]
    assert all(line.startswith("Q5_K -> ") for line in answer["fallbacks"])
    assert main([*command, "--dry-run"]) == 0
    assert "matrices Q5_K -> Q5_1 (rows of 96)" in capsys.readouterr().out
