"""The digits task with its reasoning spelled out: which digit stands where, then the conclusion."""

from __future__ import annotations

from vlm import digits

# places of a line, in the order of digits.PLACES
LINES = {"top row": (0, 1), "bottom row": (2, 3), "left column": (0, 2), "right column": (1, 3)}


def reasoning(sample: digits.Sample) -> tuple[tuple[str, ...], str]:
    """(steps, answer): the digits the question is about, one a step."""
    places: tuple[int, ...] = (0, 1, 2, 3)
    for name, pair in LINES.items():
        if name in sample.question:
            places = pair
    for place, name in enumerate(digits.PLACES):
        if name in sample.question:
            places = (place,)
    steps = tuple(f"{digits.PLACES[place]} is {sample.digits[place]}" for place in places)
    answer = str(sum(sample.digits[place] for place in places)) if sample.kind == "sum" else sample.answer
    return steps, answer
