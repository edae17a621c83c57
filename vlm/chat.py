"""Messages -> token ids and masks: one template, one tokenizer file, the same in every room.

A message is `{"role": "user" | "assistant" | "system", "content": str | [part, ...]}` with parts
`{"type": "image"}` and `{"type": "text", "text": str}`. Needs `tokenizers` and `jinja2`, never torch.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from vlm.errors import CheckpointError, UserError
from vlm.files import read_json

Message: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class ChatSpec:
    """The ids and template a checkpoint was trained with; copied into every artefact.

    Attributes:
        latent_token_ids: special tokens the model says before every answer; nobody is shown them.
    """

    template: str
    image_token: str
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    bos_token: str = ""
    eos_token: str = ""
    latent_token_ids: tuple[int, ...] = ()

    @staticmethod
    def from_json(value: dict[str, Any]) -> ChatSpec:
        lists = {name: tuple(value.get(name, ())) for name in ("eos_token_ids", "latent_token_ids")}
        return ChatSpec(**{**value, **lists})


@dataclass(frozen=True)
class Conversation:
    """Token ids of a whole conversation and one span name per token.

    Attributes:
        spans: per token one of `image`, `instruction` (the user's own words), `response` (what the model must
            produce, end-of-turn token included), `template` (everything else).
    """

    ids: tuple[int, ...]
    spans: tuple[str, ...]


def user_message(question: str, images: int = 1) -> Message:
    """The form every checkpoint here is trained on: the images, a line break, the question."""
    parts: list[dict[str, str]] = [{"type": "image"} for _ in range(images)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": f"\n{question}" if images else question}]}


class ChatTokenizer:
    """A `tokenizer.json` and a chat template, with image placeholders expanded to the tower's token count."""

    def __init__(self, tokenizer_json: Path, spec: ChatSpec, tokens_per_image: int) -> None:
        self.spec = spec
        self.tokens_per_image = tokens_per_image
        self.tokenizer = read_tokenizer(tokenizer_json)
        self.special_ids = frozenset(
            token_id for token_id, token in self.tokenizer.get_added_tokens_decoder().items() if token.special
        )
        specials = {str(self.tokenizer.id_to_token(token_id)) for token_id in self.special_ids} | {spec.image_token}
        self._special_tokens = tuple(sorted(specials))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Template text with one image token per image (not yet expanded).

        Raises:
            UserError: a text holds a special token (it would be taken for an image or end the turn), or the template
                refuses the conversation.
        """
        for text in (text for message in messages for text in _texts(message)):
            if found := [token for token in self._special_tokens if token in text]:
                raise UserError(f"the text contains the reserved token {found[0]!r}; remove it")
        return self._render(messages, add_generation_prompt)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return render_template(self.spec, messages, add_generation_prompt)

    def expand(self, rendered: str) -> str:
        """Repeat each image token so that it covers the visual tokens of one image."""
        return rendered.replace(self.spec.image_token, self.spec.image_token * self.tokens_per_image)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to and including the header the model answers after."""
        text = self.expand(self.render(messages, add_generation_prompt=True))
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def conversation(self, messages: Sequence[Message]) -> Conversation:
        """Ids and spans of a training conversation; every assistant turn is a response span.

        Prompt and response pieces are tokenised apart, as they are when the model generates.

        Raises:
            UserError: the template rewrites earlier turns, so a response cannot be located.
        """
        ids: list[int] = []
        spans: list[str] = []
        done = ""
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:turn], add_generation_prompt=True)
            full = self.render(messages[: turn + 1], add_generation_prompt=False)
            if not prompt.startswith(done) or not full.startswith(prompt):
                raise UserError("the chat template changes earlier turns; train on one question and answer per sample")
            self._add_prompt(messages[:turn], prompt, len(self.expand(done)), ids, spans)
            self._add_response(full[len(prompt) :], ids, spans)
            done = full
        return Conversation(tuple(ids), tuple(spans))

    def _add_prompt(
        self, messages: Sequence[Message], prompt: str, start: int, ids: list[int], spans: list[str]
    ) -> None:
        whole = self.expand(prompt)
        regions = [(left - start, right - start) for left, right in self._user_regions(messages, whole)]
        encoding = self.tokenizer.encode(whole[start:], add_special_tokens=False)
        for token_id, (left, right) in zip(encoding.ids, encoding.offsets, strict=True):
            ids.append(token_id)
            if token_id == self.spec.image_token_id:
                spans.append("image")
            elif token_id not in self.special_ids and any(left < b and right > a for a, b in regions):
                spans.append("instruction")
            else:
                spans.append("template")

    def _user_regions(self, messages: Sequence[Message], whole: str) -> list[tuple[int, int]]:
        """Where the users' own words stand in the rendered prompt `whole`.

        The same messages are rendered once more with a mark in place of each text; between the marks both renderings
        agree, so the words are found even where they also occur in the template or in another turn.
        """
        texts = [text for message in messages if message["role"] == "user" for text in _texts(message)]
        marked = self.expand(self._render(_with_marks(messages), add_generation_prompt=True))
        regions: list[tuple[int, int]] = []
        at = position = 0
        for number, text in enumerate(texts):
            mark = _mark(number)
            found = marked.find(mark, at)
            position += found - at
            shown = next((form for form in (text, text.strip()) if whole.startswith(form, position)), None)
            if found < 0 or shown is None:
                raise UserError("the chat template rewrites the user's text; the instruction cannot be located")
            stripped = shown.strip()
            left = position + shown.find(stripped)
            if stripped:
                regions.append((left, left + len(stripped)))
            position += len(shown)
            at = found + len(mark)
        return regions

    def _add_response(self, piece: str, ids: list[int], spans: list[str]) -> None:
        ended = False
        for token_id in self.tokenizer.encode(piece, add_special_tokens=False).ids:
            ids.append(token_id)
            spans.append("template" if ended else "response")
            ended = ended or token_id in self.spec.eos_token_ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def render_template(spec: ChatSpec, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """A conversation through the template of `spec`, whatever its texts hold.

    Raises:
        UserError: the template refuses the conversation.
    """
    from jinja2.exceptions import TemplateError

    try:
        return str(
            _template(spec.template).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=spec.bos_token,
                eos_token=spec.eos_token,
            )
        )
    # a template is a program, and may fail in all the ways of one
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(f"the chat template refuses this conversation ({error})") from None


