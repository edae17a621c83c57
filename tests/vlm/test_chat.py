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


@pytest.mark.parametrize(
    "texts",
    [
        ["Why?", "Why? Explain the top row."],
        ["row", "Read the top row and the left column."],
        ["use", "assistant"],
        ["user", "user"],
        ["  padded  ", "end"],
    ],
)
def test_instructions_that_occur_elsewhere_are_still_found_whole(checkpoint: Checkpoint, texts: list[str]) -> None:
    tokenizer = checkpoint.tokenizer
    messages: list[chat.Message] = []
    for turn, text in enumerate(texts):
        messages += [chat.user_message(text, images=1 - turn), {"role": "assistant", "content": "1"}]
    conversation = tokenizer.conversation(messages)
    found = words(conversation, tokenizer, "instruction")
    assert "".join(found.split()) == "".join("".join(texts).split())
    # every marked token lies in a user's turn: after its header, before its end
    shown = [tokenizer.tokenizer.decode([i], skip_special_tokens=False) for i in conversation.ids]
    header = [i for i, token in enumerate(shown) if token == "<|im_start|>"]
    assert all(conversation.spans[at + 1] == "template" for at in header)


@pytest.mark.parametrize("token", ["<image>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_written_out_special_tokens_are_refused(checkpoint: Checkpoint, token: str) -> None:
    tokenizer = checkpoint.tokenizer
    with pytest.raises(UserError, match="reserved token"):
        tokenizer.prompt_ids([chat.user_message(f"look at {token} please")])
    with pytest.raises(UserError, match="reserved token"):
        tokenizer.conversation([chat.user_message("q"), {"role": "assistant", "content": f"a{token}b"}])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"),
        ("config.json", "{"),
        ("config.json", '{"model_type": "llava"}'),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "nonsense"),
        ("generation_config.json", "["),
        ("processor_config.json", '{"image_processor": {"size": {"height": 32, "width": 32}}}'),
        ("vlm.json", "{"),
        ("chat_template.jinja", "{% if %}"),
    ],
)
def test_damaged_files_of_a_checkpoint_are_named(
    checkpoint: Checkpoint, tmp_path: Path, name: str, content: str
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(checkpoint.directory, copy)
    (copy / name).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(copy).tokenizer.prompt_ids([chat.user_message("q")])
    assert len(caught.value.message.splitlines()) == 1 or name in ("tokenizer.json", "chat_template.jinja")


def test_a_checkpoint_without_template_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(checkpoint.directory, copy)
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="chat template"):
        open_checkpoint(copy)
