"""A grammar that llama.cpp works on for hours: cancel and deadline hold, other requests go on, and nothing piles up."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from runtime.api import Constraint, Done, Logits, QueueFull, Sampling
from runtime.backend_fake import FakeBackend, FakeScript
from runtime.engine import Engine
from runtime.images import question
from vlm.errors import UserError

BOUND = Sampling(max_new_tokens=2, grammar="root ::= [a]")


class Slow(FakeBackend):
    """Stands still in the chosen call until it is let go."""

    def __init__(self, where: str) -> None:
        super().__init__(FakeScript(reply="ab"))
        self.where, self.reached, self.go = where, threading.Event(), threading.Event()
        self.closed = False

    def constrain(self, sampling: Sampling) -> Constraint:
        self.enter("constrain")
        return self

    def mask(self, logits_V: Logits) -> Logits:
        self.enter("mask")
        return np.array(logits_V)

    def accept(self, token_id: int) -> None:
        self.enter("accept")

    def enter(self, name: str) -> None:
        if name == self.where:
            self.reached.set()
            assert self.go.wait(60)

    def close(self) -> None:
        self.closed = True


def end(engine: Engine, sampling: Sampling | None = None, **options: Any) -> Done:
    *_, done = engine.generate([question("hi")], sampling or Sampling(max_new_tokens=2), **options)
    assert isinstance(done, Done)
    return done


@pytest.mark.parametrize("where", ["constrain", "mask", "accept"])
def test_cancel_ends_the_request_and_others_go_on(where: str) -> None:
    backend = Slow(where)
    with Engine(backend) as engine:
        stream = engine.generate([question("hi")], BOUND)
        assert backend.reached.wait(60)
        stream.close()
        assert end(engine).text == "ab"
        with pytest.raises(QueueFull, match="grammar of an earlier request"):
            end(engine, BOUND)
        backend.where = ""
        backend.go.set()
        assert engine._shared.patience.finished(60)
        assert end(engine, BOUND).text == "ab"
    assert backend.closed


def test_a_deadline_holds_inside_a_grammar() -> None:
    backend = Slow("mask")
    with Engine(backend) as engine:
        assert end(engine, BOUND, deadline_s=0.2).finish == "deadline"
        backend.go.set()


def test_a_model_that_is_still_read_is_not_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.engine.LEFT_S", 0.0)
    backend = Slow("mask")
    with Engine(backend) as engine:
        stream = engine.generate([question("hi")], BOUND)
        assert backend.reached.wait(60)
        stream.close()
    assert not backend.closed
    backend.go.set()


def test_what_the_call_raises_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Slow("")

    def refuse(*_: Any) -> Constraint:
        raise UserError("not a grammar")

    monkeypatch.setattr(backend, "constrain", refuse)
    with Engine(backend) as engine, pytest.raises(UserError, match="not a grammar"):
        end(engine, BOUND)
