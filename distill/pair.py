"""Teacher and student side by side: may this pair be distilled, and over which part of the vocabulary?"""

from __future__ import annotations

import dataclasses

from vlm.errors import CheckpointError
from vlm.load import Checkpoint


def shared_vocabulary(teacher: Checkpoint, student: Checkpoint) -> int:
    """Number of leading token ids that mean the same in both models.

    Same-family models may pad their embeddings differently (152064 against 151936 rows); the shared part is used.

    Raises:
        CheckpointError: tokenizers, special tokens, templates, pixels or visual token counts differ; names the first
            difference.
    """
    pair = f"teacher {teacher.directory} and student {student.directory}"
    for difference in (_tokens(teacher, student), _specials(teacher, student), _template(teacher, student)):
        if difference:
            raise CheckpointError(f"{pair} do not match: {difference}")
    if seen := _pixels(teacher, student):
        raise CheckpointError(f"{pair} see different pixels: {seen}; use towers with one input")
    sizes = [int(checkpoint.config["text_config"]["vocab_size"]) for checkpoint in (teacher, student)]
    return min(sizes)


def _tokens(teacher: Checkpoint, student: Checkpoint) -> str:
    theirs, ours = (
        {token_id: token for token, token_id in side.tokenizer.tokenizer.get_vocab(with_added_tokens=True).items()}
        for side in (teacher, student)
    )
    # what the student says to itself is none of the teacher's business
    own = set(student.tokenizer.spec.latent_token_ids)
    for token_id in sorted((theirs.keys() | ours.keys()) - own):
        if theirs.get(token_id) != ours.get(token_id):
            return (
                f"the tokenizers differ, token {token_id} is {_shown(theirs.get(token_id))} in the teacher and {_shown(ours.get(token_id))} "
                "in the student; distil within one tokenizer family"
            )
    return ""


def _shown(token: str | None) -> str:
    return "missing" if token is None else repr(token)


def _specials(teacher: Checkpoint, student: Checkpoint) -> str:
    theirs, ours = teacher.tokenizer.spec, student.tokenizer.spec
    if theirs.image_token_id != ours.image_token_id:
        return f"the image token is {theirs.image_token!r} in the teacher and {ours.image_token!r} in the student"
    if not set(theirs.eos_token_ids) & set(ours.eos_token_ids):
        return (
            f"answers end with tokens {list(theirs.eos_token_ids)} in the teacher and {list(ours.eos_token_ids)} "
            "in the student; set eos_token_id in generation_config.json"
        )
    return ""


def _template(teacher: Checkpoint, student: Checkpoint) -> str:
    theirs, ours = teacher.tokenizer.spec.template, student.tokenizer.spec.template
    if theirs == ours:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
    near = slice(max(at - 10, 0), at + 20)
    return (
        f"the chat templates differ at character {at}: {theirs[near]!r} in the teacher and {ours[near]!r} in the "
        "student; use one chat_template.jinja for both"
    )


def _pixels(teacher: Checkpoint, student: Checkpoint) -> str:
    theirs, ours = dataclasses.asdict(teacher.image), dataclasses.asdict(student.image)
    # the token count first: it says most about why a pair cannot work
    for name in sorted(theirs, key=lambda name: name != "tokens"):
        if theirs[name] != ours[name]:
            what = "visual tokens per image" if name == "tokens" else f"image {name}"
            return f"{what} {theirs[name]} in the teacher and {ours[name]} in the student"
    return ""
