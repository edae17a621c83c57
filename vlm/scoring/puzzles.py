"""MME-Reasoning's number puzzles (letters stand for circles in a figure) and its match functions, on parsed answers.

Each takes what `mme_reasoning.extract` read from the reply; anything of the wrong shape is a wrong answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from vlm.scoring.answers import Atom, atom
from vlm.scoring.expression import ExpressionError, numbers, parse, same_form, value


@dataclass(frozen=True)
class Sums:
    """Put numbers on the letters so that every line has the same total.

    Attributes:
        letters: all that must be given.
        numbers: the set of values they must have; empty where only the lines count.
        lines: letters per line; `plus` is added to a line where the figure shows a number of its own.
    """

    letters: str
    numbers: frozenset[int]
    lines: str
    total: int
    plus: tuple[int, ...] = ()


def _to(last: int) -> frozenset[int]:
    return frozenset(range(1, last + 1))


SUMS: dict[str, Sums] = {
    "2": Sums("ABCDEF", frozenset(), "ABC CEF ADF", 25),
    "3": Sums("ABCDEFGHIJKLMNO", _to(15), "ADEH CEGH IGJH NMJH OMHL KLHF BFHD", 30),
    "4": Sums("ABCDEFGHI", _to(9), "ABED BCEF DEGH EFHI BDHF ACIG", 20),
    "5": Sums("ABCDEFGHIJKLMNOPQ", frozenset(), "ABC AGO OPQ CKQ ADINQ CFILO BEIMP GHIJK", 55),
    "6": Sums("ABCDEFGHIJKLMNOPQRS", _to(19), "AJS CJQ EJO GJM IJK LJH NJF PJD RJB", 30),
    "7": Sums("ABCDEFGHIJKL", _to(12), "ACFH ADGK BCDE HIJK BFIL EGJL", 26),
    "8": Sums("ABCDEFGHIJKLM", frozenset(), "ABC AFK BDE BEH CHM DGJ EGI FIL HJI KLM", 20),
    "9": Sums("ABCDEFGHIJKLMNOPQRS", _to(19), "ABC ADH AEJ CFJ CGL HIJ HMQ JKL JNQ JOS LPS QRS", 22),
    "11": Sums("ABCDEFG", frozenset((1, 2, 3, 5, 7, 8)), "AC BCD FED EG", 19, (9, 0, 0, 6)),
}
STOCK = {20: 5, 15: 3, 10: 3, 5: 6}  # puzzle 5: how many stones of each value there are


def puzzle(number: str, answer: Any) -> bool:
    """Is `answer` (letter -> number) a solution of puzzle "1" to "12"?"""
    wanted = {"1": "ABC", "10": "ABCDEF", "12": "CATDOGPES"}.get(number) or SUMS[number].letters
    given = _values(answer, wanted)
    if given is None:
        return False
    if number == "1":
        return given["B"] != 0 and given["A"] == 3 * given["B"] and given["C"] == 2 * given["B"]
    if number == "10":
        sums = {sum(given[letter] for letter in line) for line in ("ABD", "DEF", "ACF")}
        return set(given.values()) == _to(6) and len(sums) == 1
    if number == "12":
        return _word(given, "CAT") + _word(given, "DOG") == _word(given, "PETS")
    if number == "5":
        counts = Counter(given.values())
        if any(have > STOCK.get(int(stone), 0) or stone.denominator != 1 for stone, have in counts.items()):
            return False
    if number == "8" and (len(set(given.values())) != len(given) or any(not 1 <= v <= 15 for v in given.values())):
        return False
    return _solves(SUMS[number], given)


def _solves(sums: Sums, given: Mapping[str, Fraction]) -> bool:
    if sums.numbers and set(given.values()) != sums.numbers:
        return False
    lines = sums.lines.split()
    plus = sums.plus or (0,) * len(lines)
    return all(sum(given[letter] for letter in line) + p == sums.total for line, p in zip(lines, plus, strict=True))


def _values(answer: Any, letters: str) -> dict[str, Fraction] | None:
    """Letter -> number, if every letter has one."""
    if not isinstance(answer, Mapping):
        return None
    found = {str(key).strip().upper(): atom(one) for key, one in answer.items() if not isinstance(one, bool)}
    values: dict[str, Fraction] = {}
    for letter in letters:
        number = found.get(letter)
        if not isinstance(number, Fraction):
            return None
        values[letter] = number
    return values


def _word(given: Mapping[str, Fraction], word: str) -> Fraction:
    total = Fraction(0)
    for letter in word:
        total = 10 * total + given[letter]
    return total


def _plain(given: Any) -> Atom | frozenset[Atom]:
    return frozenset(atom(one) for one in given) if isinstance(given, list) else atom(given)


def match_answer(answer: Any, want: Any) -> bool:
    """Every key of the known answer has its value; lists match as sets."""
    if not isinstance(answer, Mapping) or not isinstance(want, Mapping):
        return False
    said = {str(key).strip().casefold(): _plain(one) for key, one in answer.items()}
    return all(said.get(str(key).strip().casefold()) == _plain(one) for key, one in want.items())


def match_coordinates(answer: Any, want: Any) -> bool:
    """Lists of {row, column}, in order."""
    try:
        said, wanted = (
            [(atom(p["row"]), atom(p["column"])) for p in ([v] if isinstance(v, Mapping) else v)]
            for v in (answer, want)
        )
    except (TypeError, KeyError):
        return False
    return said == wanted


def match_any(answer: Any, allowed: Any) -> bool:
    """{"id": value} where the value, as a set if it is a list, is one of the allowed ones."""
    if not isinstance(answer, Mapping) or len(answer) != 1 or not isinstance(allowed, list):
        return False
    said = next(iter(answer.values()))
    if isinstance(said, list):
        allowed = [one if isinstance(one, list) else [one] for one in allowed]
    return _plain(said) in [_plain(one) for one in allowed]


def match_expression(answer: Any, allowed: Any) -> bool:
    """{"equation": text} whose left side is one of the allowed calculations, up to order."""
    if not isinstance(answer, Mapping) or not isinstance(answer.get("equation"), str):
        return False
    left = answer["equation"].split("=")[0]
    for one in allowed if isinstance(allowed, list) else [allowed]:
        try:
            if same_form(left, str(one).split("=")[0]):
                return True
        except ExpressionError:
            continue
    return False


def match_choices(answer: str, want: Any) -> bool:
    """Sets of option letters, whatever their order."""
    wanted = want if isinstance(want, list) else str(want).strip("[]").split(",")
    letters = {str(one).strip().strip("'\"").upper() for one in wanted}
    return {one.strip().upper() for one in answer.split(",")} == letters


def points_24(formula: str, cards: Any) -> bool:
    """The calculation gives exactly 24 and uses each card once."""
    try:
        tree = parse(formula.split("=")[0])
        return value(tree) == 24 and sorted(numbers(tree)) == sorted(Fraction(str(card)) for card in cards)
    except (ExpressionError, TypeError, ValueError):
        return False
