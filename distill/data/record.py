"""One record of any supported format -> messages of text and image parts, and where its images are. No torch.

llava     {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nQ"}, {"from": "gpt", ...}]}
sharegpt  the same with roles user, assistant, system or several `images`; also {"messages": [{"role", "content"}]}
messages  {"messages": [{"role", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}], "images": [...]}
rationale {"image": "a.png", "question": "Q", "steps": ["...", "..."], "answer": "A"} (see distill.data.rationale)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from PIL import Image

from distill.data.images import FileSlice, ImageSource, Inline, from_data_url
from vlm.chat import Message
from vlm.errors import BadImage, DataError

Format = Literal["llava", "sharegpt", "messages", "rationale"]
FORMATS: tuple[Format, ...] = ("llava", "sharegpt", "messages", "rationale")
NAMES = {"llava": "LLaVA", "sharegpt": "ShareGPT", "messages": "HF messages", "rationale": "rationales"}
KEYS = {"llava": ("conversations",), "sharegpt": ("conversations", "messages"), "messages": ("messages",)}
IMAGE_MARK = "<image>"
LONGEST_PATH, LONGEST_NAME = 4000, 255
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Raw:
    """A record as the container gave it; `images` are those the container holds beside it (tar members)."""

    value: Any
    images: tuple[ImageSource, ...] | None = None


@dataclass(frozen=True)
class Record:
    """A checked conversation: it starts with a question, ends with an answer, and every image part has a source.

    Attributes:
        steps: of the answer's reasoning, where the record spells them out.
    """

    messages: list[Message]
    images: tuple[ImageSource, ...]
    field: str
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    """A piece of a turn: text, or an image with its own source or its place in the record's list."""

    text: str | None = None
    image: Any = None
    index: int | None = None

    @property
    def blank(self) -> bool:
        return self.text is not None and not self.text.strip()


def detect(values: Iterable[Any], where: str) -> Format:
    """Format of the first records.

    Raises:
        DataError: the first of them has neither `conversations` nor `messages`.
    """
    values = [value for value in values if isinstance(value, dict)]
    if not values:
        raise DataError(f"{where}: no field 'conversations' or 'messages'; expected an object with one of them")
    first = values[0]
    if "conversations" in first:
        plain = all(
            not value.get("images") and not value.get("system") and set(_roles(value)) <= {"human", "gpt"}
            for value in values
        )
        return "llava" if plain else "sharegpt"
    if "messages" in first:
        turns = [turn for value in values for turn in _list(value.get("messages")) if isinstance(turn, dict)]
        return "sharegpt" if turns and all(isinstance(turn.get("content"), str) for turn in turns) else "messages"
    if "question" in first and ("steps" in first or "rationale" in first):
        return "rationale"
    raise DataError(
        f"{where}: no field 'conversations' (LLaVA, ShareGPT) or 'messages' (HF), it has {_shown(sorted(first))}; "
        "rename the field that holds the turns"
    )


def parse(raw: Raw, where: str, form: Format, root: Path) -> Record:
    """Check one record and bring it into the form the models are trained on.

    Args:
        where: what the record is called in messages.
        root: folder that image names are relative to.

    Raises:
        DataError: names the record, the field, the value seen and what to do.
    """
    if form == "rationale":
        from distill.data.rationale import parse_rationale

        return parse_rationale(raw, where, root)
    value = raw.value
    key = next((k for k in KEYS[form] if isinstance(value, dict) and k in value), KEYS[form][0])
    if not isinstance(value, dict):
        _fail(where, key, f"the record is {_shown(value)}, expected an object with this field")
    if key not in value:
        fields = ", ".join(sorted(map(str, value)))
        _fail(where, key, f"missing; the record has {fields or 'no field at all'} and the format is {NAMES[form]}")
    listed, field = _listed_images(raw, where, root)
    if not isinstance(value[key], list):
        _fail(where, key, f"expected a list of turns, got {_shown(value[key])}")
    if not value[key]:
        _fail(where, key, "an empty conversation; remove the record")
    turns = [_turn(turn, where, f"{key}[{number}]") for number, turn in enumerate(value[key])]
    if isinstance(value.get("system"), str) and value["system"].strip():
        _check_text(value["system"], where, "system")
        turns.insert(0, ("system", [_Part(value["system"])]))
    _check_order(turns, where, key)
    if key == "messages" and listed and not _images(turns):
        # the convention for text-only turns beside an image column: the images belong to the first question
        first = next(parts for role, parts in turns if role == "user")
        first[:0] = [_Part() for _ in listed]
    turns = [(role, _image_first(parts) if role == "user" else parts) for role, parts in turns]
    sources = _sources(_images(turns), listed, where, field, root)
    return Record([{"role": role, "content": _content(parts)} for role, parts in turns], sources, key)


