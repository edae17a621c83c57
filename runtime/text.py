"""Token ids -> visible text, one token at a time: characters split over tokens, stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Any

INCOMPLETE = "\ufffd"
MAX_PENDING = 8  # a character has at most four bytes; more pending tokens than this are really broken text


class Detokenizer:
    """Gives out text as soon as it can no longer change; cost per token does not grow with the answer.

    Decoding happens in a short window that starts at a token already given out, because tokenizers may treat the
    first token of a text differently.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []  # tokens already given out, then those still pending
        self._given = 0
        self._before: str | None = ""  # text of the tokens given out; None while it has to be decoded again

    def add(self, token_id: int) -> str:
        """Text that became certain with this token; "" while a character is incomplete."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(INCOMPLETE) and len(self._window) - self._given < MAX_PENDING:
            return ""
        piece = text[len(self._text_before()) :]
        del self._window[: self._given]
        self._given, self._before = len(self._window), None
        return piece

    def flush(self) -> str:
        """The rest at the end of an answer, incomplete characters as U+FFFD."""
        if len(self._window) == self._given:
            return ""
        piece = self._decode(self._window)[len(self._text_before()) :]
        self._given = len(self._window)
        self._before = None
        return piece

    def _text_before(self) -> str:
        if self._before is None:
            self._before = self._decode(self._window[: self._given])
        return self._before


class TableDetokenizer:
    """The same for tokenizers whose tokens are bytes (GPT-2's byte-level BPE: Qwen, Llama 3, SmolLM): a look into a table.

    Args:
        pieces: text of every token id; bytes where it is not whole characters.
    """

    def __init__(self, pieces: Mapping[int, str | bytes]) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._inside = False  # a character has begun and is not whole yet

    def add(self, token_id: int) -> str:
        """Text that became certain with this token; "" while a character is incomplete."""
        piece = self._pieces[token_id]
        if isinstance(piece, str):
            if not self._inside:
                return piece
            piece = piece.encode()
        text = self._utf8.decode(piece)
        self._inside = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        """The rest at the end of an answer, incomplete characters as U+FFFD."""
        self._inside = False
        return self._utf8.decode(b"", final=True)


class ByteLevelPieces(dict[int, "str | bytes"]):
    """Token id -> text for a tokenizer with the byte-level decoder, worked out at first use."""

    def __init__(self, tokenizer: Any, special_ids: frozenset[int]) -> None:
        super().__init__(dict.fromkeys(special_ids, ""))
        self._tokenizer = tokenizer
        self._byte_of = {character: byte for byte, character in byte_characters().items()}

    def __missing__(self, token_id: int) -> str | bytes:
        token = self._tokenizer.id_to_token(token_id) or ""
        try:
            data = bytes(self._byte_of[character] for character in token)
        except KeyError:  # a token added later stands for itself
            data = token.encode()
        try:
            piece: str | bytes = data.decode()
        except UnicodeDecodeError:
            piece = data
        self[token_id] = piece
        return piece


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (Radford et al. 2019, GPT-2's encoder)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + at) for at, byte in enumerate(hidden)}


class StopStrings:
    """Holds back text that may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop string was reached."""
        if not self._stops:
            return text, False
        held = self._held + text
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self._held = ""
            return held[: min(found)], True
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
