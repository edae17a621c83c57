"""TensorRT: says clearly what is missing. The exporter writes plans; running their engines is not in this version."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from runtime.options import LoadOptions
from runtime.source import need_package
from vlm.errors import MissingPiece
from vlm.manifest import Manifest, check_files


def open_tensorrt(root: Path, options: LoadOptions, manifest: Manifest) -> NoReturn:  # noqa: ARG001 - one signature for all
    """Check the artefact's files, then refuse.

    Raises:
        ArtifactError: a file is missing or altered. MissingPiece: always.
    """
    check_files(root, manifest)
    need_package("tensorrt", "tensorrt")
    raise MissingPiece(
        "this version builds TensorRT engines but does not run them; run the same student with "
        "`python -m export --target onnx` and `--backend onnx --device cuda`"
    )
