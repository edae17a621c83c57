"""`scripts/check-gpu` on the stand-ins: its arithmetic runs, and a fault in an engine makes it say so."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export import build_engine
from scripts import check_gpu
from tests.fake_tensorrt import Context, Fake
from vlm import engine_key
from vlm.errors import MissingPiece

ORIN = {"gpu": "Orin", "sm": "8.7", "cuda": "12.6", "l4t": "36.4.3"}


@pytest.fixture
def root(exported: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fake = Fake("10.3.0")
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module)
    monkeypatch.setattr("runtime.cuda.load_cudart", lambda: fake.cudart)
    monkeypatch.setattr(engine_key, "device_facts", lambda: ORIN)
    monkeypatch.setattr(engine_key, "free_memory", lambda: (8 << 30, 4 << 30))
    monkeypatch.setattr(check_gpu, "ROUNDS", 1)
    made: Path = exported("tensorrt", "fp16", "siglip", "llama").copy_to(tmp_path / "made")
    build_engine.build(made)
    return made


def test_sound_engines_hold(root: Path) -> None:
    found = check_gpu.check_artefact(root)
    assert found["failures"] == []
    assert found["graphs"]["recorded"] == [128]
    assert found["graphs"]["n"] == 1
    assert set(found["profiles"]["images"]) == set(range(1, 8))
    assert found["profiles"]["context"] == 1024


def test_a_faulty_engine_is_found(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bind = Context.set_tensor_address

    def swapped(self: Context, name: str, address: int) -> bool:
        keys = name.startswith("past_k.")
        return bind(self, name.replace("past_k.", "past_v.") if keys else name.replace("past_v.", "past_k."), address)

    monkeypatch.setattr(Context, "set_tensor_address", swapped)
    assert any("decode" in line for line in check_gpu.check_artefact(root)["failures"])


def test_without_a_gpu_nothing_is_pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing() -> dict[str, str]:
        raise engine_key.Missing("no CUDA driver")

    monkeypatch.setattr(engine_key, "device_facts", missing)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingPiece, match=r"nothing was checked.*no CUDA driver"):
        check_gpu.main([])
    assert list(tmp_path.iterdir()) == []
