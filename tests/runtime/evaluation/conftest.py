"""The scripted model in place of a loaded one."""

from __future__ import annotations

import pytest

from runtime import evaluate as command_module

from .scripted import Scripted


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    scripted = Scripted()
    monkeypatch.setattr(command_module, "load", scripted)
    return scripted
