"""Latent tokens: K special tokens a student says before every answer (LaViT, arXiv 2601.10129).

They are ordinary entries of the tokenizer, so a student that has them stays a plain Hugging Face checkpoint; its
config.json names them as `latent_token_ids`. A data set does not know about them: they are put in while batches are made
(distill.data.latent), and a teacher, which does not know them either, is shown the batch without them.

Shape legend: B = samples, T = tokens with latents, S = tokens without, C = candidate slots, E = teacher hidden.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import ribbon
from distill.assemble import save_checkpoint
from distill.batch import Batch
from distill.teacher import Gaze, Target, Teacher, TeacherPass, fixed_candidates
from vlm.errors import UserError
from vlm.files import atomic_dir
from vlm.load import Checkpoint

NAME = "<|latent_{}|>"
FOLDER = "initial-latents"


def extend(model: Any, source: Checkpoint, count: int, out: Path, seed: int) -> Path:
    """Write a student with latent tokens as a Hugging Face directory, unless the same one stands there already.

    New embedding rows start at the mean of the others, apart by a little noise.

    Raises:
        UserError: the student has latents of another number, or is of a class without a processor of its own.
    """
    from transformers import AddedToken

    from distill.compose import once
    from distill.models import processor_of

    there = len(source.tokenizer.spec.latent_token_ids)
    if there:
        raise UserError(f"lavit.latents {count}: the student has {there} latent tokens already; set it to that")
    if source.config.get("model_type") != "llava":
        raise UserError(f"lavit needs a LLaVA student, this is {source.config.get('model_type')!r}; assemble one")
    recipe = {"latents": count, "seed": seed, "extended": str(source.directory)}
    names = [NAME.format(number) for number in range(1, count + 1)]

    def write() -> None:
        processor = processor_of(source)
        tokenizer = processor.tokenizer
        tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
        ids = tokenizer.convert_tokens_to_ids(names)
        _add_rows(model, ids, seed)
        model.config.latent_token_ids = ids
        with atomic_dir(out) as work:
            save_checkpoint(model, processor, work, {"objective": "extended", **recipe})

    return once(out, recipe, write)


@torch.no_grad()
def _add_rows(model: Any, ids: list[int], seed: int) -> None:
    """Room for the ids in the embedding and head, and what they start with."""
    rows = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= rows:
        model.resize_token_embeddings(-(-(max(ids) + 1) // 64) * 64, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    tables = {id(t.weight): t.weight for t in (model.get_input_embeddings(), model.get_output_embeddings())}
    for table in tables.values():
        known = table[: min(ids)].float()
        noise = torch.randn(len(ids), table.shape[1], generator=generator)
        table[ids] = (known.mean(dim=0) + 0.5 * known.std(dim=0) * noise.to(table.device)).to(table.dtype)


@dataclass(frozen=True)
class Without:
    """A batch without its latents, and where its tokens went.

    Attributes:
        to_BT: place without latents of every token; of a latent, that of the token before the latents.
        from_BS: place with latents.
    """

    batch: Batch
    to_BT: Tensor
    from_BS: Tensor


def take_out(batch: Batch) -> Without:
    """Everything a teacher may be shown."""
    assert batch.latent_BT is not None
    stays_BT = ~batch.latent_BT
    width = int((stays_BT & batch.attention_mask_BT.bool()).sum(dim=1).max())
    # left padding must not push real tokens out: real tokens that stay come first, in order
    left = bool((batch.attention_mask_BT[:, 0] == 0).any())
    if left:
        width = int(stays_BT.sum(dim=1).max())
    from_BS = torch.argsort((~stays_BT).int(), dim=1, stable=True)[:, :width]
    to_BT = (stays_BT.long().cumsum(dim=1) - 1).clamp(min=0)

    def taken(value_BT: Tensor | None) -> Tensor | None:
        return None if value_BT is None else value_BT.gather(1, from_BS)

    names = (
        "input_ids_BT",
        "attention_mask_BT",
        "image_BT",
        "instruction_BT",
        "response_BT",
        "token_weight_BT",
        "step_BT",
    )
    found = {name: taken(getattr(batch, name)) for name in names}
    # rows with fewer latents are shorter by less: what is behind their end is padding
    alive_BS = stays_BT.gather(1, from_BS)
    for name in ("attention_mask_BT", "image_BT", "instruction_BT", "response_BT"):
        found[name] = found[name] * alive_BS.to(found[name].dtype)  # type: ignore[union-attr]
    found["input_ids_BT"] = torch.where(alive_BS, found["input_ids_BT"], 0)  # type: ignore[arg-type]
    return Without(dataclasses.replace(batch, latent_BT=None, packing=None, **found), to_BT, from_BS)  # type: ignore[arg-type]


def plain(batch: Batch) -> Batch:
    """What a teacher may be shown of a batch."""
    return batch if batch.latent_BT is None else take_out(batch).batch


def ask(teacher: Teacher, batch: Batch, iva: bool, tpa: bool) -> TeacherPass:
    """The teacher's view of a batch that may have latents, in the places of the batch as it is."""
    if batch.latent_BT is None:
        return teacher(batch, iva, tpa)
    without = take_out(batch)
    return PassWithout(teacher(without.batch, iva, tpa), batch, without)


class PassWithout:
    """A teacher's pass over a batch without latents, asked by places with them."""

    def __init__(self, seen: TeacherPass, batch: Batch, without: Without) -> None:
        self.seen, self.batch, self.without = seen, batch, without
        if hasattr(seen, "fixed_candidates"):
            self.fixed_candidates = self._fixed

    def weights(self) -> Tensor:
        return self._spread(self.seen.weights())

    def gaze(self) -> Gaze:
        found = self.seen.gaze()
        return dataclasses.replace(found, mass_BT=self._spread(found.mass_BT))

    def rows(self, sample_R: Tensor, token_R: Tensor) -> Target:
        return self.seen.rows(sample_R, self.without.to_BT[sample_R, token_R])

    def candidates(self, candidates: ribbon.Candidates) -> Target:
        place_BC = self.without.to_BT.gather(1, candidates.place_BC)
        return self.seen.candidates(dataclasses.replace(candidates, place_BC=place_BC))

    def _fixed(self) -> ribbon.Candidates:
        found = fixed_candidates(self.seen)
        assert found is not None
        return dataclasses.replace(found, place_BC=self.without.from_BS.gather(1, found.place_BC))

    def _spread(self, value_BS: Tensor) -> Tensor:
        """Values of visual tokens at their places with latents."""
        found_BT = value_BS.new_zeros(self.batch.image_BT.shape)
        found_BT[self.batch.image_BT] = value_BS[self.without.batch.image_BT]
        return found_BT
