"""What a teacher says about a batch -> cache entries; and what a cache was made with.

Shape legend: B = batch, T = tokens, N = response positions, J = visual tokens, C = stored candidates, R = rows,
E = teacher hidden, V = vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import ribbon
from distill.access import Head
from distill.batch import Batch
from distill.cache_codec import Compression, PackedRows, compress
from distill.cache_store import Entry
from distill.head import chunk_rows
from distill.teacher import DenseTarget, Gaze, Target, Teacher, TeacherPass
from vlm.errors import UserError
from vlm.load import Checkpoint


@dataclass(frozen=True)
class CacheOptions:
    """What is stored.

    Attributes:
        response: of every row that predicts a response token, and of rows after a stored candidate.
        visual: of rows at visual tokens.
        visual_share: visual tokens with the largest weights are stored until they hold this share of it; 0 stores none.
        all_logits: store hidden states and the head once, hence all logits exactly, instead of compressed rows.
        candidates: C, fixed candidates a response position for offline TPA.
        looks: visual tokens of the teacher's gaze kept for LaViT; 0 stores none of its signals.
        look_layers: last layers whose attention is the gaze.
    """

    response: Compression = field(default_factory=lambda: Compression(64, 12, 1e-4))
    visual: Compression = field(default_factory=lambda: Compression(16, 8, 1e-3))
    visual_share: float = 1.0
    all_logits: bool = False
    candidates: int = 0
    looks: int = 0
    look_layers: int = 8

    def to_json(self) -> dict[str, Any]:
        """What a cache's fingerprint says of it: of LaViT's signals nothing where there are none."""
        value = asdict(self)
        if not self.looks:
            del value["looks"], value["look_layers"]
        return value

    def __post_init__(self) -> None:
        if not 0 <= self.visual_share <= 1:
            raise UserError(f"visual_share is a share from 0 to 1, got {self.visual_share}")
        if self.candidates < 0:
            raise UserError(f"candidates must be 0 or more, got {self.candidates}")


# part of the fingerprint -> what a person calls it, and what to do when it differs
PARTS = {
    "teacher": ("teacher weights", "use the teacher the cache was made with"),
    "tokenizer": ("tokenizer", "use the tokenizer the cache was made with"),
    "template": ("chat template", "use the chat template the cache was made with"),
    "processor": ("image processor", "use a student that sees images in the same way"),
    "dtype": ("teacher dtype", "set --teacher_dtype to it"),
    "load": ("teacher quantisation", "set --teacher_load to it"),
    "temperature": ("temperature", "set --align.temperature to it"),
    "layer": ("IVA layer", "set --align.iva_layer to it, or -1"),
    "vocabulary": ("shared vocabulary", "name the student with --student when making the cache"),
    "options": ("options of storage", "repeat them"),
}


def fingerprint(
    teacher: Checkpoint, dtype: str, load: str, temperature: float, layer: int, vocabulary: int, options: CacheOptions
) -> dict[str, Any]:
    """Everything that decides what a cache holds, by part."""
    # hidden states serve any temperature and any part of the vocabulary
    free = options.all_logits
    return {
        "teacher": teacher.weights_sha256(),
        **seen_as(teacher),
        "dtype": dtype,
        "load": load,
        "temperature": "any" if free else temperature,
        "layer": layer if options.visual_share else "none",
        "vocabulary": "any" if free else vocabulary,
        "options": options.to_json(),
    }


def seen_as(checkpoint: Checkpoint) -> dict[str, str]:
    """The parts that decide how text and images become what a model is shown."""
    own = set(checkpoint.tokenizer.spec.latent_token_ids)
    known = checkpoint.tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    vocabulary = {token: number for token, number in known.items() if number not in own}
    return {
        "tokenizer": _hash(sorted(vocabulary.items(), key=lambda item: item[1])),
        "template": _hash(checkpoint.tokenizer.spec.template),
        "processor": _hash(asdict(checkpoint.image)),
    }


def check(folder: Path, stored: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare the parts that `now` names.

    Raises:
        UserError: names every part that differs, both values, and what to do.
    """
    found = [
        f"{PARTS[part][0]} (cache {_short(stored.get(part))}, now {_short(value)}; {PARTS[part][1]})"
        for part, value in now.items()
        if stored.get(part) != value
    ]
    if found:
        raise UserError(f"{folder} does not fit this run: {', '.join(found)}; or make a new cache")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value).replace('"', "")
    return value[:12] if isinstance(value, str) else str(value)


