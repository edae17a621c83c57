"""Teacher and student side by side: may this pair be distilled, and over which part of the vocabulary?"""

from __future__ import annotations

from vlm.errors import CheckpointError
from vlm.load import Checkpoint


def shared_vocabulary(teacher: Checkpoint, student: Checkpoint) -> int:
    """Number of leading token ids that mean the same in both models.

    Same-family models may pad their embeddings differently (152064 against 151936 rows); the shared part is used.

    Raises:
        CheckpointError: tokenizers, templates, pixels or visual token counts differ.
    """
    ours, theirs = student.tokenizer, teacher.tokenizer
    if ours.tokenizer.get_vocab(with_added_tokens=True) != theirs.tokenizer.get_vocab(with_added_tokens=True):
        raise CheckpointError(
            f"the tokenizers of {teacher.directory} and {student.directory} differ; distil within one tokenizer family"
        )
    if ours.spec.template != theirs.spec.template:
        raise CheckpointError(
            f"the chat templates of {teacher.directory} and {student.directory} differ; use one for both"
        )
    if teacher.image != student.image:
        raise CheckpointError(
            f"teacher and student see different pixels ({teacher.image} and {student.image}); use towers with one input"
        )
    sizes = [int(checkpoint.config["text_config"]["vocab_size"]) for checkpoint in (teacher, student)]
    return min(sizes)