def _texts(message: Message) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _mark(number: int) -> str:
    return f"\x01{number}\x01"


def _with_marks(messages: Sequence[Message]) -> list[Message]:
    marked: list[Message] = []
    number = 0
    for message in messages:
        content = message["content"]
        if message["role"] == "user":
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            shown = []
            for part in parts:
                shown.append({"type": "text", "text": _mark(number)} if part["type"] == "text" else part)
                number += part["type"] == "text"
            content = shown[0]["text"] if isinstance(content, str) else shown
        marked.append({**message, "content": content})
    return marked


@functools.lru_cache(maxsize=8)
def _template(source: str) -> Any:
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    # training-only markers of the Hugging Face dialect: they print nothing
    try:
        return environment.from_string(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source))
    except TemplateError as error:
        raise CheckpointError(f"the chat template is damaged ({error}); save the processor again") from None


def spec_from_checkpoint(directory: Path) -> ChatSpec:
    """Read template and special tokens from a Hugging Face checkpoint directory.

    Raises:
        CheckpointError: tokenizer, template or image token is missing or malformed.
    """
    try:
        return _spec_from_checkpoint(directory)
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: chat settings are malformed ({type(error).__name__}: {error}); save the processor again"
        ) from None


def _spec_from_checkpoint(directory: Path) -> ChatSpec:
    config = read_json(directory / "config.json")
    settings = read_json(_need(directory / "tokenizer_config.json"))
    template_file = directory / "chat_template.jinja"
    template = template_file.read_text() if template_file.is_file() else settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not template:
        raise CheckpointError(f"{directory} has no chat template (chat_template.jinja); save the processor with one")
    tokenizer = read_tokenizer(_need(directory / "tokenizer.json"))
    image_id = config.get("image_token_id", config.get("image_token_index"))
    image_token = tokenizer.id_to_token(image_id) if image_id is not None else None
    if image_id is None or image_token is None:
        raise CheckpointError(f"{directory}/config.json: image_token_id {image_id!r} is not in the tokenizer")
    eos_token = _token_text(settings.get("eos_token"))
    pad_token = _token_text(settings.get("pad_token")) or eos_token
    eos_ids = _eos_ids(directory, config, tokenizer.token_to_id(eos_token))
    pad_id = tokenizer.token_to_id(pad_token)
    return ChatSpec(
        template=template,
        image_token=image_token,
        image_token_id=int(image_id),
        eos_token_ids=eos_ids,
        pad_token_id=eos_ids[0] if pad_id is None else int(pad_id),
        bos_token=_token_text(settings.get("bos_token")),
        eos_token=eos_token,
        latent_token_ids=tuple(int(i) for i in config.get("latent_token_ids") or ()),
    )


def _eos_ids(directory: Path, config: dict[str, Any], tokenizer_eos: int | None) -> tuple[int, ...]:
    generation = directory / "generation_config.json"
    declared = read_json(generation).get("eos_token_id") if generation.is_file() else None
    if declared is None:
        declared = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
    ids = declared if isinstance(declared, list) else [declared]
    ordered = [i for i in [tokenizer_eos, *ids] if i is not None]
    if not ordered:
        raise CheckpointError(f"{directory} names no end-of-sequence token; set eos_token_id in generation_config.json")
    return tuple(dict.fromkeys(int(i) for i in ordered))


def read_tokenizer(path: Path) -> Any:
    """Open a tokenizer.json, without the cutting and filling up that it may have been saved with.

    Hugging Face's own classes set both anew on every call; a prompt cut in the middle would be answered all the same.

    Raises:
        CheckpointError: it is damaged.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise CheckpointError(f"{path} is not a readable tokenizer ({error}); save the processor again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _token_text(value: object) -> str:
    if isinstance(value, dict):
        return str(value.get("content", ""))
    return str(value) if value else ""


def _need(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; save the processor next to the model with save_pretrained")
    return path


def tokenizer_from_checkpoint(directory: Path, tokens_per_image: int) -> ChatTokenizer:
    return ChatTokenizer(directory / "tokenizer.json", spec_from_checkpoint(directory), tokens_per_image)