class Builder:
    """Runs the teacher over batches and makes entries.

    Args:
        vocabulary: leading token ids that are compared.
        image_token: never a candidate.
    """

    def __init__(
        self, teacher: Teacher, options: CacheOptions, temperature: float, vocabulary: int, image_token: int
    ) -> None:
        self.teacher, self.options, self.temperature = teacher, options, temperature
        self.vocabulary, self.image_token = vocabulary, image_token

    @torch.no_grad()
    def entries(self, batch: Batch, keys: Sequence[bytes], records: Sequence[int]) -> list[Entry]:
        """One entry a sample of the batch."""
        options = self.options
        seen = self.teacher(batch, options.visual_share > 0, options.candidates > 0)
        sample_N, place_N = batch.response_places()
        response = _dense(seen.rows(sample_N, place_N - 1))
        weight_BT = seen.weights() if options.visual_share else torch.zeros_like(batch.image_BT, dtype=torch.float32)
        kept_BT = largest(weight_BT, options.visual_share) & batch.image_BT
        sample_J, token_J = kept_BT.nonzero(as_tuple=True)
        blocks = [(response, sample_N, options.response)]
        if len(sample_J):
            blocks.append((_dense(seen.rows(sample_J, token_J)), sample_J, options.visual))
        ids_NC = torch.zeros(len(sample_N), options.candidates, dtype=torch.long, device=sample_N.device)
        if options.candidates:
            ids_NC = self._draw(batch, response, sample_N, place_N, keys)
            after = _dense(self._after(batch, seen, ids_NC, sample_N, place_N))
            blocks.append((after, sample_N.repeat_interleave(options.candidates), options.response))
        made = []
        for b, key in enumerate(keys):
            image_T = batch.image_BT[b]
            looked = _looked(seen.gaze(), b, image_T) if options.looks else {}
            made.append(
                Entry(
                    key,
                    records[b],
                    weight_BT[b, image_T].float().cpu() if options.visual_share else torch.zeros(0),
                    kept_BT[b, image_T].cpu() if options.visual_share else torch.zeros(0, dtype=torch.bool),
                    ids_NC[sample_N == b].cpu(),
                    self._rows(key, [(target.hidden_RE[at == b], target.head, how) for target, at, how in blocks]),
                    **looked,
                )
            )
        return made

    def _draw(
        self, batch: Batch, response: DenseTarget, sample_N: Tensor, place_N: Tensor, keys: Sequence[bytes]
    ) -> Tensor:
        """Distinct candidates from the teacher's distribution without the gold token."""
        key_B = torch.tensor([_number(key) for key in keys], device=sample_N.device)
        uniform_NC = ribbon.uniforms(
            ribbon.mix(key_B[sample_N] ^ batch.position_BT[sample_N, place_N]), self.options.candidates
        )
        drawn = []
        step = chunk_rows(self.vocabulary, response.hidden_RE.device.type)
        for start in range(0, len(sample_N), step):
            part = slice(start, start + step)
            logits_RV = self._logits(response.head, response.hidden_RE[part])
            logits_RV[torch.arange(len(logits_RV)), batch.input_ids_BT[sample_N[part], place_N[part]]] = -torch.inf
            drawn.append(ribbon.propose(logits_RV, uniform_NC[part], "distinct", (self.image_token,))[0])
        return torch.cat(drawn) if drawn else torch.zeros(0, self.options.candidates, dtype=torch.long)

    def _after(self, batch: Batch, seen: TeacherPass, ids_NC: Tensor, sample_N: Tensor, place_N: Tensor) -> Target:
        gold_N = batch.input_ids_BT[sample_N, place_N]
        even_NC = torch.ones_like(ids_NC, dtype=torch.float32)
        return seen.candidates(
            ribbon.arrange(ids_NC, even_NC, sample_N, place_N, gold_N, len(batch.input_ids_BT), drop_gold=False)
        )

    def _logits(self, head: Head, hidden_RE: Tensor) -> Tensor:
        return head.logits(hidden_RE)[:, : self.vocabulary].float()

    def _rows(self, key: bytes, blocks: Sequence[tuple[Tensor, Head, Compression]]) -> PackedRows | Tensor:
        if self.options.all_logits:
            return torch.cat([hidden_RE for hidden_RE, _, _ in blocks]).cpu()
        packed = []
        done = 0
        for hidden_RE, head, how in blocks:
            step = chunk_rows(self.vocabulary, hidden_RE.device.type)
            for start in range(0, len(hidden_RE), step):
                logits_RV = self._logits(head, hidden_RE[start : start + step])
                key_R = _number(key) ^ torch.arange(done, done + len(logits_RV), device=logits_RV.device)
                packed.append(compress(logits_RV, ribbon.uniforms(ribbon.mix(key_R), 1)[:, 0], how, self.temperature))
                done += len(logits_RV)
        return PackedRows.join(packed)


def _looked(gaze: Gaze, b: int, image_T: Tensor) -> dict[str, Tensor]:
    """LaViT's signals of one sample as an Entry keeps them; nothing for one without an image."""
    mass_J = gaze.mass_BT[b, image_T]
    look_G = mass_J.nonzero()[:, 0]
    if not image_T.any():
        return {}
    return {
        "look_G": look_G.to(torch.int32).cpu(),
        "mass_G": mass_J[look_G].half().cpu(),
        "semantics_E": gaze.semantics_BE[b].half().cpu(),
    }


def largest(weight_BT: Tensor, share: float) -> Tensor:
    """Tokens with the largest weights of each row, as many as hold `share` of the row's total: kept_BT."""
    if share >= 1:
        return weight_BT > 0
    ordered = weight_BT.double().sort(dim=1, descending=True)
    before_BT = ordered.values.cumsum(dim=1) - ordered.values
    enough_BT = (before_BT < share * ordered.values.sum(dim=1, keepdim=True)) & (ordered.values > 0)
    return torch.zeros_like(enough_BT).scatter_(1, ordered.indices, enough_BT)


def _dense(target: Target) -> DenseTarget:
    assert isinstance(target, DenseTarget), "a cache is made from a live teacher"
    return target


def _number(key: bytes) -> int:
    return int.from_bytes(key[:8], "little", signed=True)
