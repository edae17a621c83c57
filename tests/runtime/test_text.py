"""Detokenising, stop strings and sampling: small pure pieces against naive versions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.api import Sampling
from runtime.backend_fake import FakeBackend, FakeScript
from runtime.engine import Engine
from runtime.sampling import Sampler, penalised
from runtime.text import ByteLevelPieces, Detokenizer, StopStrings, TableDetokenizer, byte_characters
from tests.runtime.test_engine import last, run
from vlm.errors import UserError


def decode(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", "replace")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_pieces_add_up_to_the_whole_text(text: str) -> None:
    pieces = Detokenizer(decode)  # type: ignore[arg-type]
    parts = [pieces.add(byte) for byte in text.encode()]
    assert "".join(parts) + pieces.flush() == text
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


def test_broken_bytes_do_not_hold_text_back_for_ever() -> None:
    pieces = Detokenizer(decode)  # type: ignore[arg-type]
    parts = [pieces.add(0xFF) for _ in range(20)]
    assert any(parts)
    assert len("".join(parts) + pieces.flush()) == 20


def test_decoding_cost_per_token_does_not_grow() -> None:
    lengths: list[int] = []

    def counting(ids: list[int]) -> str:
        lengths.append(len(ids))
        return decode(ids)

    pieces = Detokenizer(counting)  # type: ignore[arg-type]
    for byte in b"a" * 500:
        pieces.add(byte)
    assert max(lengths) <= 9


@pytest.fixture(scope="module")
def byte_level() -> Any:
    """A byte-level tokenizer: every byte, a few merges inside characters and across them, added tokens."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the tokenizer extra")
    byte = byte_characters()
    pairs = [(byte[0xF0], byte[0x9F]), (byte[0xF0] + byte[0x9F], byte[0x98]), (byte[0xC3], byte[0xB1]), ("a", "b")]
    pairs += [("ab", byte[0xE2]), (byte[0x20], "a")]
    words = [*byte.values(), *("".join(pair) for pair in pairs)]
    model = tokenizers.models.BPE({word: at for at, word in enumerate(words)}, pairs)
    made = tokenizers.Tokenizer(model)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_tokens(["日本", "plain"])
    made.add_special_tokens(["<end>"])
    return made


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 266), max_size=24))
def test_the_table_gives_what_the_tokenizer_gives(byte_level: Any, ids: list[int]) -> None:
    special = frozenset([byte_level.token_to_id("<end>")])
    table = TableDetokenizer(ByteLevelPieces(byte_level, special))
    parts = [table.add(token_id) for token_id in ids]
    whole = byte_level.decode(ids, skip_special_tokens=True)
    assert "".join(parts) + table.flush() == whole
    window = Detokenizer(lambda some: byte_level.decode(list(some), skip_special_tokens=True))
    assert "".join(window.add(token_id) for token_id in ids) + window.flush() == whole


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20))
def test_the_table_shows_a_character_with_its_last_byte(text: str) -> None:
    table = TableDetokenizer({byte: bytes([byte]) for byte in range(256)})
    shown = ""
    for at, byte in enumerate(data := text.encode(), 1):
        shown += table.add(byte)
        assert shown == data[:at].decode(errors="ignore")


@settings(max_examples=300, deadline=None)
@given(
    st.text("abS", max_size=30),
    st.lists(st.text("abS", min_size=1, max_size=4), max_size=3),
    st.integers(1, 5),
)
def test_stop_strings_equal_a_search_in_the_whole_text(text: str, stops: list[str], size: int) -> None:
    held = StopStrings(stops)
    shown, stopped = "", False
    for start in range(0, len(text), size):
        piece, stopped = held.add(text[start : start + size])
        shown += piece
        if stopped:
            break
    if not stopped:
        shown += held.flush()
    assert stopped == any(stop in text for stop in stops)
    assert text.startswith(shown)
    if stopped:
        assert not any(stop in shown for stop in stops)
        assert any(text.startswith(stop, len(shown)) for stop in stops)
    else:
        assert shown == text


def test_top_k_and_top_p_keep_the_right_tokens() -> None:
    logits_V = np.log(np.array([0.1, 0.5, 0.3, 0.1], np.float32))
    drawn = {Sampler(Sampling(temperature=1.0, top_k=2, seed=s))(logits_V) for s in range(200)}
    assert drawn == {1, 2}
    drawn = {Sampler(Sampling(temperature=1.0, top_p=0.6, seed=s))(logits_V) for s in range(200)}
    assert drawn == {1, 2}
    drawn = {Sampler(Sampling(temperature=1.0, top_p=0.5, seed=s))(logits_V) for s in range(50)}
    assert drawn == {1}


def test_sampling_follows_the_distribution() -> None:
    probabilities = np.array([0.2, 0.5, 0.3])
    sample = Sampler(Sampling(temperature=1.0, seed=0))
    counts = np.bincount([sample(np.log(probabilities).astype(np.float32)) for _ in range(4000)], minlength=3)
    assert np.abs(counts / 4000 - probabilities).max() < 0.03


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"json_schema": "{}", "grammar": "root ::= [a]"},
        {"seed": -1},
        {"stop": ("",)},
    ],
)
def test_values_out_of_range_are_refused_by_name(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        Sampling(**options)  # type: ignore[arg-type]


def test_seeded_sampling_repeats_itself() -> None:
    class Flat(FakeBackend):
        def _logits(self) -> np.ndarray:
            return np.linspace(0, 1, 257, dtype=np.float32)

    with Engine(Flat(FakeScript())) as engine:
        texts = {
            last(run(engine, sampling=Sampling(temperature=1.0, seed=7, max_new_tokens=20, ignore_eos=True))).text
            for _ in range(3)
        }
        other = last(run(engine, sampling=Sampling(temperature=1.0, seed=8, max_new_tokens=20, ignore_eos=True))).text
    assert len(texts) == 1
    assert other not in texts


def test_min_p_drops_what_is_unlikely_next_to_the_likeliest() -> None:
    logits_V = np.log(np.array([0.5, 0.26, 0.2, 0.04], np.float32))
    drawn = {Sampler(Sampling(temperature=1.0, min_p=0.5, seed=s))(logits_V) for s in range(200)}
    assert drawn == {0, 1}
    assert {Sampler(Sampling(temperature=1.0, min_p=1.0, seed=s))(logits_V) for s in range(50)} == {0}


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(0.5, 3), st.data())
def test_repetition_penalty_equals_the_naive_form(values: list[float], penalty: float, data: st.DataObject) -> None:
    logits_V = np.array(values, np.float32)
    seen = data.draw(st.sets(st.integers(0, len(values) + 3)))
    naive = [
        (v / penalty if v > 0 else v * penalty) if i in seen else v for i, v in enumerate(logits_V.astype(np.float64))
    ]
    np.testing.assert_allclose(penalised(logits_V, seen, penalty), naive, rtol=1e-6, atol=1e-30)


def test_repetition_penalty_counts_prompt_and_answer() -> None:
    sample = Sampler(Sampling(repetition_penalty=4.0), prompt_ids=(2,))
    logits_V = np.array([1.0, 2.0, 3.0], np.float32)
    assert [sample(logits_V) for _ in range(3)] == [1, 0, 2]
    assert logits_V.tolist() == [1.0, 2.0, 3.0], "the model's own logits stay as they are"
