"""Chat template of an assembled student: the language model's own, taught about images, or one of ours.

A template is only taken after a trial: on a two-turn conversation with an image, vlm.chat must find image,
instruction and response spans, and transformers must render the same text.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distill.assemble import CHAT_TEMPLATE, IMAGE
from vlm import chat
from vlm.errors import CheckpointError, ToolError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# put before a template that only knows text: messages arrive there with one string each, images as placeholders
FLATTEN = (
    "{% set flat = namespace(messages=[]) %}{% for message in messages %}{% set one = namespace(text='') %}"
    "{% if message['content'] is string %}{% set one.text = message['content'] %}"
    "{% else %}{% for part in message['content'] %}"
    "{% set one.text = one.text + ('" + IMAGE + "' if part['type'] == 'image' else part['text']) %}"
    "{% endfor %}{% endif %}"
    "{% set flat.messages = flat.messages + [{'role': message['role'], 'content': one.text}] %}"
    "{% endfor %}{% set messages = flat.messages %}"
)
PARTS = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    + PARTS
    + "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# the form of LLaVA 1.5, for tokenizers without turn marks; the end-of-sequence token ends an answer
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    + PARTS
    + " {% elif message['role'] == 'assistant' %}ASSISTANT: "
    + PARTS
    + "{{ eos_token }}{% else %}"
    + PARTS
    + " {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
OURS = {
    "chatml": (CHAT_TEMPLATE, ("<|im_start|>", "<|im_end|>")),
    "llama3": (LLAMA3_TEMPLATE, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "plain": (PLAIN_TEMPLATE, ()),
}
QUESTION, ANSWER, FOLLOW_UP, SECOND = "What does the sign say?", "It says stop.", "And below?", "Wait."


@dataclass(frozen=True)
class Choice:
    """A template that passed its trial.

    Attributes:
        name: `llm` (its own), `llm+images` (its own behind FLATTEN), or a name of OURS.
        turn_end: id of the token that ends an answer.
        reasons: why the candidates before it were not taken.
    """

    name: str
    template: str
    turn_end: int
    reasons: tuple[str, ...]


def choose(tokenizer: PreTrainedTokenizerFast, where: Path) -> Choice:
    """The first template that passes: the model's own, its own taught about images, then ours by its marks.

    Raises:
        CheckpointError: none passes; says why the last one did not.
    """
    reasons: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for name, template in _candidates(tokenizer):
            try:
                return Choice(name, template, _trial(tokenizer, Path(folder), template), tuple(reasons))
            except (ToolError, ValueError) as error:
                reasons.append(f"{name}: {error}")
    raise CheckpointError(f"no chat template works with the tokenizer of {where} ({reasons[-1]})")


def _candidates(tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    own = tokenizer.chat_template
    found = [("llm", own), ("llm+images", FLATTEN + own)] if isinstance(own, str) and own else []
    known = tokenizer.get_vocab()
    return [
        *found,
        *((name, template) for name, (template, marks) in OURS.items() if all(mark in known for mark in marks)),
    ]


def _trial(tokenizer: PreTrainedTokenizerFast, folder: Path, template: str) -> int:
    """Raises ValueError (or what vlm.chat raises) with the reason the template cannot be used."""
    pad = tokenizer.pad_token_id
    spec = chat.ChatSpec(
        template=template,
        image_token=IMAGE,
        image_token_id=int(tokenizer.convert_tokens_to_ids(IMAGE)),
        eos_token_ids=(),
        pad_token_id=0 if pad is None else int(pad),
        bos_token=str(tokenizer.bos_token or ""),
        eos_token=str(tokenizer.eos_token or ""),
    )
    messages = [chat.user_message(QUESTION), _answer(ANSWER), chat.user_message(FOLLOW_UP, 0), _answer(SECOND)]
    plain = chat.ChatTokenizer(folder / "tokenizer.json", spec, 3)
    _same_text(tokenizer, plain, messages, template)
    turn_end = _turn_end(plain, messages)
    checked = chat.ChatTokenizer(
        folder / "tokenizer.json", dataclasses.replace(spec, eos_token_ids=(turn_end,)), tokens_per_image=3
    )
    conversation = checked.conversation(messages)
    spans = {
        name: [token for token, span in zip(conversation.ids, conversation.spans, strict=True) if span == name]
        for name in ("image", "instruction", "response")
    }
    if spans["image"] != [spec.image_token_id] * 3:
        raise ValueError(f"an image gives {len(spans['image'])} placeholders instead of 3")
    for name, said in (("instruction", f"{QUESTION}{FOLLOW_UP}"), ("response", f"{ANSWER}{SECOND}")):
        found = checked.decode(spans[name])
        if "".join(found.split()) != "".join(said.split()):
            raise ValueError(f"the {name} is found as {found!r}")
    if spans["response"].count(turn_end) != 2:
        raise ValueError("an answer does not end with its end-of-turn token")
    return turn_end


def _answer(text: str) -> chat.Message:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _same_text(
    tokenizer: PreTrainedTokenizerFast, ours: chat.ChatTokenizer, messages: list[chat.Message], template: str
) -> None:
    from jinja2.exceptions import TemplateError

    for shown, prompt in ((messages[:1], True), (messages, False)):
        try:
            theirs = tokenizer.apply_chat_template(
                shown, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"it takes no lists of parts ({error})") from None
        if theirs != ours.render(shown, prompt):
            raise ValueError("its text depends on more than the messages (a date, for example)")


def _turn_end(tokenizer: chat.ChatTokenizer, messages: list[chat.Message]) -> int:
    prompt = tokenizer.render(messages[:1], add_generation_prompt=True)
    full = tokenizer.render(messages[:2], add_generation_prompt=False)
    if not full.startswith(prompt):
        raise ValueError("the prompt of an answer is not how the answered turn begins")
    ids = tokenizer.tokenizer.encode(full[len(prompt) :], add_special_tokens=False).ids
    ends = [token for token in ids if token in tokenizer.special_ids]
    if not ends:
        raise ValueError("no special token ends an answer")
    return int(ends[0])
