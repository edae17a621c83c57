"""Token ids -> visible text, one token at a time: characters split over tokens, stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
