"""A teacher read from disk: the same targets as the model beside the student, without its weights.

Shape legend: B = batch, T = tokens, R = rows, N = response positions, J = visual tokens, K = candidates used.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from distill import ribbon
from distill.access import Head
from distill.batch import Batch
from distill.cache_build import check, seen_as
from distill.cache_codec import PackedRows, expand
from distill.cache_key import keys_bytes, sample_key
from distill.cache_store import Entry, Missing, Reader
from distill.config import TrainConfig
from distill.data import Examples
from distill.teacher import DenseTarget, Gaze, SparseTarget, Target, TeacherPass
from vlm.errors import UserError
from vlm.load import Checkpoint


class Entries(Protocol):
    """Where entries come from: a Reader, or a dictionary in tests and measurements."""

    def get(self, key: bytes) -> Entry: ...


@dataclass(frozen=True)
class Memory:
    """Entries that are not on disk."""

    entries: Mapping[bytes, Entry]

    def get(self, key: bytes) -> Entry:
        return self.entries[key]


class CachedTeacher:
    """Stands in for the live teacher; batches must carry keys (Collator(keys=True)).

    Args:
        head: the teacher's output projection, needed where hidden states are stored.
        candidates: K, how many of the stored candidates a position are used.
        examples: the training data, only to say which record a missing sample is.
    """

    def __init__(
        self, entries: Entries, head: Head | None = None, candidates: int = 0, examples: Examples | None = None
    ) -> None:
        self.entries, self.head, self.candidates, self.examples = entries, head, candidates, examples

    def __call__(self, batch: Batch, iva: bool, tpa: bool) -> TeacherPass:
        if batch.key_B4 is None:
            raise ValueError("the batch carries no keys; collate with keys=True")
        return CachedPass(batch, [self._entry(key) for key in keys_bytes(batch.key_B4)], self.head, self.candidates)

    def _entry(self, key: bytes) -> Entry:
        try:
            return self.entries.get(key)
        except Missing as error:
            raise Missing(f"{error} ({self._record(key)}); run `python -m distill cache` with the same data") from None

    def _record(self, key: bytes) -> str:
        count = len(self.examples) if self.examples is not None else 0
        found = next((i for i in range(count) if self.examples and sample_key(self.examples[i]) == key), None)
        return "not in the training data: held-out samples are cached too" if found is None else f"record {found}"


class CachedPass:
    """The stored targets of one batch."""

    def __init__(self, batch: Batch, entries: list[Entry], head: Head | None, candidates: int) -> None:
        self.batch, self.entries, self.used = batch, entries, candidates
        self.device = batch.input_ids_BT.device
        self.head = head

    def weights(self) -> Tensor:
        weight_BT = torch.zeros(self.batch.image_BT.shape)
        image_BT = self.batch.image_BT.cpu()
        for b, entry in enumerate(self.entries):
            if image_BT[b].any():
                kept_J = entry.weight_J * entry.kept_J
                # all of them stored: the very weights of the live teacher
                weight_BT[b, image_BT[b]] = entry.weight_J if entry.whole else kept_J / kept_J.sum()
        return weight_BT.to(self.device)

    def gaze(self) -> Gaze:
        mass_BT = torch.zeros(self.batch.image_BT.shape)
        image_BT = self.batch.image_BT.cpu()
        sizes = {len(entry.semantics_E) for entry in self.entries} - {0}
        semantics_BE = torch.zeros(len(self.entries), max(sizes, default=1))
        for b, entry in enumerate(self.entries):
            if len(entry.semantics_E):
                place_J = image_BT[b].nonzero()[:, 0]
                mass_G = entry.mass_G.float()
                mass_BT[b, place_J[entry.look_G.long()]] = mass_G / mass_G.sum()
                semantics_BE[b] = entry.semantics_E.float()
        return Gaze(mass_BT.to(self.device), semantics_BE.to(self.device))

    def rows(self, sample_R: Tensor, token_R: Tensor) -> Target:
        place_BT, _ = self._places
        at_R = place_BT[sample_R.cpu(), token_R.cpu()]
        if (at_R < 0).any():
            first = int((at_R < 0).nonzero()[0])
            raise UserError(
                f"the cache holds no distribution at token {int(token_R[first])} of a sample; it was made without "
                "visual rows: make one with --visual_share above 0, or train without iva"
            )
        target = self._take(at_R)
        if isinstance(target, SparseTarget) and self._partial and self.batch.image_BT[sample_R, token_R].any():
            return replace(target, scatter=None)  # what the rows left out would add is not known
        return target

    def fixed_candidates(self) -> ribbon.Candidates:
        """The first K stored candidates of every response position, each with weight 1 / K; align.tpa_share is moot."""
        sample_N, place_N = self.batch.response_places()
        gold_N = self.batch.input_ids_BT[sample_N, place_N]
        ids_NK = torch.cat([entry.candidate_NC[:, : self.used] for entry in self.entries]).to(self.device)
        weight_NK = (self._token_weight() / self.used)[:, None].expand(-1, self.used)
        return ribbon.arrange(
            ids_NK, weight_NK, sample_N, place_N, gold_N, len(self.batch.input_ids_BT), drop_gold=False
        )

    def candidates(self, candidates: ribbon.Candidates) -> Target:
        at = []
        for entry, first in zip(self.entries, self._places[1], strict=True):
            position_N1 = torch.arange(len(entry.candidate_NC))[:, None]
            at.append(first + position_N1 * entry.candidate_NC.shape[1] + torch.arange(self.used))
        # tokens of weight zero bring no candidates
        return self._take(torch.cat(at)[self._token_weight().cpu() > 0].flatten())

    def _token_weight(self) -> Tensor:
        """weight_N of the response positions."""
        sample_N, place_N = self.batch.response_places()
        weight_BT = self.batch.token_weight_BT
        return torch.ones(len(sample_N), device=self.device) if weight_BT is None else weight_BT[sample_N, place_N]

    @property
    def _partial(self) -> bool:
        """Whether the rows of some visual tokens were not stored."""
        return not all(entry.whole for entry in self.entries)

    @functools.cached_property
    def _places(self) -> tuple[Tensor, list[int]]:
        """Row of every token (place_BT, -1 where none is stored), and of each sample's first candidate."""
        batch = self.batch
        place_BT = torch.full(batch.image_BT.shape, -1, dtype=torch.long)
        image_BT, response_BT = batch.image_BT.cpu(), batch.response_BT.cpu()
        first_candidate = []
        done = 0
        for b, entry in enumerate(self.entries):
            visual_J = image_BT[b].nonzero().squeeze(1)
            stored_J = visual_J[entry.kept_J] if len(entry.kept_J) else visual_J[:0]
            predicting_N = response_BT[b, 1:].nonzero().squeeze(1)
            places = torch.cat([predicting_N, stored_J])
            place_BT[b, places] = torch.arange(done, done + len(places))
            first_candidate.append(done + len(places))
            done += len(places) + entry.candidate_NC.numel()
        return place_BT, first_candidate

    @functools.cached_property
    def _sparse(self) -> SparseTarget:
        return expand(PackedRows.join([entry.rows for entry in self.entries if isinstance(entry.rows, PackedRows)]))

    @functools.cached_property
    def _hidden(self) -> Tensor:
        return torch.cat([entry.rows for entry in self.entries if isinstance(entry.rows, Tensor)])

    def _take(self, at_R: Tensor) -> Target:
        if self.head is not None:
            return DenseTarget(self._hidden[at_R].to(self.device), self.head)
        return self._sparse.take(at_R).to(self.device)


