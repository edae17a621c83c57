"""Arithmetic: exact, and never executed."""

from __future__ import annotations

import math
import random
import sys
from fractions import Fraction

import pytest

from vlm.scoring.expression import MAX_DEPTH, MAX_LENGTH, ExpressionError, evaluate, numbers, parse, same_form

HOSTILE = [
    "__import__('os').system('echo pwned')",
    "().__class__.__bases__[0].__subclasses__()",
    "open('/etc/passwd').read()",
    "exec('1')",
    "lambda: 0",
    "[x for x in (1,2)]",
    "1 if True else 2",
    "a := 3",
    "print(1)",
    "1; 2",
    "'1'",
    "1e999",
    "0x10",
    "1_000",
    "1 == 1",
    "3 // 2",
    "7 & 3",
    "None",
    "",
    "()",
    "+",
    "1 +",
    "(1",
    "1)",
    "1/0",
    "0^-1",
    "9**9**9**9",
    "2^10000",
    "(-1)^(1/3)",
    "sqrt(-1)",
    "(" * (MAX_DEPTH + 5) + "1" + ")" * (MAX_DEPTH + 5),
    "-" * 5000 + "1",
    "1+" * MAX_LENGTH + "1",
    "sqrt" * 90 + "1",
    "2^" * 60 + "1",
]


def test_the_fraction_that_floats_get_wrong() -> None:
    assert evaluate("8/(3-8/3)") == 24
    assert 8 / (3 - 8 / 3) != 24  # what a script that compares floats sees
    assert evaluate(r"\frac{8}{3-\frac{8}{3}}") == 24
    assert evaluate("8 ÷ (3 − 8 ÷ 3)") == 24


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_not_arithmetic_is_refused_without_execution(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def caught(event: str, args: tuple[object, ...]) -> None:
        if active and event in ("exec", "compile", "import", "open", "os.system", "subprocess.Popen"):
            raise AssertionError(f"{event} {args}")

    active = True
    sys.addaudithook(caught)
    try:
        with pytest.raises(ExpressionError):
            evaluate(text)
    finally:
        active = False


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-2^2", -4),
        ("2^-2", Fraction(1, 4)),
        ("2**3", 8),
        ("2^3^2", 512),
        ("8-3-2", 3),
        ("8/4/2", 1),
        ("2(3+4)", 14),
        ("(1+2)(3+4)", 21),
        ("--3", 3),
        ("1,234,567", 1234567),
        (".5+1.", Fraction(3, 2)),
        ("50%", Fraction(1, 2)),
        (r"$\frac{1}{2} \times 4$", 2),
        ("√16", 4),
        (r"\sqrt{9/4}", Fraction(3, 2)),
        ("[2+3]*2", 10),
        ("0.1+0.2", Fraction(3, 10)),
        ("4^(1/2)", 2),
    ],
)
def test_values(text: str, value: Fraction | int) -> None:
    assert evaluate(text) == value


def test_roots_and_pi_are_floats() -> None:
    assert evaluate("sqrt 2") == pytest.approx(math.sqrt(2))
    assert evaluate("2π") == pytest.approx(2 * math.pi)


def _random_tree(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.3:
        return str(rng.randint(1, 13))
    left, right = (_random_tree(rng, depth - 1) for _ in range(2))
    return f"({left}{rng.choice('+-*/')}{right})"


def test_agrees_with_python_on_fractions() -> None:
    """Against Python's own arithmetic over Fraction, on text we made ourselves."""
    import re

    rng = random.Random(0)
    compared = 0
    for _ in range(500):
        text = _random_tree(rng, 4)
        try:
            ours: object = evaluate(text)
        except ExpressionError:
            ours = None
        try:
            theirs: object = eval(re.sub(r"\d+", r"Fraction(\g<0>)", text), {"Fraction": Fraction})
        except ZeroDivisionError:
            theirs = None
        assert ours == theirs, text
        compared += ours is not None
    assert compared > 400


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("2+3*4", "4*3+2", True),
        ("(1+2)+3", "3+(2+1)", True),
        ("2*3", "3+3", False),
        ("6", "2*3", False),
        ("2-1", "1-2", False),
        ("6/2", "2/6", False),
        ("3*(2+1)", "(1+2)*3", True),
    ],
)
def test_same_form(a: str, b: str, same: bool) -> None:
    assert same_form(a, b) is same


def test_numbers_written() -> None:
    assert list(numbers(parse("8/(3-8/3)"))) == [8, 3, 8, 3]
