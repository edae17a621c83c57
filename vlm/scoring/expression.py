"""Arithmetic as people and models write it, in exact fractions. A parser of our own: no text is ever executed.

sum     = product (("+" | "-") product)*
product = sign (("*" | "/" | juxtaposition of brackets) sign)*
sign    = ("+" | "-") sign | power
power   = atom ("^" sign)?
atom    = number | "(" sum ")" | sqrt atom | frac {sum} {sum} | pi
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 400
MAX_DEPTH = 40
MAX_BITS = 4096
MAX_POWER = 64
Value = Fraction | float

_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*|\.\d+)|(\*\*|[-+*/^(){}%])|\\?(sqrt|frac|dfrac|tfrac|pi)\b)")
_PLAIN = {
    "×": "*",
    "·": "*",
    "⋅": "*",
    "∗": "*",
    "÷": "/",
    "∕": "/",
    "−": "-",
    "–": "-",
    "[": "(",
    "]": ")",
    "（": "(",
    "）": ")",
    "√": "sqrt ",
    "π": "pi ",
    "$": "",
    "\\times": "*",
    "\\cdot": "*",
    "\\div": "/",
    "\\left": "",
    "\\right": "",
    "\\(": "",
    "\\)": "",
    "\\,": "",
    "\\!": "",
}


class ExpressionError(ValueError):
    """Not arithmetic, too long, too deep, or without a value."""


@dataclass(frozen=True)
class Node:
    """`kind` is number, neg, +, *, inverse, ^, sqrt or pi; sums and products hold any number of parts."""

    kind: str
    parts: tuple[Node, ...] = ()
    number: Fraction = Fraction(0)


def parse(text: str) -> Node:
    """Text -> tree.

    Raises:
        ExpressionError: what cannot be read, or is over the limits.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"longer than {MAX_LENGTH} characters")
    for mark, plain in _PLAIN.items():
        text = text.replace(mark, plain)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    tokens: list[str] = []
    place = 0
    while text[place:].strip():
        match = _TOKEN.match(text, place)
        if not match:
            raise ExpressionError(f"unexpected {text[place:].strip()[:1]!r}")
        tokens.append(match[1] or match[2] or match[3])
        place = match.end()
    return _Parser(tokens).whole()


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.place, self.depth = tokens, 0, 0

    def whole(self) -> Node:
        node = self.sum()
        if self.peek():
            raise ExpressionError(f"unexpected {self.peek()!r}")
        return node

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise ExpressionError(f"expected {expected or 'a number'}, found {token or 'the end'}")
        self.place += 1
        return token

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExpressionError(f"nested deeper than {MAX_DEPTH}")
        parts = [self.product()]
        while self.peek() in ("+", "-"):
            negative = self.take() == "-"
            part = self.product()
            parts.append(Node("neg", (part,)) if negative else part)
        self.depth -= 1
        return parts[0] if len(parts) == 1 else Node("+", tuple(parts))

    def product(self) -> Node:
        parts = [self.sign()]
        while self.peek() in ("*", "/", "(", "sqrt", "pi", "frac", "dfrac", "tfrac"):
            inverse = False
            if self.peek() in ("*", "/"):
                inverse = self.take() == "/"
            part = self.sign()
            parts.append(Node("inverse", (part,)) if inverse else part)
        return parts[0] if len(parts) == 1 else Node("*", tuple(parts))

    def sign(self) -> Node:
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        node = self.power()
        return Node("neg", (node,)) if negative else node

    def power(self) -> Node:
        base = self.atom()
        if self.peek() in ("^", "**"):
            self.take()
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise ExpressionError(f"nested deeper than {MAX_DEPTH}")
            node = Node("^", (base, self.sign()))
            self.depth -= 1
            return node
        if self.peek() == "%":
            self.take()
            return Node("*", (base, Node("number", number=Fraction(1, 100))))
        return base

    def atom(self) -> Node:
        mark = self.take()
        if mark in ("(", "{"):
            node = self.sum()
            self.take(")" if mark == "(" else "}")
            return node
        if mark in ("frac", "dfrac", "tfrac"):
            upper, lower = (self.braced() for _ in range(2))
            return Node("*", (upper, Node("inverse", (lower,))))
        if mark == "sqrt":
            return Node("sqrt", (self.nested_atom(),))
        if mark == "pi":
            return Node("pi")
        if not (mark[0].isdigit() or mark[0] == "."):
            raise ExpressionError(f"unexpected {mark!r}")
        return Node("number", number=Fraction(mark.rstrip(".")))

    def nested_atom(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExpressionError(f"nested deeper than {MAX_DEPTH}")
        node = self.atom()
        self.depth -= 1
        return node

    def braced(self) -> Node:
        self.take("{")
        node = self.sum()
        self.take("}")
        return node


def value(node: Node) -> Value:
    """Exact where the result is rational; a float only through a root or pi.

    Raises:
        ExpressionError: division by zero, a root of a negative number, a power or number over the limits.
    """
    if node.kind == "number":
        return node.number
    if node.kind == "pi":
        return math.pi
    parts = [value(part) for part in node.parts]
    try:
        result = _combine(node.kind, parts)
    except (ZeroDivisionError, OverflowError, ValueError) as error:
        raise ExpressionError(str(error)) from None
    if isinstance(result, Fraction) and max(result.numerator.bit_length(), result.denominator.bit_length()) > MAX_BITS:
        raise ExpressionError(f"a number of more than {MAX_BITS} bits")
    return result


def _combine(kind: str, parts: list[Value]) -> Value:
    if kind == "+":
        total: Value = Fraction(0)
        for part in parts:
            total += part
        return total
    if kind == "*":
        total = Fraction(1)
        for part in parts:
            total *= part
        return total
    if kind == "neg":
        return -parts[0]
    if kind == "inverse":
        return 1 / parts[0]
    if kind == "^":
        return _power(parts[0], parts[1])
    return _root(parts[0])


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        if abs(exponent) > MAX_POWER:
            raise ExpressionError(f"a power above {MAX_POWER}")
        return base ** int(exponent)
    if exponent == Fraction(1, 2):
        return _root(base)
    result = float(base) ** float(exponent)
    if isinstance(result, complex):
        raise ExpressionError("not a real number")
    return float(result)


def _root(square: Value) -> Value:
    if isinstance(square, Fraction) and square >= 0:
        upper, lower = math.isqrt(square.numerator), math.isqrt(square.denominator)
        if upper**2 == square.numerator and lower**2 == square.denominator:
            return Fraction(upper, lower)
    return math.sqrt(square)


def evaluate(text: str) -> Value:
    """Text -> number; see `parse` and `value`."""
    return value(parse(text))


def numbers(node: Node) -> Iterator[Fraction]:
    """The numbers written in an expression, in order."""
    if node.kind == "number":
        yield node.number
    for part in node.parts:
        yield from numbers(part)


def canonical(node: Node) -> tuple[object, ...]:
    """Equal for expressions that differ only in the order of terms and factors, or in brackets that change nothing."""
    if node.kind == "number":
        return ("number", str(node.number))
    if node.kind in ("+", "*"):
        flat = list(_flatten(node, node.kind))
        return (node.kind, *sorted((canonical(part) for part in flat), key=repr))
    return (node.kind, *(canonical(part) for part in node.parts))


def _flatten(node: Node, kind: str) -> Iterator[Node]:
    for part in node.parts:
        if part.kind == kind:
            yield from _flatten(part, kind)
        else:
            yield part


def same_form(a: str, b: str) -> bool:
    """Do two texts write the same calculation, up to order? `3 * (2 + 1)` is `(1 + 2) * 3` but not 9.

    Raises:
        ExpressionError: one of them is not arithmetic.
    """
    return canonical(parse(a)) == canonical(parse(b))
