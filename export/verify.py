"""Is this artefact, on this machine, still what was measured at export? No torch needed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from export import parity
from export.backends import chat_tokenizer, gate_of, open_backend
from export.evidence import load_reference
from export.replay import make_prompt
from vlm.errors import ArtifactError
from vlm.manifest import NAME, check_files, read_manifest
from vlm.preprocess import open_image


@contextlib.contextmanager
def _fitting(root: Path) -> Iterator[None]:
    """A manifest of the right form may still lack a number or hold one of another type."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{root / NAME} is damaged ({type(error).__name__}: {error}); export again") from None


def verify(root: Path) -> dict[str, Any]:
    """Hash every file, then replay the golden samples and compare logits with PyTorch's stored ones.

    Returns: `verified`, `failures` (one line each), `measured`, `format`, `seconds`.

    Raises:
        ArtifactError: a file is missing, truncated, altered, or belongs to another artefact.
        MissingPiece: the runtime library of this format is not installed.
    """
    started = time.monotonic()
    manifest = read_manifest(root)
    check_files(root, manifest)
    with _fitting(root):
        gate, tokenizer = gate_of(manifest), chat_tokenizer(root, manifest)
    found = (
        [] if manifest.verified else [f"at export: {line}" for line in manifest.parity.get("failures") or ["no gate"]]
    )
    expected = load_reference(manifest.path_of(root, "reference"))
    if not manifest.golden or len(expected) != len(manifest.golden):
        raise ArtifactError(f"{root} carries no golden sample to replay; export again")
    with _fitting(root):
        backend = open_backend(root, manifest)
    stop, cases, answers = tokenizer.spec.eos_token_ids, {}, []
    before = manifest.parity.get("golden_ids", [])
    try:
        for index, (golden, wanted) in enumerate(zip(manifest.golden, expected, strict=True)):
            prompt = make_prompt(tokenizer, open_image(root / golden.image), golden.question)
            name = f"golden {index}" if index else "golden"
            cases[name] = parity.replay_case(backend, prompt, wanted)
            ids = parity.golden_answer(backend, prompt, golden.token_ids, cases[name], stop)
            answers.append(tokenizer.decode(ids))
            if ids not in (golden.token_ids, *(tuple(b) for b in before[index : index + 1])):
                found.append(f"{name}: answers {answers[-1]!r}, expected {tokenizer.decode(golden.token_ids)!r}")
    finally:
        backend.close()
    found += parity.all_failures(cases, gate)
    worst = parity.report(gate, cases, {}, found)
    return dict(
        parity.finite(
            {
                "verified": not found,
                "failures": found,
                "artefact": str(root),
                "format": manifest.format,
                "measured": worst["worst"],
                "pooled": worst["pooled"],
                "answer": answers[0],
                "seconds": time.monotonic() - started,
            }
        )
    )