@dataclass(frozen=True)
class Cached:
    """The cached teacher of a run.

    Attributes:
        info: what the cache was made with, see distill.cache_run.
        vocabulary: leading token ids that are compared.
    """

    teacher: CachedTeacher
    info: dict[str, Any]
    vocabulary: int

    @property
    def semantics(self) -> int:
        """Size of the teacher's hidden states, where LaViT's signals are stored."""
        return int(self.info["teacher_hidden"])

    @property
    def layer(self) -> int:
        """Teacher layer whose attention weighted the visual tokens."""
        layer = self.info["fingerprint"]["layer"]
        return layer if isinstance(layer, int) else 0

    def provenance(self) -> dict[str, Any]:
        return {"name": self.info["teacher"], "sha256": self.info["fingerprint"]["teacher"], "cached": True}


def open_cached(
    config: TrainConfig, student: Checkpoint, teacher: Checkpoint | None, device: Any, examples: Examples | None = None
) -> Cached:
    """The teacher that `teacher_cache` names.

    Args:
        teacher: only its hash is compared, where the run names one.
        device: the student's.
        examples: training data, see CachedTeacher.

    Raises:
        UserError: the cache is damaged, was made with something else (all of it is named), or lacks what the
            objective asks for.
    """
    assert config.teacher_cache is not None
    reader = Reader(config.teacher_cache)
    stored = reader.info["fingerprint"]
    now: dict[str, Any] = seen_as(student)
    if teacher is not None:
        now["teacher"] = teacher.weights_sha256()
    if stored["temperature"] != "any":
        now["temperature"] = config.align.temperature
    if "iva" in config.terms and config.align.iva_layer >= 0 and stored["layer"] != "none":
        now["layer"] = config.align.iva_layer
    size = int(student.config["text_config"]["vocab_size"])
    if stored["vocabulary"] != "any" and stored["vocabulary"] > size:
        now["vocabulary"] = size
    check(config.teacher_cache, stored, now)
    _refuse_what_is_not_stored(config, stored)
    head = None
    if stored["options"]["all_logits"]:
        head = Head(reader.head().to(device), reader.info["soft_cap"])
        vocabulary = min(size, len(head.weight_VD))
    else:
        vocabulary = int(stored["vocabulary"])
    return Cached(CachedTeacher(reader, head, config.align.candidates, examples), reader.info, vocabulary)


def _refuse_what_is_not_stored(config: TrainConfig, stored: dict[str, Any]) -> None:
    options, cache = stored["options"], config.teacher_cache
    if config.align.direction != "forward" and not options["all_logits"]:
        raise UserError(
            f"align.direction {config.align.direction} needs all logits and {cache} is compressed; make the cache with "
            "--all_logits, or use forward"
        )
    if "iva" in config.terms and not options["visual_share"]:
        raise UserError(f"objective {config.objective!r} needs visual rows; make {cache} with --visual_share 1")
    lavit = config.lavit
    if config.watches and (options.get("looks"), options.get("look_layers")) != (lavit.keep, lavit.layers):
        raise UserError(
            f"objective {config.objective!r} needs the teacher's gaze (the {lavit.keep} largest of the last {lavit.layers} "
            f"layers) and {cache} holds {options.get('looks', 'none')}; make it with --objective lavit"
        )
    if "tpa" not in config.terms:
        return
    if options["candidates"] < config.align.candidates:
        raise UserError(
            f"objective {config.objective!r} draws candidates from the student as it trains, which a cache cannot "
            f"follow; make {cache} with --candidates {config.align.candidates} (drawn once, from the teacher), use a "
            "live teacher, or --objective kd+iva"
        )
    if config.align.tpa_entropy != 0:  # tpa_share is about what the student draws, and stored candidates are all used
        raise UserError("align.tpa_entropy needs candidates of the student; drop it with a cache")
