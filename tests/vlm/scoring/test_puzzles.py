"""Number puzzles: solutions checked by hand against the figures' sums, and every change of one number refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from vlm.scoring import puzzles
from vlm.scoring.puzzles import SUMS, puzzle

# numbers in the order of the letters
SOLVED = {
    "1": "ABC 6 2 4",
    "2": "ABCDEF 14 3 8 6 12 5",
    "3": "ABCDEFGHIJKLMNO 8 11 3 5 15 12 10 2 4 14 7 9 13 1 6",
    "4": "ABCDEFGHI 3 4 9 8 5 2 1 6 7",
    "5": "ABCDEFGHIJKLMNOPQ 20 15 20 5 10 10 20 5 5 10 15 5 5 5 15 20 20",
    "6": "ABCDEFGHIJKLMNOPQRS 1 11 2 12 3 13 4 14 5 10 15 6 16 7 17 8 18 9 19",
    "7": "ABCDEFGHIJKL 10 12 1 5 8 4 9 11 7 6 2 3",
    "9": "ABCDEFGHIJKLMNOPQRS 1 14 7 18 19 13 6 3 17 2 11 9 15 16 12 5 4 10 8",
    "10": "ABCDEF 6 3 1 2 5 4",
    "12": "ATCDOGPES 1 5 8 2 3 7 1 0 2",
}


def solved(number: str) -> dict[str, int]:
    letters, *values = SOLVED[number].split()
    return dict(zip(letters, map(int, values), strict=True))


@pytest.mark.parametrize("number", SOLVED)
def test_solutions(number: str) -> None:
    answer = solved(number)
    if number in SUMS:  # the sums once more, written out
        for line in SUMS[number].lines.split():
            assert sum(answer[letter] for letter in line) == SUMS[number].total
    assert puzzle(number, answer)
    assert puzzle(number, {key.lower(): f" {value} " for key, value in answer.items()})  # as text, in small letters
    for letter in answer:
        assert not puzzle(number, {**answer, letter: answer[letter] + 1}), letter
        assert not puzzle(number, {key: value for key, value in answer.items() if key != letter}), letter


def test_puzzle_8_has_no_solution() -> None:
    """B + D + E and B + E + H are both to be 20, and D and H to differ: nobody can score on it."""
    assert {"BDE", "BEH"} <= set(SUMS["8"].lines.split())
    assert not puzzle("8", dict.fromkeys(SUMS["8"].letters, 5))


def test_puzzle_11_has_no_solution() -> None:
    """Seven letters over the six numbers it allows, every combination: the published rule accepts none."""
    numbers = sorted(SUMS["11"].numbers)
    for a, c, e, g in itertools.product(numbers, repeat=4):
        if a + c == 10 and e + g == 13:
            for b, d, f in itertools.product(numbers, repeat=3):
                assert not puzzle("11", dict(zip("ABCDEFG", (a, b, c, d, e, f, g), strict=True)))


@pytest.mark.parametrize("answer", [None, [], "A: 1", {}, {"A": "x"}, {"A": None}, {"A": True}, {"A": [1]}])
@pytest.mark.parametrize("number", [*SOLVED, "8", "11"])
def test_wrong_shapes_are_wrong_answers(number: str, answer: Any) -> None:
    assert not puzzle(number, answer)


def test_matches() -> None:
    assert puzzles.match_answer({"x": [2, "b"]}, {"x": ["B", "2"]})
    assert not puzzles.match_answer({"x": 1}, {"x": 1, "y": 2})
    assert not puzzles.match_answer([1], {"x": 1})
    assert puzzles.match_coordinates([{"row": "a", "column": "1"}], {"row": "A", "column": 1})
    assert not puzzles.match_coordinates([{"row": "a"}], [{"row": "A", "column": 1}])
    first, second = {"row": "A", "column": 1}, {"row": "B", "column": 2}
    assert not puzzles.match_coordinates([second, first], [first, second])  # order counts
    assert puzzles.match_any({"id": ["B", "A"]}, [["C"], ["A", "B"]])
    assert puzzles.match_any({"id": "4"}, [4, 5])
    assert not puzzles.match_any({"id": 1, "x": 2}, [1])
    assert puzzles.match_expression({"equation": "4 * (3 - 1) = 8"}, ["5+3", "(3-1)*4 = 8"])
    assert not puzzles.match_expression({"equation": "exec('x')"}, ["1"])
    assert puzzles.match_choices("B, A", ["A", "B"])
    assert not puzzles.match_choices("A", "A,B")


@pytest.mark.parametrize(
    ("formula", "cards", "right"),
    [
        ("8/(3-8/3)=24", [3, 3, 8, 8], True),
        ("8/(3-8/3)", ["8", "8", "3", "3"], True),
        ("(13-9-1)*8", [1, 8, 9, 13], True),
        ("3*8", [3, 8, 1, 1], False),  # two cards are not used
        ("3*8*1*1*1", [3, 8, 1, 1], False),
        ("23.99999999", [24], False),
        ("4!", [4], False),
        ("__import__('os').getpid()", [4, 6], False),
        ("24", None, False),
    ],
)
def test_points_24(formula: str, cards: Any, right: bool) -> None:
    assert puzzles.points_24(formula, cards) is right
