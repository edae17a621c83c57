"""Which option a reply names.

`strict` is ours: it answers only where the reply commits itself, and treats every letter alike, so that scores do not
lean towards A. The others read a reply as the benchmark's own script does, quirks included, for comparability.
An unread reply is None and counts as wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MODES = ("strict", "official")
Options = Mapping[str, str]

_BRACKETED = re.compile(r"[(\[{]\s*([A-Za-z])\s*[)\]}]")
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-Za-z])\)?\s*\}")
# what may follow a letter that stands for an option: nothing, punctuation, or the start of a reason
_AFTER = r"(?=\s*(?:$|[.,;:!?)\]}*\n\"'(]|-|because\b|since\b|as\b|which\b|with\b|for\b))"
_SAID = re.compile(
    r"\b(?:answer|option|choice)s?\b\s*(?:is|was|would\s+be|should\s+be|:|=|->)*\s*"
    r"(?:option|choice|letter)?\s*[*\"'(\[{]*([A-Z])\b" + _AFTER,
    re.IGNORECASE,
)
_CHOSEN = re.compile(r"\b(?:choose|select|pick|go\s+with)\s+(?:option\s+)?[*\"'(\[{]*([A-Z])\b" + _AFTER, re.IGNORECASE)
_LEADING = re.compile(r"^\W*([A-Za-z])\s*(?:[.):,]|-\s)")
_ALONE = re.compile(r"^\W*([A-Za-z])\W*$")
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Texts -> {"A": first, "B": second, ...}.

    Raises:
        ValueError: more options than letters.
    """
    if len(options) > len(LETTERS):
        raise ValueError(f"{len(options)} options; at most {len(LETTERS)} can be lettered")
    return dict(zip(LETTERS, options, strict=False))


def strict(reply: str, options: Options) -> str | None:
    """The option a reply commits itself to.

    In order: the reply is a letter; it says so ("the answer is B", "Option B", the last such remark counts); it has
    one bracketed letter; it starts with a letter and a mark ("B. a cat"); it contains the text of one option only.
    """
    text = re.sub(r"[*`]+", "", reply).strip()
    if not text:
        return None
    for rule in (_alone, _said, _bracketed, _leading):
        if (letter := rule(text, options)) is not None:
            return letter
    return _by_text(text, options)


def _alone(text: str, options: Options) -> str | None:
    words = set(re.findall(r"\w+", text.upper()))
    return next(iter(words)) if len(words) == 1 and words <= set(options) else None


def _said(text: str, options: Options) -> str | None:
    found = [(m.start(1), m[1].upper()) for rule in (_BOXED, _SAID, _CHOSEN) for m in rule.finditer(text)]
    found = [(place, letter) for place, letter in found if letter in options]
    return max(found)[1] if found else None


def _bracketed(text: str, options: Options) -> str | None:
    letters = {m[1].upper() for m in _BRACKETED.finditer(text)} & set(options)
    return letters.pop() if len(letters) == 1 else None


def _leading(text: str, options: Options) -> str | None:
    match = _LEADING.match(text)
    if not match or match[1].upper() not in options:
        return None
    # "A, B and C": a list is not a choice
    others = set(re.findall(r"(?<![\w'])([A-Z])(?![\w'])", text[match.end() :])) & set(options)
    return match[1].upper() if not others - {match[1].upper()} else None


def _by_text(text: str, options: Options) -> str | None:
    said = f" {_plain(text)} "
    plain = {letter: _plain(option) for letter, option in options.items()}
    named = {letter for letter, option in plain.items() if option and f" {option} " in said}
    # "red" inside "dark red" is not named on its own
    inside = {a for a in named for b in named if plain[a] != plain[b] and f" {plain[a]} " in f" {plain[b]} "}
    kept = named - {a for a in inside if not _on_its_own(said, plain[a], [plain[b] for b in named if b != a])}
    return kept.pop() if len(kept) == 1 else None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def _on_its_own(said: str, option: str, others: Sequence[str]) -> bool:
    for other in sorted(others, key=len, reverse=True):
        if f" {option} " in f" {other} ":
            said = said.replace(f" {other} ", " | ")
    return f" {option} " in said


def scienceqa(reply: str, count: int) -> str | None:
    """LLaVA's ScienceQA script: a letter, `X. ...`, or exactly one "The answer is X." (any one character for the dot)."""
    letters = LETTERS[:5]
    if reply and reply in tuple(letters):
        letter = reply
    elif len(reply) >= 3 and reply[0] in letters and reply[1:3] == ". ":
        letter = reply[0]
    else:
        found = re.findall(r"The answer is ([A-Z]).", reply)
        if len(found) != 1:
            return None
        letter = found[0]
    return letter if letter in LETTERS[:count] else None


def mmbench(reply: str, options: Options) -> str | None:
    """MMBench's matching without a language model: one option letter as a word near the end, else one option's text."""
    return _mmbench_letter(reply, options) or _mmbench_text(reply, options)


def _mmbench_letter(reply: str, options: Options) -> str | None:
    if any(refusal in reply for refusal in _REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", reply).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    match = re.search(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", reply)
    return match[1].upper() if match and match[1].upper() in options else None


def _mmbench_text(reply: str, options: Options) -> str | None:
    said = reply.lower()
    if len(said) > 2 * sum(len(option) for option in options.values()):
        return None
    named = [letter for letter, option in options.items() if option.lower() in said]
    return named[0] if len(named) == 1 else None


def av_odyssey(reply: str, options: Options) -> str:
    """AV-Odyssey's script: any option letter anywhere, even inside a word; A where nothing is found."""
    for mark in ",.!?;:'":
        reply = reply.strip(mark)
    text = f" {reply} "
    # letters count wherever they stand, so the script's later rule for free-standing letters is never reached
    named = [letter for letter in options if letter in text]
    if named:
        return max(named, key=lambda letter: (text.rfind(f"({letter})"), -named.index(letter)))
    if len(text.split()) > 5:
        named = [letter for letter, option in options.items() if option.lower() in text.lower()]
        if named:
            ends = {letter: text.lower().rfind(options[letter].lower()) for letter in named}
            return max(named, key=lambda letter: (ends[letter], -named.index(letter)))
    return "A"


def blink(reply: str, _: Options) -> str | None:
    """The first letter of the reply, brackets and blanks skipped, as the common BLINK script reads it."""
    match = re.match(r"[(\s]*([A-Za-z])", reply.strip())
    return match[1].upper() if match else None
