"""Hashes and atomic writes. Stdlib only: a board that only verifies needs nothing else."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.errors import CheckpointError, UserError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint directory.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; point at a directory saved with save_pretrained") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(f"{path} is not valid JSON; save the checkpoint again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected an object; save the checkpoint again")
    return value


def sha256_file(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_chunks(path)


def _sha256_chunks(path: Path) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fsync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a whole file or nothing: temporary name in the same folder, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


@contextlib.contextmanager
def atomic_dir(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `target`; on success it becomes `target`, on any failure it vanishes.

    A directory left by a killed process (`.NAME.partial-*`) never carries the final name and is removed by the
    next call for the same target. A link stays: what it points at is replaced, on the file system it lies on.
    """
    target = target.resolve()
    parent = target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for stale in parent.glob(f".{glob.escape(target.name)}.partial-*"):
            shutil.rmtree(stale, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=parent))
    except OSError as error:
        raise UserError(f"cannot write to {parent}: {error.strerror}; choose another folder with --out") from error
    try:
        yield work
        _publish(work, target)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if _disk_full(error):
            raise UserError(
                f"disk full while writing {target}; free space or choose another folder with --out"
            ) from error
        raise


def _disk_full(error: BaseException) -> bool:
    """Whether a write found no room; `ndarray.tofile` and safetensors say so in words alone."""
    number = getattr(error, "errno", None)
    words = number is None and re.search(r"\d+ requested and \d+ written|No space left|Disk quota", str(error))
    return number in (errno.ENOSPC, errno.EDQUOT) or bool(words)


def _publish(work: Path, target: Path) -> None:
    for path in sorted(work.rglob("*")):
        if path.is_file():
            fsync_path(path)
    os.chmod(work, 0o755)
    retired: Path | None = None
    if target.exists():
        retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-old-", dir=target.parent))
        os.replace(target, retired / "old")
    os.replace(work, target)
    fsync_path(target.parent)
    if retired is not None:
        shutil.rmtree(retired, ignore_errors=True)
