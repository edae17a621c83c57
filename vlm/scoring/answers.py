"""Typed answer checker: how well a free reply matches a known answer of a known type, 0 to 1.

A reply may argue before it answers. The last thing it declares ("the answer is ...", "= ..."), or else the whole
reply, is what is read; nothing is executed.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from vlm.scoring import choice, text
from vlm.scoring.expression import ExpressionError, Value, evaluate

MAX_LITERAL = 20_000
MAX_BRACKETS = 40
NEAR = 0.005  # equal to two decimals: for roots, pi and the like
RELAXED = 0.05  # ChartQA's tolerance

Atom = Fraction | str
_DECLARED = re.compile(
    r"(?:\b(?:answers?|results?)\b[*_`]*(?:\s+(?:is|are)\b\s*[:=]?|\s*[:=])|\\boxed)\s*", re.IGNORECASE
)
_NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)(?:\s*/\s*\d+)?%?")
_SPLIT = re.compile(r"\s*(?:,|;|\n|\band\b|&)\s*")


def declared(reply: str) -> str:
    """What a reply says its answer is: the rest of the line after the last "answer is", else the whole reply."""
    found = list(_DECLARED.finditer(reply))
    if not found:
        return reply.strip()
    rest = reply[found[-1].end() :].strip()
    if found[-1][0].startswith("\\boxed"):
        return _braced(rest)
    line = rest.splitlines()[0] if rest else ""
    return line.strip().strip("*`").strip().rstrip(".").strip()


def _braced(rest: str) -> str:
    """`{a{b}c} d` -> `a{b}c`."""
    depth = 0
    for place, mark in enumerate(rest):
        depth += (mark == "{") - (mark == "}")
        if depth == 0:
            return rest[1:place].strip()
    return rest


def number(reply: str) -> Value | None:
    """The number a reply gives: arithmetic as a whole, else right of the last "=", else the last number in it."""
    said = declared(reply)
    for part in (said, said.rsplit("=", 1)[-1]):
        try:
            return evaluate(unwrapped(part))
        except ExpressionError:
            continue
    found = [match for match in _NUMBER.findall(said.rsplit("=", 1)[-1]) or _NUMBER.findall(said) if match.strip()]
    try:
        return evaluate(found[-1]) if found else None
    except ExpressionError:
        return None


def unwrapped(part: str) -> str:
    """Without stars, final stops and braces around the whole."""
    part = part.strip().strip("*").rstrip(".").strip()
    while len(part) > 1 and part[0] == "{" and part[-1] == "}":
        part = part[1:-1]
    return part


def same_number(said: Value, want: Value) -> bool:
    """Equal as fractions; to two decimals where one side is irrational or the answer's decimals never end."""
    if isinstance(said, Fraction) and isinstance(want, Fraction):
        return said == want or (_endless(want) and not _endless(said) and said == round(want, max(2, _decimals(said))))
    return abs(float(said) - float(want)) < NEAR


def _endless(number: Fraction) -> bool:
    rest = number.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest != 1


def _decimals(number: Fraction) -> int:
    places = 0
    while (number * 10**places).denominator != 1 and places < 18:
        places += 1
    return places


def literal(source: str) -> Any:
    """JSON, or a Python literal (numbers, strings, lists, None ...): data only.

    Raises:
        ValueError: anything else, or nested or long beyond reason.
    """
    if len(source) > MAX_LITERAL or max(source.count(mark) for mark in "[{(") > MAX_LITERAL // 4:
        raise ValueError("too long")
    depth = deepest = 0
    for letter in source:
        depth += (letter in "[{(") - (letter in "]})")
        deepest = max(deepest, depth)
    if deepest > MAX_BRACKETS:
        raise ValueError("nested too deeply")
    try:
        return json.loads(source)
    except ValueError:
        pass
    try:
        return ast.literal_eval(source.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"not a literal ({type(error).__name__})") from None


def structures(reply: str) -> list[Any]:
    """Every JSON or literal list and object in a reply, outermost ones only, in order."""
    found, place = [], 0
    while place < len(reply):
        if reply[place] not in "[{":
            place += 1
            continue
        end = _closing(reply, place)
        try:
            found.append(literal(reply[place:end]))
            place = end
        except ValueError:
            place += 1
    return found


def _closing(reply: str, start: int) -> int:
    depth = 0
    for place in range(start, min(len(reply), start + MAX_LITERAL)):
        depth += (reply[place] in "[{") - (reply[place] in "]}")
        if depth == 0:
            return place + 1
    return start


def grid(reply: str) -> list[list[Any]] | None:
    """The last rectangular grid in a reply: a list of lists, or at least two lines of as many numbers or letters."""
    for value in reversed(structures(reply)):
        if isinstance(value, list) and value and all(isinstance(row, list) for row in value):
            return value if len({len(row) for row in value}) == 1 and value[0] else None
    blocks: list[list[list[Any]]] = [[]]
    for line in reply.splitlines():
        cells = [cell for cell in re.split(r"[\s,|]+", line.strip().strip("|[](),")) if cell]
        if len(cells) > 1 and all(re.fullmatch(r"-?\d+|[A-Za-z.]", cell) for cell in cells):
            blocks[-1].append([int(cell) if cell.lstrip("-").isdigit() else cell for cell in cells])
        elif blocks[-1] and not re.fullmatch(r"[\s|+-]*", line):
            blocks.append([])
    whole = [block for block in blocks if len(block) > 1 and len({len(row) for row in block}) == 1]
    return whole[-1] if whole else None


