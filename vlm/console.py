"""The command-line manners every room shares: exit codes, one-line errors, progress, JSON. Stdlib only."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from vlm.errors import ToolError, UserError

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a UserError (one line) instead of a usage dump."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def natural(text: str) -> int:
    """argparse type: a whole number from 0 up."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)


def seconds(text: str) -> float:
    """argparse type: a duration above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def note(message: str) -> None:
    """Progress or status for a person: stderr, so that stdout stays the answer."""
    print(message, file=sys.stderr, flush=True)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on one line of stdout; callers make it the last line."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(", ", ": ")), flush=True)


def run_command(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> NoReturn:
    """Run `main(argv)` and exit with the contract's codes: 0, 1, 2, 3 or 130 (see vlm.errors)."""
    try:
        status = main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except ToolError as error:
        note(f"error: {' '.join(error.message.split())}")
        status = error.exit_code
    except KeyboardInterrupt:
        note("interrupted; run the same command again to go on")
        status = 130
    except BrokenPipeError:  # the reader (head, less) went away: not a fault of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    raise SystemExit(status)


class Progress:
    """A bar on a terminal, a plain line every few seconds elsewhere; both on stderr."""

    def __init__(self, total: int, label: str, every_s: float = 5.0) -> None:
        self.total, self.label, self.every_s = total, label, every_s
        self.done = 0
        self._tty = sys.stderr.isatty()
        self._start = self._last = time.monotonic()

    def advance(self, n: int = 1, detail: str = "") -> None:
        self.done += n
        now = time.monotonic()
        finished = self.done >= self.total
        if not finished and now - self._last < (0.1 if self._tty else self.every_s):
            return
        self._last = now
        elapsed = now - self._start
        left = elapsed / max(self.done, 1) * max(self.total - self.done, 0)
        text = f"{self.label} {self.done}/{self.total}  {elapsed:.0f}s, {left:.0f}s left  {detail}".rstrip()
        if self._tty:
            filled = 24 * self.done // max(self.total, 1)
            print(
                f"\r\x1b[K[{'#' * filled}{'.' * (24 - filled)}] {text}",
                end="\n" if finished else "",
                file=sys.stderr,
                flush=True,
            )
        else:
            note(text)


def track(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yield `items` while showing progress."""
    progress = Progress(total, label)
    for item in items:
        yield item
        progress.advance()


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub-flavoured Markdown table, aligned so that it also reads well in a terminal."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
