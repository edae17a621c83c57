"""What `distill check` reads off data and tokenizers: which token is what, the vocabularies, the data in figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from distill.batch import Batch
from distill.data import Example, Examples
from vlm import chat
from vlm.load import Checkpoint

Status = Literal["ok", "warn", "fail"]
SPAN_NAMES = ("image", "instruction", "response")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what, whether it holds, and the figure or the reason."""

    name: str
    status: Status
    text: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class TokenRow:
    """One token of a batch row as the objective sees it; a run of image or padding tokens is one entry.

    Attributes:
        first, last: places in the padded row.
        position: position id of the first of them; None for padding.
        trained: whether the student learns to produce it.
    """

    first: int
    last: int
    token: int
    text: str
    span: str
    position: int | None
    trained: bool

    def cells(self) -> list[str]:
        run = self.last > self.first
        count = f" x {self.last - self.first + 1}" if run else ""
        place = f"{self.first}-{self.last}" if run else str(self.first)
        last = self.last - self.first + (self.position or 0)
        position = "" if self.position is None else f"{self.position}-{last}" if run else str(self.position)
        trained = "yes" if self.trained else ""
        return [place, str(self.token), self.text + count, self.span, position, trained]


def token_rows(batch: Batch, row: int, tokenizer: chat.ChatTokenizer) -> list[TokenRow]:
    """Every token of one row of a batch, from the batch's own masks."""
    ids = batch.input_ids_BT[row].tolist()
    masks = [getattr(batch, f"{name}_BT")[row].tolist() for name in SPAN_NAMES]
    real, positions = batch.attention_mask_BT[row].tolist(), batch.position_BT[row].tolist()
    found: list[TokenRow] = []
    for at, token in enumerate(ids):
        named = [name for name, mask in zip(SPAN_NAMES, masks, strict=True) if mask[at]]
        span = "padding" if not real[at] else named[0] if named else "template"
        if found and span in ("image", "padding") and found[-1].span == span and found[-1].token == token:
            found[-1] = TokenRow(**{**asdict(found[-1]), "last": at})
            continue
        # token 0 has no predicting position
        trained = span == "response" and at > 0
        position = positions[at] if real[at] else None
        found.append(TokenRow(at, at, token, shown(tokenizer, token), span, position, trained))
    return found


def shown(tokenizer: chat.ChatTokenizer, token: int) -> str:
    """A token as text, blanks and line breaks visible."""
    text = str(tokenizer.tokenizer.decode([token], skip_special_tokens=False))
    if not text or "\ufffd" in text:
        text = str(tokenizer.tokenizer.id_to_token(token))
    visible = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
    return visible.replace(" ", "␣") if visible != visible.strip() else visible


def alignment_findings(example: Example, tokenizer: chat.ChatTokenizer, needs_instruction: bool) -> list[Finding]:
    """Whether a sample's spans are what training needs."""
    spec, spans = tokenizer.spec, example.spans
    images, trained = spans.count("image"), spans.count("response")
    found = []
    expected = len(example.pixels) * tokenizer.tokens_per_image
    fits = images == expected
    found.append(
        Finding(
            "image tokens",
            "ok" if fits else "fail",
            f"{images} image tokens for {len(example.pixels)} images of {tokenizer.tokens_per_image}"
            + ("" if fits else f", expected {expected}: the template drops or repeats images"),
        )
    )
    ends = [i for i, span in enumerate(spans) if span == "response" and spans[i + 1 : i + 2] != ("response",)]
    stops = bool(ends) and all(example.ids[i] in spec.eos_token_ids for i in ends)
    if not trained:
        found.append(Finding("trained tokens", "fail", "no token is trained: the template has no assistant turn"))
    elif not stops:
        last = shown(tokenizer, example.ids[ends[-1]])
        found.append(
            Finding(
                "trained tokens",
                "warn",
                f"{trained} trained, but an answer ends with {last!r} and not with an end-of-turn token: "
                "the student will not learn to stop",
            )
        )
    else:
        found.append(Finding("trained tokens", "ok", f"{trained} of {len(spans)}, each answer with its end of turn"))
    if needs_instruction and images:
        asked = "instruction" in spans and spans.index("instruction") > spans.index("image")
        text = f"{spans.count('instruction')} instruction tokens after the image weight its tokens"
        if not asked:
            text = "no instruction after the image: visual tokens of such samples are weighted alike"
        found.append(Finding("instruction", "ok" if asked else "warn", text))
    return found


def vocabulary(teacher: Checkpoint | None, student: Checkpoint, shared: int) -> dict[str, Any]:
    """Sizes, rows beyond the tokenizer, and special tokens that differ."""
    value: dict[str, Any] = {"student": _one_vocabulary(student), "shared": shared}
    if teacher is not None:
        value["teacher"] = _one_vocabulary(teacher)
        ours, theirs = (_specials(checkpoint) for checkpoint in (student, teacher))
        value["special_tokens_that_differ"] = [
            {"token": name, "student": ours.get(name), "teacher": theirs.get(name)}
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]
    return value


def _one_vocabulary(checkpoint: Checkpoint) -> dict[str, int]:
    tokens = int(checkpoint.tokenizer.tokenizer.get_vocab_size(with_added_tokens=True))
    rows = int(checkpoint.config["text_config"]["vocab_size"])
    return {"tokens": tokens, "rows": rows, "padded_rows": rows - tokens}


def _specials(checkpoint: Checkpoint) -> dict[str, Any]:
    tokenizer, spec = checkpoint.tokenizer, checkpoint.tokenizer.spec
    found: dict[str, Any] = {str(tokenizer.tokenizer.id_to_token(i)): i for i in sorted(tokenizer.special_ids)}
    return found | {
        "(end of turn)": list(spec.eos_token_ids),
        "(padding)": spec.pad_token_id,
        "(image)": spec.image_token_id,
        "(begin of sequence)": spec.bos_token,
    }


@dataclass(frozen=True)
class DataFigures:
    """The data in figures; percentiles are of `looked_at` samples."""

    samples: int
    looked_at: int
    length: dict[str, int]
    response: dict[str, int]
    images_per_sample: float
    without_image: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def data_figures(examples: Examples, drawn: Sequence[Example], lengths: Sequence[int]) -> DataFigures:
    """Counts and percentiles.

    Args:
        drawn: samples that were read.
        lengths: token counts of all samples where the data set knows them, else of `drawn`.
    """
    responses = [example.spans.count("response") for example in drawn]
    return DataFigures(
        len(examples),
        len(drawn),
        _percentiles(lengths),
        _percentiles(responses),
        round(float(np.mean([len(example.pixels) for example in drawn])), 3),
        sum(not example.pixels for example in drawn),
    )


def _percentiles(values: Sequence[int]) -> dict[str, int]:
    names = ("min", "p50", "p90", "p99", "max")
    return dict(zip(names, (int(v) for v in np.percentile(values, (0, 50, 90, 99, 100))), strict=True))
