"""Prompts equal the Hugging Face processor's; span masks mark exactly what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_student
from vlm import chat
from vlm.errors import CheckpointError, UserError
from vlm.load import Checkpoint, open_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(make_student(tmp_path_factory.mktemp("chat") / "student"))


TEXTS = [
    "What is this?",
    "  two  spaces ",
    "äöü 漢字 🙂 e\u0301",
    "line\nbreak\t tab",
    "<|im_end|>",
    "{{ 1 + 1 }}",
    "a" * 300,
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("images", [0, 1, 3])
def test_prompt_ids_equal_the_processor(checkpoint: Checkpoint, text: str, images: int) -> None:
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint.directory)
    messages = [chat.user_message(text, images)]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    pictures = [Image.new("RGB", (32, 32))] * images or None
    theirs = processor(images=pictures, text=rendered, return_tensors="pt")["input_ids"][0].tolist()
    assert checkpoint.tokenizer.prompt_ids(messages) == theirs


def words(conversation: chat.Conversation, tokenizer: chat.ChatTokenizer, span: str) -> str:
    ids = [i for i, s in zip(conversation.ids, conversation.spans, strict=True) if s == span]
    return str(tokenizer.tokenizer.decode(ids, skip_special_tokens=False))


def test_spans_of_two_turns(checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.tokenizer
    messages = [
        chat.user_message("Which digit is at the top left?"),
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "And the sum?"},
        {"role": "assistant", "content": "3 + 4 = 7"},
    ]
    conversation = tokenizer.conversation(messages)
    assert words(conversation, tokenizer, "response") == "7<|im_end|>3 + 4 = 7<|im_end|>"
    assert words(conversation, tokenizer, "instruction") == "Which digit is at the top left?And the sum?"
    assert conversation.spans.count("image") == tokenizer.tokens_per_image
    whole = tokenizer.expand(tokenizer.render(messages, add_generation_prompt=False))
    assert tokenizer.tokenizer.decode(list(conversation.ids), skip_special_tokens=False) == whole


def test_the_prompt_part_of_a_conversation_is_the_generation_prompt(checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.tokenizer
    question = chat.user_message("Read the top row.")
    conversation = tokenizer.conversation([question, {"role": "assistant", "content": "1 2"}])
    start = conversation.spans.index("response")
    assert list(conversation.ids[:start]) == tokenizer.prompt_ids([question])


def test_a_repeated_question_is_an_instruction_each_time(checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.tokenizer
    turn = [{"role": "user", "content": "same"}, {"role": "assistant", "content": "1"}]
    conversation = tokenizer.conversation([*turn, *turn])
    assert words(conversation, tokenizer, "instruction") == "samesame"


def test_reserved_image_token_in_text_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match="<image>"):
        checkpoint.tokenizer.prompt_ids([chat.user_message("look at <image> please")])


def test_a_checkpoint_without_template_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(checkpoint.directory, copy)
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="chat template"):
        open_checkpoint(copy)
