"""A tokenizer.json and a chat template as llama.cpp reads them: the same ids for the same text, or a refusal.

llama.cpp knows splitting rules by name. A rule is named only where its regular expression is literally one of those
below; whether the ids agree is then measured on a corpus through llama.cpp itself (`export.measure`).
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from export.student import Facts
from vlm.chat import ChatSpec, ChatTokenizer, render_template
from vlm.errors import CheckpointError, UserError
from vlm.load import Checkpoint

_CASED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# regular expression, merges ignored for whole words -> name; each was measured to give the same ids on the corpus.
# `gpt-4o` and `tekken` are left out: llama.cpp's rules for them part combining marks from their letters (155 of 1,000)
SPLITS: dict[tuple[str, bool], str] = {
    (_CASED + _WORD + r"\p{N}" + _TAIL, False): "qwen2",
    (_CASED + _WORD + r"\p{N}{1,3}" + _TAIL, True): "llama-bpe",
    (_CASED + _WORD + r"\p{N}{1,3}" + _TAIL, False): "smaug-bpe",
    (_CASED + _MARKS, False): "qwen35",
}
# words llama.cpp always stops at, whatever the end-of-sequence id says
ALWAYS_STOP = (
    *("<|im_end|>", "<|endoftext|>", "<eos>", "</s>", "<|eot_id|>", "<|end|>", "<|eom_id|>", "<end_of_turn>"),
    *(
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<turn|>",
        "<|return|>",
        "<|call|>",
        "<|calls|>",
        "<|flush|>",
        "[e~[",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
    *(
        "<PAD>",
        "[PAD]",
        "<|fim_pad|>",
        "<fim_pad>",
        "<|repo_name|>",
        "<|file_sep|>",
        "<file_sep>",
        "<reponame>",
        "<|fim_repo|>",
    ),
)
# llama.cpp takes these for end of generation only because of infilling; published students stop elsewhere
INFILLING = frozenset(
    ("<|fim_pad|>", "<fim_pad>", "<|repo_name|>", "<|file_sep|>", "<file_sep>", "<reponame>", "<|fim_repo|>")
)
MARKER = "<__media__>"
# preambles that bring the messages of llama.cpp programs into the form the student's template expects
TO_LISTS = (
    "{% set flat = namespace(messages=[]) %}{% for message in messages %}{% if message['content'] is string %}"
    "{% set flat.messages = flat.messages + "
    "[{'role': message['role'], 'content': [{'type': 'text', 'text': message['content']}]}] %}"
    "{% else %}{% set flat.messages = flat.messages + [message] %}{% endif %}{% endfor %}"
    "{% set messages = flat.messages %}"
)
# a marker becomes an image part, is placed by the student's template, and put back into the text
TO_IMAGES = (
    "{% set flat = namespace(messages=[], parts=[], marker='') %}{% for message in messages %}{% set flat.parts = [] %}"
    "{% for part in ([{'type': 'text', 'text': message['content']}] if message['content'] is string else message['content']) %}"
    "{% if part['type'] == 'text' and part['text'][:8] == '<__media' %}{% set flat.marker = part['text'] %}"
    "{% set flat.parts = flat.parts + [{'type': 'image'}] %}{% else %}{% set flat.parts = flat.parts + [part] %}{% endif %}"
    "{% endfor %}{% set flat.messages = flat.messages + [{'role': message['role'], 'content': flat.parts}] %}{% endfor %}"
    "{% set messages = flat.messages %}{% set rendered %}BODY{% endset %}"
    "{{ rendered.replace('IMAGE', flat.marker) if flat.marker else rendered }}"
)


def read_tokenizer_json(checkpoint: Checkpoint) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((checkpoint.directory / "tokenizer.json").read_text())
    return value


def check_tokenizer(checkpoint: Checkpoint, facts: Facts, foreign: bool = False) -> None:
    """Needs no weights.

    Args:
        foreign: another converter writes the tokenizer; the corpus alone decides whether it is right.

    Raises:
        CheckpointError: a tokenizer whose ids llama.cpp would not give, or at whose tokens it would stop.
    """
    spec, tokenizer, where = checkpoint.tokenizer.spec, checkpoint.tokenizer.tokenizer, checkpoint.directory
    for name in ALWAYS_STOP:
        token = tokenizer.token_to_id(name)
        if token is not None and token not in spec.eos_token_ids and name not in INFILLING:
            raise CheckpointError(
                f"{where} cannot become GGUF: llama.cpp always stops at {name!r}, but eos_token_id lacks {token}; "
                "add it to generation_config.json"
            )
    highest = max(tokenizer.get_vocab().values())
    if highest >= facts.vocab_size:
        raise CheckpointError(
            f"{where}: token {highest} has no embedding row (vocabulary {facts.vocab_size}); train again"
        )
    template_for_lists(checkpoint.tokenizer)
    if foreign:
        return
    model = read_tokenizer_json(checkpoint)
    if model["model"].get("type") != "BPE" or model["model"].get("byte_fallback"):
        raise CheckpointError(
            f"{where} cannot become GGUF: its tokenizer is not a byte-level BPE; use --llama-cpp DIR or --target onnx"
        )
    normaliser_name(model)
    pre_tokenizer_name(model)


def normaliser_name(tokenizer: dict[str, Any]) -> str | None:
    """`NFC` or None. llama.cpp normalises nothing, so texts must come normalised where the answer is NFC.

    Raises:
        CheckpointError: a normaliser that changes ordinary text.
    """
    normaliser = tokenizer.get("normalizer")
    steps = (normaliser or {}).get("normalizers", [normaliser] if normaliser else [])
    if any(step["type"] != "NFC" for step in steps):
        raise CheckpointError(
            f"the tokenizer normalises text with {[s['type'] for s in steps]}, which llama.cpp does not; use --target onnx"
        )
    return "NFC" if steps else None


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for the splitting rule of a tokenizer.json.

    Raises:
        CheckpointError: a rule llama.cpp has no exact counterpart for.
    """
    first = tokenizer.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    kinds = [step.get("type") for step in steps]
    ignored = bool(tokenizer["model"].get("ignore_merges"))
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            pattern = steps[0]["pattern"].get("Regex", "")
            name = SPLITS.get((pattern, ignored))
            if name and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
                return name
        elif not ignored and last.get("use_regex", True):
            if kinds == ["ByteLevel"]:
                return "gpt-2"
            if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
                return "smollm"
    shown = next((step["pattern"] for step in steps if step.get("type") == "Split"), "")
    raise CheckpointError(f"pre-tokenizer {kinds} {shown} has no exact counterpart in llama.cpp; use --target onnx")