def atom(value: Any) -> Atom:
    """A comparable form of one answer: numbers as fractions however written, other text without case and marks."""
    plain = str(value).strip().strip("\"'`*()[]{}. ").strip()
    try:
        exact = evaluate(plain)
        if isinstance(exact, Fraction):
            return exact
    except ExpressionError:
        pass
    return " ".join(plain.casefold().split())


def items(value: Any) -> list[Atom]:
    """A list, or text that lists things with commas, semicolons, lines or "and" -> atoms."""
    if isinstance(value, str):
        listed = [found for found in structures(value) if isinstance(found, list)]
        value = listed[-1] if listed else [part for part in _SPLIT.split(declared(value)) if part]
    elif not isinstance(value, list | tuple | set | frozenset):
        value = [value]
    return [atom(part) for part in value if str(part).strip()]


def _choice(reply: str, answer: Any, options: Mapping[str, str]) -> float:
    wanted = {str(part).upper() for part in items(answer)}
    if len(wanted) > 1:
        return float(letters(reply, options) == wanted)
    return float(choice.strict(reply, options) in wanted)


def letters(reply: str, options: Mapping[str, str] | None = None) -> set[str]:
    """Option letters a reply lists as its answer ("A, C"; "[A, C]"; "the answers are A and C")."""
    said = re.sub(r"(?i)^.*\b(?:answers?|options?|choices?)\s*(?:are|is|:|=)", "", declared(reply), flags=re.DOTALL)
    known = set(options) if options else set(choice.LETTERS)
    tokens = [token for token in re.split(r"[^\w]+|\band\b", said) if token]
    found = {token.upper() for token in tokens if len(token) == 1 and token.upper() in known}
    return found if found and all(len(token) == 1 for token in tokens) else set()


def _number(reply: str, answer: Any, _: object) -> float:
    said, want = number(reply), number(str(answer))
    return float(said is not None and want is not None and same_number(said, want))


def _relaxed(reply: str, answer: Any, _: object) -> float:
    said, want = number(reply), number(str(answer))
    if said is None or want is None:
        return float(text.exact_match(reply, str(answer)))
    return float(abs(float(said) - float(want)) <= RELAXED * abs(float(want)))


def _expression(reply: str, answer: Any, _: object) -> float:
    """The calculation before "=" has the answer's value, exactly."""
    try:
        want = evaluate(str(answer).split("=")[0])
        said = evaluate(unwrapped(declared(reply)).split("=")[0])
    except ExpressionError:
        return 0.0
    return float(said == want if isinstance(said, Fraction) and isinstance(want, Fraction) else same_number(said, want))


def _set(reply: str, answer: Any, _: object) -> float:
    said = items(reply)
    return float(bool(said) and set(said) == set(items(answer)))


def _grid(reply: str, answer: Any, _: object) -> float:
    said, want = grid(reply), answer if isinstance(answer, list) else grid(str(answer))
    if said is None or want is None:
        return 0.0
    return float([[atom(cell) for cell in row] for row in said] == [[atom(cell) for cell in row] for row in want])


def _several(answer: Any) -> list[str]:
    return [str(one) for one in answer] if isinstance(answer, list | tuple) else [str(answer)]


def _best(measure: Callable[[str, str], float]) -> Callable[[str, Any, object], float]:
    return lambda reply, answer, _: max(measure(reply, one) for one in _several(answer))


def _yes_no(reply: str, answer: Any, _: object) -> float:
    said = re.findall(r"\b(yes|no)\b", reply.lower())
    return float(bool(said) and said[0] == str(answer).strip().lower())


def _mean_rouge(reply: str, answer: str) -> float:
    return sum(text.rouge(reply, answer).values()) / 3


CHECKS: dict[str, Callable[[str, Any, Any], float]] = {
    "exact": _best(lambda reply, answer: float(text.exact_match(reply, answer))),
    "choice": _choice,
    "yes_no": _yes_no,
    "number": _number,
    "relaxed": _relaxed,
    "expression": _expression,
    "set": _set,
    "grid": _grid,
    "ocr": _best(lambda reply, answer: max(0.0, 1 - text.word_error_rate(reply, answer))),
    "text": _best(_mean_rouge),
    "vqa": lambda reply, answer, _: text.vqa_soft_accuracy(reply, _several(answer)),
    "anls": lambda reply, answer, _: text.anls(reply, _several(answer)),
}


def check(kind: str, reply: str, answer: Any, options: Mapping[str, str] | Sequence[str] | None = None) -> float:
    """Score a reply, 0 to 1.

    Args:
        kind: one of CHECKS. `exact`, `ocr`, `text`, `vqa` and `anls` take one answer or a list of allowed ones.
        options: for `choice`: letter -> text, or texts in order.

    Raises:
        ValueError: unknown kind, or `choice` without options.
    """
    if kind not in CHECKS:
        raise ValueError(f"unknown metric {kind!r}; known: {', '.join(CHECKS)}")
    if kind == "choice":
        if not options:
            raise ValueError("metric 'choice' needs options")
        options = options if isinstance(options, Mapping) else choice.lettered(options)
    return CHECKS[kind](reply, answer, options)
