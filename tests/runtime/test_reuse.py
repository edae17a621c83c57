"""Caches and chunked prefill on real models: the same tokens as without, on every backend."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from runtime import load
from runtime.api import Backend, Done, Image, Message, Reuse, Sampling, Token
from runtime.engine import Engine
from runtime.images import answer, from_pillow, question
from runtime.loading import open_backend
from runtime.options import LoadOptions
from vlm import digits
from vlm.errors import UserError

KINDS = ["student", "onnx_artifact", "gguf_artifact"]


def picture(index: int) -> Image:
    return from_pillow(digits.sample("test", index).image)


def ask(engine: Engine, messages: list[Message], reuse: Reuse) -> tuple[list[int], Done]:
    events = engine.complete(messages, Sampling(max_new_tokens=8), reuse=reuse)
    done = events[-1]
    assert isinstance(done, Done)
    return [event.id for event in events if isinstance(event, Token)], done


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_with_pictures_gives_the_same_tokens_with_and_without_caches(
    kind: str, request: pytest.FixtureRequest
) -> None:
    with load(request.getfixturevalue(kind), prefill_chunk=13) as engine:
        history: list[Message] = []
        for turn in range(4):
            images = [picture(turn)] * 2 if turn == 2 else [picture(0)] if turn == 0 else []
            history.append(question(("Read the top row.", "And below?")[turn % 2], *images))
            ids, done = ask(engine, history, "all")
            expected, _ = ask(engine, history, "none")
            assert ids == expected
            history.append(answer(done.text))
            # the second reading, without caches, leaves its own context: the next turn goes on from there
            if turn:
                assert done.usage.cached_tokens
                assert done.usage.prompt_tokens
                assert done.usage.cached_tokens >= 16
        assert (done.usage.cached_images, engine.stats.images.entries) == (3, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_prefill_in_pieces_gives_the_same_logits(kind: str, chunk: int, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    backend: Backend = open_backend(path, "auto", LoadOptions())  # type: ignore[assignment]
    try:
        messages = [question("Compare them.", picture(1), picture(2))]
        prompt = backend.prepare(messages)
        embeds = backend.encode(prompt.images)
        whole = backend.prefill(prompt, embeds).copy()  # the backend's own memory holds until its next call
        n = len(prompt.ids)
        for start in range(0, n, chunk):
            pieces = backend.prefill(prompt, embeds, start, min(start + chunk, n))
        assert np.abs(whole - pieces).max() < 2e-2 * max(1.0, float(whole.std()))
        # back to the middle of a picture, with only the embedding that is needed
        start = prompt.images[1].start + 3
        again = backend.prefill(prompt, [None, embeds[1]], start, n)
        assert np.abs(whole - again).max() < 2e-2 * max(1.0, float(whole.std()))
    finally:
        backend.close()


def test_answers_follow_a_json_schema(gguf_artifact: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer"}, "odd": {"type": "boolean"}},
        "required": ["sum", "odd"],
    }
    sampling = Sampling(max_new_tokens=120, json_schema=json.dumps(schema), temperature=1.0, seed=5)
    with load(gguf_artifact) as engine:
        for index in range(2):
            *_, done = engine.generate([question("Add up the top row.", picture(index))], sampling)
            assert isinstance(done, Done)
            assert done.finish == "stop"
            value = json.loads(done.text)
            assert isinstance(value["sum"], int)
            assert isinstance(value["odd"], bool)


def test_answers_follow_a_grammar(gguf_artifact: Path) -> None:
    sampling = Sampling(max_new_tokens=9, grammar='root ::= "yes" | "no"')
    with load(gguf_artifact) as engine:
        *_, done = engine.generate([question("Is it odd?", picture(0))], sampling)
    assert isinstance(done, Done)
    assert done.text in ("yes", "no")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grammar": "root :== nonsense"}, "not valid GBNF"),
        ({"json_schema": "{"}, "JSON schema cannot be used"),
        ({"json_schema": "[]"}, "must be an object"),
        ({"json_schema": '{"a":' * 40 + "1" + "}" * 40}, "at most 32 deep"),
        # more of them end the process: llama.cpp calls itself for each
        ({"grammar": "root ::= " + "(" * 20000 + '"a"' + ")" * 20000}, "20000 brackets in each other"),
        ({"grammar": "root ::= " + '"(" [(] # (\n' + "(" * 3000 + '"a"' + ")" * 3000}, "3000 brackets in each other"),
        ({"json_schema": '{"type": "array", "minItems": 1000000000}'}, "repeats 1000000000 times .minItems"),
        ({"json_schema": '{"items": [{"type": "string", "maxLength": 1e12}]}'}, "times .maxLength"),
        ({"json_schema": '{"type": "string", "pattern": "^((a{90}){90}){,90}$"}'}, "repeats 729000 times .pattern"),
        # looked at once, whatever is left open: these took minutes, during which nobody else was heard
        ({"grammar": "root ::= " + "[" * 90000}, "not valid GBNF"),
        ({"grammar": "root ::= " + '"' * 90001}, "not valid GBNF"),
        (
            {"json_schema": '{"type": "string", "pattern": "^a{' + "1" * 90000 + '"}'},
            "JSON schema cannot be used|not valid",
        ),
        ({"json_schema": '{"type": "string", "pattern": "' + "a" * 200000 + '"}'}, "200033 characters"),
    ],
)
def test_wrong_grammars_are_the_users_mistake(gguf_artifact: Path, wrong: dict[str, str], message: str) -> None:
    with load(gguf_artifact) as engine:
        with pytest.raises(UserError, match=message):
            list(engine.generate([question("hi")], Sampling(**wrong)))  # type: ignore[arg-type]
        assert ask(engine, [question("hi")], "all")[0]


UUID = "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"


@pytest.mark.parametrize(
    ("pattern", "times"),
    [
        (UUID, 12),
        ("^a{2}b{3}(c{4}d{5}){6}$", 30),
        ("^((a{10}){10}){,10}(b{7}|c)$", 1000),
        (r"^\\(a{3}\\){5}$", 15),
        (r"^\(a{3}\){5}$", 5),
        ("^(a|b{2}){3,4}(", 8),
        ("no repeats", 1),
        # brackets in a class open and close nothing: counted, the guard could be talked down
        ("((a{10}[)]){10}){10}", 1000),
        ("([(]a{10}){10}[^](){2}", 100),
        ("(((a{10}[)])[)]){10}[)]{3}){10}", 1000),
    ],
)
def test_repeats_multiply_in_each_other_only(pattern: str, times: int) -> None:
    from runtime.grammar import _repeats

    assert _repeats(pattern) == times


def test_an_ordinary_pattern_holds_an_answer(gguf_artifact: Path) -> None:
    import re

    sampling = Sampling(max_new_tokens=80, json_schema=json.dumps({"type": "string", "pattern": UUID}))
    with load(gguf_artifact) as engine:
        *_, done = engine.generate([question("An id, please.")], sampling)
    assert isinstance(done, Done)
    assert re.fullmatch(UUID, json.loads(done.text))