def token_rows(checkpoint: Checkpoint, rows: int) -> tuple[list[str], list[int]]:
    """Text and type of every embedding row: llama.cpp wants one name per row and none twice.

    Args:
        rows: of the embedding table; those without a token get a name nobody uses.
    """
    import gguf

    tokenizer, special = checkpoint.tokenizer.tokenizer, checkpoint.tokenizer.special_ids
    added = set(tokenizer.get_added_tokens_decoder())
    names = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    taken = set(names.values())
    tokens: list[str] = []
    types: list[int] = []
    for token_id in range(rows):
        if token_id in names:
            kind = gguf.TokenType.NORMAL
            if token_id in special:
                kind = gguf.TokenType.CONTROL
            elif token_id in added:
                kind = gguf.TokenType.USER_DEFINED
            tokens.append(names[token_id])
            types.append(kind)
            continue
        name = f"[PAD{token_id}]"
        while name in taken:
            name = f"[{name}]"
        taken.add(name)
        tokens.append(name)
        types.append(gguf.TokenType.UNUSED)
    return tokens, types


def add_tokenizer(writer: Any, checkpoint: Checkpoint, rows: int) -> None:
    """Add all tokenizer keys to a `gguf.GGUFWriter`."""
    spec, model = checkpoint.tokenizer.spec, read_tokenizer_json(checkpoint)
    tokens, types = token_rows(checkpoint, rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(model))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([_merge(m) for m in model["model"]["merges"]])
    told, more = declared(checkpoint.tokenizer), spec.eos_token_ids[1:]
    writer.add_eos_token_id(told["eos_token_id"])
    if more:  # a second stopping word that llama.cpp may not know by name
        writer.add_eot_token_id(more[0])
    if more[1:]:
        writer.add_eom_token_id(more[1])
    writer.add_bos_token_id(told["bos_token_id"])
    writer.add_pad_token_id(told["pad_token_id"])
    writer.add_add_bos_token(False)  # the template writes it where the student was trained with one
    writer.add_add_eos_token(False)
    writer.add_chat_template(told["chat_template"])


def declared(tokenizer: ChatTokenizer) -> dict[str, Any]:
    """What a text file must say about prompts, see `export.llama.LlamaBackend.declared`."""
    spec = tokenizer.spec
    end = spec.eos_token_ids[0]
    bos = tokenizer.tokenizer.token_to_id(spec.bos_token) if spec.bos_token else None
    return {
        "bos_token_id": end if bos is None else bos,  # missing would mean 11, a random token
        "eos_token_id": end,
        "pad_token_id": spec.pad_token_id,
        "adds_a_token": False,
        "chat_template": template_for_lists(tokenizer),
    }


def _merge(merge: str | list[str]) -> str:
    """`a b`; a space inside a piece is never there in byte-level vocabularies."""
    return merge if isinstance(merge, str) else " ".join(merge)


def template_for_lists(tokenizer: ChatTokenizer) -> str:
    """A template with which servers that pass contents as parts, or as one string, get the prompt of training.

    llama.cpp programs put `{"type": "text", "text": "<__media__>"}` in the place of an image. A template that prints such
    parts and plain strings stays as it is; others get a preamble.

    Raises:
        CheckpointError: no form gives the student's own prompt.
    """
    spec = tokenizer.spec
    image = spec.image_token
    candidates = (
        spec.template,
        TO_LISTS + spec.template,
        TO_IMAGES.replace("IMAGE", image).replace("BODY", spec.template),
    )
    for template in candidates:
        if _renders_parts(spec, template):
            return template
    raise CheckpointError(
        "the chat template has no form that llama.cpp programs render as in training; use --target onnx"
    )


def _renders_parts(spec: ChatSpec, template: str) -> bool:
    """The student's own prompt, whether an image is a part or a marker in a text part, and for texts as strings."""
    marker, image = {"type": "text", "text": MARKER}, {"type": "image"}
    before, after, alone = ({"type": "text", "text": text} for text in ("What?\n", "\nWhat?", "Why?"))
    forms: tuple[tuple[list[Any], Any], ...] = (
        ([image, after], [marker, after]),
        ([before, image], [before, marker]),
        ([image, after], [image, after]),
        ([alone], [alone]),
        ([alone], "Why?"),
    )
    for own, theirs in forms:
        try:
            wanted = _render(spec, own)
            got = _render(replace(spec, template=template), theirs)
        except UserError:
            return False
        if got.replace(MARKER, spec.image_token) != wanted or (image in own) != (spec.image_token in wanted):
            return False
    return True


def _render(spec: ChatSpec, content: Any) -> str:
    return render_template(spec, [{"role": "user", "content": content}], add_generation_prompt=True)
