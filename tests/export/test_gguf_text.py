"""Text in GGUF files: splitting rules, normalisers, chat templates that other programs render as in training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.cli import main
from export.corpus import COUNT, corpus
from export.gguf_tokens import SPLITS, normaliser_name, pre_tokenizer_name, template_for_lists
from tests.tiny import make_student
from vlm.errors import CheckpointError
from vlm.manifest import read_manifest


def test_the_corpus_holds_every_kind_of_text() -> None:
    texts = corpus(["<|im_start|>", "<image>"])
    assert len(set(texts)) == len(texts) == COUNT
    assert texts == corpus(["<|im_start|>", "<image>"])
    for piece in ("<|im_start|>", "👩‍👩‍👧‍👦", "日本語", "العربية", "def f(x", "\r\n", "1234567890", "e\u0301"):
        assert sum(piece in text for text in texts) > 3, piece


def _tokenizer(steps: list[dict[str, Any]], **model: Any) -> dict[str, Any]:
    return {"model": {"type": "BPE", **model}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def test_pre_tokenisers_are_named_by_their_exact_rule() -> None:
    from distill.assemble import QWEN2_SPLIT

    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}

    def split(pattern: str) -> dict[str, Any]:
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

    llama3 = QWEN2_SPLIT.replace("\\p{N}|", "\\p{N}{1,3}|", 1)
    assert pre_tokenizer_name(_tokenizer([split(QWEN2_SPLIT), plain])) == "qwen2"
    assert pre_tokenizer_name(_tokenizer([split(llama3), plain], ignore_merges=True)) == "llama-bpe"
    assert pre_tokenizer_name(_tokenizer([split(llama3), plain])) == "smaug-bpe"
    digits = {"type": "Digits", "individual_digits": True}
    assert pre_tokenizer_name(_tokenizer([digits, {**plain, "use_regex": True}])) == "smollm"
    assert pre_tokenizer_name(_tokenizer([{**plain, "use_regex": True}])) == "gpt-2"
    for wrong in ([split(QWEN2_SPLIT.replace("+", "*", 1)), plain], [plain], [split(QWEN2_SPLIT)]):
        with pytest.raises(CheckpointError, match="no exact counterpart"):
            pre_tokenizer_name(_tokenizer(wrong))


def test_normalisers() -> None:
    assert normaliser_name({"normalizer": None}) is None
    assert normaliser_name({"normalizer": {"type": "NFC"}}) == "NFC"
    with pytest.raises(CheckpointError, match="Lowercase"):
        normaliser_name({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}})


def _with_tokenizer(directory: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    path = directory / "tokenizer.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return directory


def test_a_tokenizer_that_normalises_to_nfc(tmp_path: Path) -> None:
    """As published Qwen tokenizers do: equal on normalised text."""
    student = make_student(tmp_path / "student", hidden=64, head_dim=16, intermediate=64)
    _with_tokenizer(student, lambda value: value.update(normalizer={"type": "NFC"}))
    command = ["--target", "gguf", "--precision", "f16", "--samples", "0", "--student", str(student)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    said = read_manifest(tmp_path / "out").parity["tokenisation"]
    assert said["normalised"]
    assert said["different"] == 0


STRINGS_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGES_FIRST = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(("template", "kept"), [(None, True), (STRINGS_ONLY, False), (IMAGES_FIRST, False)])
def test_templates_accept_what_servers_send(subjects: Callable[..., Any], template: str | None, kept: bool) -> None:
    """Parts with a marker in the image's place, and plain strings, give the prompt of training."""
    from vlm.chat import render_template

    tokenizer = subjects("siglip", "qwen2").student.checkpoint.tokenizer
    spec = tokenizer.spec if template is None else dataclasses.replace(tokenizer.spec, template=template)
    made = template_for_lists(type("Tokenizer", (), {"spec": spec})())
    assert (made == spec.template) is kept
    other = dataclasses.replace(spec, template=made)

    def prompt(which: Any, content: Any) -> str:
        return render_template(which, [{"role": "user", "content": content}], add_generation_prompt=True)

    text = {"type": "text", "text": "What?"}
    wanted = prompt(spec, [{"type": "image"}, text]).replace("<image>", "<__media__>")
    assert prompt(other, [{"type": "text", "text": "<__media__>"}, text]) == wanted
    assert prompt(other, "What?") == prompt(spec, [text])


