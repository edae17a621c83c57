"""Quantise the text file through llama.cpp: its own mixtures and rounding, our importance matrix. No torch."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.gguf_precision import FILE_TYPES, GgufPrecision, block_of, parse_gguf
from export.llama import library, listen
from vlm.console import Progress
from vlm.errors import ArtifactError, CheckpointError, UserError

# a row of the log of a dry run: name, then the type it has and the type it would get
REASON, REST = re.compile(r"(?:failed to quantize: |(?=GGML_ASSERT))(.*)"), re.compile(r"(.*)")
NUMBERED = re.compile(r"\[ *(\d+)/ *(\d+)\]")
PLANNED = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[[^\]]*\], type = +(\S+), size = .*?(?:\((\w+)\))?$", re.MULTILINE)
SCRATCH_BYTES = 256 << 20  # of rows that llama.cpp keeps at once


def quantise(source: Path, target: Path, precision: GgufPrecision, importance: Path | None = None) -> None:
    """Write `source` (floats) with its matrices in other types, in a process of its own.

    llama.cpp ends the process where an assertion fails, and an interrupted call would only stop when it is finished.

    Args:
        importance: file of an importance matrix.

    Raises:
        UserError: a type that needs an importance matrix, and none is given.
        ArtifactError: llama.cpp refused. OSError: the disk is full.
    """
    if precision.needs_importance and importance is None:
        raise UserError(f"{precision.decoder} needs an importance matrix; leave out --no-imatrix")
    job = [str(source), str(target), precision.text(), str(importance or "")]
    log: list[str] = []
    command = [sys.executable, "-m", "export.gguf_quantise", *job]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        try:
            _follow(child, log, f"quantise to {precision.decoder}")
        except BaseException:
            child.kill()
            raise
    if child.returncode or not target.is_file():
        target.unlink(missing_ok=True)  # llama.cpp leaves a broken file behind
        _raise_if_full(target, "".join(log))
        said = REASON.search("".join(log)) or next((REST.match(line) for line in reversed(log) if line.strip()), None)
        reason = said[1].strip() if said else "no reason given"
        raise ArtifactError(f"llama.cpp could not quantise {source} to {precision.text()} ({reason})")


def _follow(child: subprocess.Popen[str], log: list[str], label: str) -> None:
    """Read the log to its end and show progress by the numbers of the tensors."""
    assert child.stdout is not None
    progress: Progress | None = None
    for line in child.stdout:
        log.append(line)
        if found := NUMBERED.match(line):
            progress = progress or Progress(int(found[2]), label)
            progress.advance(int(found[1]) - progress.done)


def plan(hollow: Path, precision: GgufPrecision, importance: bool) -> dict[str, str]:
    """GGML type every tensor of a file would get; the file needs no data.

    Raises:
        ArtifactError: the installed llama.cpp plans nothing, or says so in another form.
    """
    heard: list[str] = []
    ones = {"output.weight": np.ones(1, np.float32)} if importance else None
    with listen(heard.append):
        status = _run(hollow, hollow.with_suffix(".none"), precision, ones, dry=True)
    log = "".join(heard)
    found = {name: (after or before).upper() for name, before, after in PLANNED.findall(log)}
    if status or not found:
        raise ArtifactError(f"llama.cpp could not plan {precision.text()} ({log.strip().splitlines()[-1:]})")
    return found


def check_tables(precision: GgufPrecision, hidden: int, tied: bool) -> None:
    """llama.cpp aborts the process on these, so they are refused first.

    Raises:
        CheckpointError: rows that do not divide into blocks, or two kinds for one tied tensor.
    """
    if tied and precision.embed and precision.head and precision.embed != precision.head:
        raise CheckpointError(
            f"embed={precision.embed} and head={precision.head}: this student has one tensor for both; give one of them"
        )
    for part in ("embed", "head"):
        kind = getattr(precision, part)
        if kind and hidden % block_of(kind.upper().removesuffix("_M")):
            raise CheckpointError(
                f"{part}={kind} needs rows of a multiple of {block_of(kind.upper())}, this student has {hidden}; use {part}=q8_0 or f16"
            )


def _run(
    source: Path,
    target: Path,
    precision: GgufPrecision,
    importance: Mapping[str, npt.NDArray[np.float32]] | None,
    dry: bool,
) -> int:
    lib, _ = library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[precision.decoder][0]
    params.nthread = os.cpu_count() or 1
    params.dry_run = dry
    params.max_buf_size = SCRATCH_BYTES
    table = precision.embed or (precision.head if _tied(source) else None)
    if table:
        params.token_embedding_type = _type_number(table)
    if precision.head:
        params.output_tensor_type = _type_number(precision.head)
    keep: list[Any] = []
    if importance:
        entries = (lib.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            array = np.ascontiguousarray(values, np.float32)
            keep += [array, name.encode()]
            entry.name, entry.size = keep[-1], array.size
            entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    return int(lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)))


def _tied(path: Path) -> bool:
    from export.gguf_file import read_tensors

    return "output.weight" not in read_tensors(path)


def _type_number(kind: str) -> int:
    import gguf

    return int(gguf.GGMLQuantizationType[kind.upper()])


def _raise_if_full(target: Path, log: str) -> None:
    """llama.cpp reports every failed write as `basic_ios::clear`; a full disk is the usual one."""
    if "basic_ios" in log or "iostream" in log or shutil.disk_usage(target.parent).free < 1 << 20:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))


def main(job: Sequence[str]) -> int:
    """The process that does the work: source, target, precision, importance matrix or nothing. The log goes to stdout."""
    from export.imatrix import load

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    source, target, precision, importance = job

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    weights = load(Path(importance)).weights() if importance else None
    with listen(show):
        return _run(Path(source), Path(target), parse_gguf(precision), weights, dry=False)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