def _turn(turn: Any, where: str, field: str) -> tuple[str, list[_Part]]:
    if not isinstance(turn, dict):
        _fail(where, field, f"expected an object with a role and a text, got {_shown(turn)}")
    role_key = "from" if "from" in turn else "role"
    text_key = "value" if "value" in turn else "content"
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in ROLES:
        _fail(where, f"{field}.{role_key}", f"role {_shown(role)} is unknown; use one of {', '.join(ROLES)}")
    content = turn.get(text_key)
    if isinstance(content, str):
        _check_text(content, where, f"{field}.{text_key}")
        pieces = content.split(IMAGE_MARK)
        parts = [_Part(pieces[0])]
        for piece in pieces[1:]:
            parts += [_Part(), _Part(piece)]
        parts = [part for part in parts if part.text != ""]
    elif isinstance(content, list):
        parts = [_part(item, where, f"{field}.{text_key}[{number}]") for number, item in enumerate(content)]
    else:
        _fail(where, f"{field}.{text_key}", f"expected a text or a list of parts, got {_shown(content)}")
    if ROLES[role] != "user" and any(part.text is None for part in parts):
        _fail(where, f"{field}.{text_key}", f"an image in a turn of {role!r}; images belong to the user's turns")
    if all(part.blank for part in parts):
        _fail(where, f"{field}.{text_key}", f"the turn of {role!r} is empty; remove the record or fill it in")
    return ROLES[role], parts


def _part(item: Any, where: str, field: str) -> _Part:
    if isinstance(item, str):
        item = {"type": "text", "text": item}
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text":
        text = item.get("text")
        if not isinstance(text, str):
            _fail(where, f"{field}.text", f"expected a text, got {_shown(text)}")
        _check_text(text, where, f"{field}.text")
        if IMAGE_MARK in text:
            _fail(where, f"{field}.text", f'{IMAGE_MARK} inside a text part; write it as {{"type": "image"}}')
        return _Part(text)
    if kind not in ("image", "image_url"):
        _fail(where, field, f"expected a part of type text or image, got {_shown(item if kind is None else kind)}")
    own = next((item[k] for k in ("image", "image_url", "url", "path") if item.get(k) is not None), None)
    if isinstance(own, dict) and "url" in own:
        own = own["url"]
    index = item.get("index")
    return _Part(None, own, index if isinstance(index, int) else None)


def _check_order(turns: list[tuple[str, list[_Part]]], where: str, key: str) -> None:
    roles = [role for role, _ in turns]
    if "system" in roles[1:]:
        _fail(where, key, f"turn {roles.index('system', 1)} is from 'system'; a system turn can only come first")
    start = 1 if roles[0] == "system" else 0
    if roles[start:] and roles[start] == "assistant":
        _fail(where, key, "starts with an answer; remove that turn so that it starts with a question")
    if roles[-1] != "assistant":
        _fail(where, key, f"ends with a turn from {roles[-1]!r}; it must end with an answer from 'gpt' or 'assistant'")


def _image_first(parts: list[_Part]) -> list[_Part]:
    """Images that stand together go first, then a line break and the words, as in `vlm.chat.user_message`.

    Attention is causal: a question before its image could not look at it. Images among the words stay where they are.
    """
    at = [place for place, part in enumerate(parts) if part.text is None]
    if not at or any(part.text is not None and not part.blank for part in parts[at[0] : at[-1]]):
        return parts
    words = [part.text.strip() for part in parts if part.text is not None and not part.blank]
    return [parts[place] for place in at] + ([_Part("\n" + " ".join(words))] if words else [])