def test_a_template_that_loses_parts_is_refused(subjects: Callable[..., Any]) -> None:
    tokenizer = subjects("siglip", "qwen2").student.checkpoint.tokenizer
    spec = dataclasses.replace(tokenizer.spec, template="{{ messages[0]['content'][0]['text'] }}")
    with pytest.raises(CheckpointError, match="chat template"):
        template_for_lists(type("Tokenizer", (), {"spec": spec})())


TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
RULES = [
    *((name, pattern, ignored) for (pattern, ignored), name in SPLITS.items()),
    ("gpt-2", "", False),
    ("smollm", "", False),
]


def trained(name: str, pattern: str, ignored: bool) -> Any:
    """A tokenizer of one rule with pieces of every kind of text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignored))
    first = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)]}.get(
        name, [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    )
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, last]) if first else last
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, max_token_length=32, show_progress=False)
    tokenizer.train_from_iterator(corpus([])[:400], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS])
    return tokenizer


def different(tokenizer: Any, rule: str, path: Path) -> list[str]:
    theirs = vocabulary(tokenizer, rule, path)
    return [t for t in corpus(TOKENS) if theirs(t) != tokenizer.encode(t, add_special_tokens=False).ids]


@pytest.mark.parametrize(("name", "pattern", "ignored"), RULES, ids=[rule[0] for rule in RULES])
def test_every_named_rule_gives_the_same_ids_in_llama_cpp(
    tmp_path: Path, name: str, pattern: str, ignored: bool
) -> None:
    tokenizer = trained(name, pattern, ignored)
    assert pre_tokenizer_name(json.loads(tokenizer.to_str())) == name
    assert different(tokenizer, name, tmp_path / "vocabulary.gguf") == []


@pytest.mark.parametrize("wrong", ["gpt-2", "smollm", "qwen35", "default"])
def test_a_rule_of_another_family_shows_on_the_corpus(tmp_path: Path, wrong: str) -> None:
    name, pattern, ignored = RULES[0]
    assert name == "qwen2"
    assert different(trained(name, pattern, ignored), wrong, tmp_path / "vocabulary.gguf")


def vocabulary(tokenizer: Any, rule: str, path: Path) -> Callable[[str], list[int]]:
    """llama.cpp's tokenizer of a file that holds a vocabulary and nothing else."""
    import ctypes

    import gguf
    import numpy as np

    from export.llama import library

    lib, _ = library()
    writer = gguf.GGUFWriter(path, "qwen2")
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_feed_forward_length):
        add(32)
    for add in (writer.add_block_count, writer.add_head_count, writer.add_head_count_kv):
        add(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    ordered = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    special = tokenizer.get_added_tokens_decoder()
    writer.add_token_list(ordered)
    writer.add_token_types([3 if i in special else 1 for i in range(len(ordered))])
    writer.add_token_merges([" ".join(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]])
    writer.add_eos_token_id(len(ordered) - 1)
    writer.add_add_bos_token(False)
    writer.add_tensor("token_embd.weight", np.zeros((1, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    params = lib.llama_model_default_params()
    params.vocab_only, params.n_gpu_layers = True, 0
    vocab = lib.llama_model_get_vocab(lib.llama_model_load_from_file(str(path).encode(), params))

    def encode(text: str) -> list[int]:
        data = text.encode()
        found = (ctypes.c_int32 * (len(data) + 8))()
        return list(found[: lib.llama_tokenize(vocab, data, len(data), found, len(found), False, True)])

    return encode
