"""Artefacts are read strictly, published whole, and refused by name when anything changed."""

from __future__ import annotations

import dataclasses
import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlm import files, manifest
from vlm.errors import ArtifactError, UserError


def write_sample(root: Path) -> manifest.Manifest:
    root.mkdir(parents=True, exist_ok=True)
    (root / "a.bin").write_bytes(b"0123456789" * 100)
    value = manifest.Manifest(
        format="onnx",
        created="2026-01-01T00:00:00+00:00",
        tools={"onnx": "1"},
        source={"sha256": "x"},
        files=(manifest.file_entry(root, root / "a.bin", "decoder"),),
        io={},
        precision={},
        image={},
        chat={},
        model={},
        pair_id="p",
        golden=(manifest.Golden("golden.png", "what?", (1, 2)),),
    )
    manifest.write_manifest(root, value)
    return value


def test_round_trip(tmp_path: Path) -> None:
    value = write_sample(tmp_path)
    read = manifest.read_manifest(tmp_path)
    assert read == value
    manifest.check_files(tmp_path, read)
    assert read.path_of(tmp_path, "decoder") == tmp_path / "a.bin"
    with pytest.raises(ArtifactError, match="mmproj"):
        read.path_of(tmp_path, "mmproj")


def test_every_single_byte_flip_and_truncation_is_named(tmp_path: Path) -> None:
    value = write_sample(tmp_path)
    original = (tmp_path / "a.bin").read_bytes()
    for position in (0, 500, 999):
        damaged = bytearray(original)
        damaged[position] ^= 1
        (tmp_path / "a.bin").write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"a\.bin was altered"):
            manifest.check_files(tmp_path, value)
    (tmp_path / "a.bin").write_bytes(original[:-1])
    with pytest.raises(ArtifactError, match=r"a\.bin has 999 bytes"):
        manifest.check_files(tmp_path, value)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(ArtifactError, match=r"a\.bin is missing"):
        manifest.check_files(tmp_path, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "vlm-artifact/9"}, "schema"),
        ({"surprise": 1}, "surprise"),
        ({"pair_id": None}, None),
        ({"format": "exe"}, "format"),
        ({"files": [{"path": "x"}]}, "damaged"),
    ],
)
def test_strange_manifests_are_refused(tmp_path: Path, change: dict[str, object], message: str | None) -> None:
    write_sample(tmp_path)
    value = json.loads((tmp_path / manifest.NAME).read_text())
    if message is None:
        del value["pair_id"]
        message = "pair_id"
    else:
        value.update(change)
    (tmp_path / manifest.NAME).write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match=message):
        manifest.read_manifest(tmp_path)


def test_no_artefact_and_broken_json(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not an artefact"):
        manifest.read_manifest(tmp_path)
    (tmp_path / manifest.NAME).write_text('{"schema": "vlm-arti')
    with pytest.raises(ArtifactError, match="not JSON"):
        manifest.read_manifest(tmp_path)


def test_a_listed_path_outside_the_artefact_is_refused(tmp_path: Path) -> None:
    value = write_sample(tmp_path / "art")
    (tmp_path / "secret").write_text("x")
    outside = dataclasses.replace(value, files=(manifest.FileEntry("../secret", "decoder", 1, "0"),))
    with pytest.raises(ArtifactError, match="outside"):
        manifest.check_files(tmp_path / "art", outside)


def test_atomic_dir_publishes_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with files.atomic_dir(target) as work:
        (work / "one").write_text("1")
        assert not target.exists()
    assert (target / "one").read_text() == "1"
    with pytest.raises(ZeroDivisionError), files.atomic_dir(target) as work:
        (work / "two").write_text(str(1 // 0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (target / "one").exists()
    with files.atomic_dir(target) as work:
        (work / "three").write_text("3")
    assert [path.name for path in target.iterdir()] == ["three"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_atomic_dir_writes_where_a_link_points(tmp_path: Path) -> None:
    """The folder behind it may lie on another file system, where nothing can be moved from here."""
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    with files.atomic_dir(tmp_path / "link") as work:
        assert work.parent == tmp_path / "disk"
        (work / "one").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "real" / "one").read_text() == "1"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="disk full"), files.atomic_dir(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_artefact_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom vlm.files import atomic_dir\n"
        "with atomic_dir(Path(sys.argv[1])) as work:\n"
        "    (work / 'half').write_text('x')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    target = tmp_path / "out"
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code, str(target)], cwd=root, check=False)
    assert done.returncode == -9
    assert not target.exists()
    assert any(path.name.startswith(".out.partial-") for path in tmp_path.iterdir())
    with files.atomic_dir(target) as work:
        (work / "whole").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_write_atomic_keeps_the_old_file_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    files.write_atomic(path, "old")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(OSError, match="full"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