def _images(turns: list[tuple[str, list[_Part]]]) -> list[_Part]:
    return [part for _, parts in turns for part in parts if part.text is None]


def _content(parts: list[_Part]) -> list[dict[str, str]]:
    return [{"type": "image"} if part.text is None else {"type": "text", "text": part.text} for part in parts]


def _listed_images(raw: Raw, where: str, root: Path) -> tuple[list[ImageSource], str]:
    """The record's own list of images and the field it stands in; tar members beside the record come first."""
    if raw.images is not None:
        return list(raw.images), "image (tar members)"
    given = {k: raw.value[k] for k in ("image", "images") if raw.value.get(k) not in (None, "", [])}
    if len(given) == 2 and given["images"] not in (given["image"], [given["image"]]):
        _fail(where, "image", "'image' and 'images' are both set and differ; keep one")
    field = next(iter(given), "image")
    value = given.get(field, [])
    values = value if isinstance(value, list) else [value]
    return [_source(item, where, f"{field}[{number}]", root) for number, item in enumerate(values)], field


def _sources(
    marks: list[_Part], listed: list[ImageSource], where: str, field: str, root: Path
) -> tuple[ImageSource, ...]:
    """One source per mark: its own, the one it numbers, or the next of the record's list."""
    own = sum(mark.image is not None for mark in marks)
    indexed = [mark.index for mark in marks if mark.image is None and mark.index is not None]
    if bad := [i for i in indexed if not 0 <= i < len(listed)]:
        _fail(where, field, f"a part asks for image {bad[0]} but there are {len(listed)}")
    by_index = len(indexed) == len(marks) - own and set(indexed) == set(range(len(listed)))
    if not by_index and len(marks) - own != len(listed):
        _fail(where, field, f"{len(marks) - own} {IMAGE_MARK} marks but {len(listed)} images; they must be equal")
    rest = iter([listed[i] for i in indexed] if by_index else listed)
    return tuple(
        next(rest) if mark.image is None else _source(mark.image, where, f"image part {number}", root)
        for number, mark in enumerate(marks)
    )


def _source(value: Any, where: str, field: str, root: Path) -> ImageSource:
    """A file name, encoded bytes, an image column's {"bytes", "path"} or a decoded image."""
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        name = str(value.get("path") or "inline image")
        data = value.get("bytes")
        if data and not isinstance(data, bytes):
            _fail(where, f"{field}.bytes", f"expected bytes, got {_shown(data)}; base64 goes into a data URL")
        value = Inline(data, name) if data else value.get("path")
    if isinstance(value, bytes):
        value = Inline(value, "inline image")
    if isinstance(value, str) and value.startswith("data:"):
        try:
            return from_data_url(value, "inline image")
        except BadImage as error:
            _fail(where, field, str(error))
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        _fail(where, field, f"{_shown(value)} is a web address; download the images and name the files")
    if isinstance(value, str) and value and "\0" not in value:
        _check_text(value, where, field)
        # a name no file system takes; most often it is the image itself
        if len(value.encode()) > LONGEST_PATH or max(map(len, value.encode().split(b"/"))) > LONGEST_NAME:
            _fail(where, field, f"{_shown(value)} is no file name; image data is written as data:image/png;base64,...")
        return root / value
    if not isinstance(value, Path | Inline | FileSlice | Image.Image):
        _fail(where, field, f"expected a file name or image bytes, got {_shown(value)}")
    return value


def _check_text(text: str, where: str, field: str) -> None:
    """Half of a surrogate pair is no character: no tokenizer and no file system takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        _fail(
            where, field, f"character {error.start} is {text[error.start]!r}, half of a surrogate pair; repair the text"
        )


def _roles(value: dict[str, Any]) -> list[str]:
    return [str(turn.get("from")) for turn in _list(value.get("conversations")) if isinstance(turn, dict)]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _fail(where: str, field: str, message: str) -> NoReturn:
    raise DataError(f"{where}: field '{field}': {message}")
