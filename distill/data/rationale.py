"""Answers with a reasoning: question, steps, answer -> a conversation, and which step each of its tokens belongs to.

    {"id": "7", "image": "a.png", "question": "Q", "steps": ["s1", "s2"], "answer": "y"}

`image` may be missing or a list. Instead of `steps` a text `rationale` is taken apart: at <step> tags, else at line breaks,
else at the ends of sentences. The model learns to say the steps, a line each, and then the conclusion.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distill.data.record import Raw, Record, parse
from vlm import chat
from vlm.errors import DataError

CONCLUSION = "Therefore, the answer is {answer}."
# a full stop after these ends no sentence
ABBREVIATIONS = ("e.g", "i.e", "etc", "vs", "approx", "fig", "no", "mr", "mrs", "ms", "dr", "st", "eq", "cf", "resp")
_TAGGED = re.compile(r"<step>(.*?)</step>", re.DOTALL)
_STOP = re.compile(r"[.!?][\"')\]]*\s+")


def split_steps(text: str) -> tuple[str, ...]:
    """Steps of a reasoning given as one text; decimals and abbreviations stay whole."""
    tagged = [step.strip() for step in _TAGGED.findall(text)]
    if any(tagged):
        return tuple(filter(None, tagged))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        return tuple(lines)
    found: list[str] = []
    start = 0
    for stop in _STOP.finditer(text):
        before = text[start : stop.start()].rsplit(maxsplit=1)
        last = before[-1].lower() if before else ""
        # "e.g. this" goes on, and so does the "1." of a list
        if last.strip("(\"'") in ABBREVIATIONS or (len(before) <= 1 and last.isdigit()):
            continue
        found.append(text[start : stop.end()].strip())
        start = stop.end()
    return tuple(filter(None, [*found, text[start:].strip()]))


def parse_rationale(raw: Raw, where: str, root: Path) -> Record:
    """A record of this format as a conversation.

    Raises:
        DataError: names the record, the field, the value seen and what to do.
    """
    value = raw.value
    if not isinstance(value, dict):
        raise DataError(f"{where}: field 'question': the record is {value!r:.60}, expected an object with this field")
    question, answer = (_text(value, name, where) for name in ("question", "answer"))
    steps = _steps(value, where)
    images = value.get("image", value.get("images"))
    count = len(images) if isinstance(images, list) else int(images not in (None, ""))
    if raw.images is not None:
        count = len(raw.images)
    messages = conversation_of(question, steps, answer, count).messages
    kept = {name: value[name] for name in ("image", "images") if name in value}
    record = parse(Raw({"messages": messages, **kept}, raw.images), where, "messages", root)
    return dataclasses.replace(record, field="steps", steps=steps)


def conversation_of(question: str, steps: tuple[str, ...], answer: str, images: int) -> Record:
    """A question and its reasoned answer as turns; whoever calls brings the images."""
    said = "\n".join((*steps, CONCLUSION.format(answer=answer)))
    messages = [chat.user_message(question, images), {"role": "assistant", "content": said}]
    return Record(messages, (), "steps", steps)


def _text(value: dict[str, Any], name: str, where: str) -> str:
    found = value.get(name)
    if isinstance(found, int | float) and not isinstance(found, bool):
        found = str(found)
    if not isinstance(found, str) or not found.strip():
        raise DataError(f"{where}: field '{name}': expected a text, got {found!r:.60}")
    return found.strip()


def _steps(value: dict[str, Any], where: str) -> tuple[str, ...]:
    given = value.get("steps")
    if given is None:
        given = list(split_steps(_text(value, "rationale", where)))
    if not isinstance(given, list) or not given:
        raise DataError(f"{where}: field 'steps': expected a list of texts, got {given!r:.60}")
    for number, step in enumerate(given):
        if not isinstance(step, str) or not step.strip():
            raise DataError(f"{where}: field 'steps[{number}]': expected a text, got {step!r:.60}")
    return tuple(step.strip() for step in given)


def step_numbers(
    conversation: chat.Conversation, record: Record, tokenizer: chat.ChatTokenizer
) -> npt.NDArray[np.int16]:
    """Per token the step it belongs to, from 1; 0 for what belongs to none: prompt, conclusion, end of turn.

    A line break belongs to the step it leads to.
    """
    prompt = tokenizer.render(record.messages[:-1], add_generation_prompt=True)
    piece = tokenizer.render(record.messages, add_generation_prompt=False)[len(prompt) :]
    encoding = tokenizer.tokenizer.encode(piece, add_special_tokens=False)
    said = "\n".join(record.steps)
    first = piece.find(said)
    ends = first + np.cumsum([len(step) + 1 for step in record.steps]) - 1
    lefts = np.array([left for left, _ in encoding.offsets])
    numbers = np.searchsorted(ends, lefts, side="right") + 1
    numbers[(lefts < first) | (numbers > len(record.steps))] = 0
    found = np.zeros(len(conversation.ids), np.int16)
    found[len(found) - len(numbers) :] = numbers
    return found
