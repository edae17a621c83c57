"""Answers held to a GBNF grammar or a JSON schema, by llama.cpp's grammar sampler."""

from __future__ import annotations

import ctypes
import json
import re
from typing import Any

import numpy as np

from runtime.api import Logits, ModelInfo, Sampling
from vlm.errors import UserError

MAX_GRAMMAR = 100_000
MAX_DEPTH = 32
# llama.cpp's parser calls itself for every bracket; at some ten thousand the stack ends, and the process with it
MAX_BRACKETS = 2000
# every repetition is written out
MAX_REPEATS = 1000
COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
# what is not closed goes on to the end, so that every character is looked at once
NO_BRACKET = re.compile(r'"(?:\\.|[^"\\])*(?:"|\\?\Z)|\[(?:\\.|[^\]\\])*(?:\]|\\?\Z)|#[^\n]*', re.DOTALL)
# an escaped character, or a class, in which brackets are characters
PIECE = re.compile(r"\\.|\[(?:\\.|[^\]\\])*(?:\]|\\?\Z)", re.DOTALL)
REPEAT = re.compile(r"\{(\d{0,9})(?:,(\d{0,9}))?\}")


class LlamaGrammar:
    """Grammar state of one answer; see `runtime.api.Constraint`."""

    def __init__(self, llama: Any, vocab: Any, info: ModelInfo, sampling: Sampling) -> None:
        self._llama = llama
        self._sampler: Any = None
        text = sampling.grammar or _gbnf(sampling.json_schema)
        if len(text) > MAX_GRAMMAR:
            raise UserError(f"the grammar has {len(text)} characters, more than {MAX_GRAMMAR}; make it smaller")
        if (depth := _brackets(text)) > MAX_BRACKETS:
            raise UserError(
                f"the grammar has {depth} brackets in each other, more than {MAX_BRACKETS}; make it simpler"
            )
        self._sampler = llama.llama_sampler_init_grammar(vocab, text.encode(), b"root")
        if not self._sampler:
            raise UserError("the grammar is not valid GBNF with a rule `root`; check it with llama.cpp's grammar guide")
        self._ends = frozenset(info.eos_token_ids)
        self._rows = np.zeros(info.vocab_size, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self._rows["id"] = np.arange(info.vocab_size)
        self._view = llama.llama_token_data_array(
            data=self._rows.ctypes.data_as(llama.llama_token_data_p), size=info.vocab_size, selected=-1, sorted=False
        )

    def mask(self, logits_V: Logits) -> Logits:
        self._rows["logit"] = logits_V
        self._llama.llama_sampler_apply(self._sampler, ctypes.byref(self._view))
        masked_V: Logits = self._rows["logit"].copy()
        return masked_V

    def accept(self, token_id: int) -> None:
        if token_id not in self._ends:
            self._llama.llama_sampler_accept(self._sampler, token_id)

    def __del__(self) -> None:
        if self._sampler:
            self._llama.llama_sampler_free(self._sampler)
            self._sampler = None


def _gbnf(schema_json: str) -> str:
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    if len(schema_json) > MAX_GRAMMAR:
        raise UserError(f"the JSON schema has {len(schema_json)} characters, more than {MAX_GRAMMAR}; make it smaller")
    try:
        schema = json.loads(schema_json)
        if not isinstance(schema, dict) or _depth(schema) > MAX_DEPTH:
            raise UserError(f"the JSON schema must be an object nested at most {MAX_DEPTH} deep")
        _refuse_long(schema)
        return str(json_schema_to_gbnf(json.dumps(schema)))
    except UserError:
        raise
    except Exception as error:  # the converter raises whatever an unexpected schema runs it into
        raise UserError(f"the JSON schema cannot be used ({type(error).__name__}: {error}); simplify it") from None


def _depth(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max((_depth(child) for child in children), default=0)


def _refuse_long(value: Any) -> None:
    """Refuse repetitions that would fill the memory before anybody could count the characters."""
    if isinstance(value, dict):
        for name in COUNTS:
            _refuse_count(name, value.get(name))
        if isinstance(pattern := value.get("pattern"), str):
            _refuse_count("pattern", _repeats(pattern))
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _refuse_long(child)


def _repeats(pattern: str) -> int:
    """How often the deepest part of a regular expression is written out: repeats of groups in each other multiply."""
    inside = [1]  # the largest count so far in each open group; one that is closed counts in the group around it
    at = 0
    while at < len(pattern):
        piece = PIECE.match(pattern, at)
        at, closed = (piece.end() if piece else at + 1), 1
        if piece is None and pattern[at - 1] == "(":
            inside.append(1)
            continue
        if piece is None and pattern[at - 1] == ")" and len(inside) > 1:
            closed = inside.pop()
        if found := REPEAT.match(pattern, at):
            closed *= max(int(found[1] or 1), int(found[2] or 1), 1)
            at = found.end()
        inside[-1] = max(inside[-1], closed)
    return max(inside)


def _refuse_count(name: str, count: Any) -> None:
    if isinstance(count, (int, float)) and count > MAX_REPEATS:
        raise UserError(f"the JSON schema repeats {count} times ({name}), more than {MAX_REPEATS}; ask for fewer")


def _brackets(text: str) -> int:
    """How deep round brackets stand in each other, outside of literals, character classes and comments."""
    depth = deepest = 0
    for character in NO_BRACKET.sub("", text):
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest
