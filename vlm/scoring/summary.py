"""Per-sample scores -> what a benchmark reports, in a form that can be resampled.

A record is a dictionary with `id`, `group` (what the benchmark sorts by), `truth`, `prediction`, and after scoring
`score` (0 to 1) and `parsed`. A unit is what is drawn when resampling: a sample, or all samples that count together
(the two questions of an MME image, the rotations of an MMBench question).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Record = dict[str, Any]
# how the score follows from the units' values: `mean` over all; `sum` of the means per stratum; `macro_f1`, the mean
# over strata of F1 from counts (true positive, false positive, false negative)
Statistic = Literal["mean", "sum", "macro_f1"]


@dataclass(frozen=True)
class Unit:
    key: str
    stratum: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Part:
    """One line of the breakdown; `values` are per-sample scores where it is their mean."""

    score: float
    n: int
    values: tuple[float, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Summary:
    """The number a benchmark is known by, and the rest of its table.

    Attributes:
        unit: `share` (0 to 1) or `points`.
    """

    score: float
    metric: str
    unit: Literal["share", "points"]
    statistic: Statistic
    n: int
    units: tuple[Unit, ...]
    parts: dict[str, Part]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def part(records: Sequence[Record]) -> Part:
    values = tuple(float(record["score"]) for record in records)
    return Part(mean(values), len(values), values)


def by(records: Iterable[Record], name: str) -> dict[str, list[Record]]:
    """Records per value of a group field, sorted; a list in the field counts its record under each entry."""
    found: dict[str, list[Record]] = {}
    for record in records:
        value = record["group"].get(name)
        for one in value if isinstance(value, list) else [value]:
            if one not in (None, ""):
                found.setdefault(str(one), []).append(record)
    return dict(sorted(found.items()))


def mean_of(metric: str, *fields: str) -> Callable[[Sequence[Record]], Summary]:
    """Mean score of all samples, broken down by the given group fields."""

    def summarise(records: Sequence[Record]) -> Summary:
        parts = {f"{name} {value}": part(some) for name in fields for value, some in by(records, name).items()}
        units = tuple(Unit(record["id"], "", (float(record["score"]),)) for record in records)
        return Summary(mean([u.values[0] for u in units]), metric, "share", "mean", len(records), units, parts)

    return summarise


def all_right(metric: str, key: str, *fields: str) -> Callable[[Sequence[Record]], Summary]:
    """Share of groups (records with the same value of field `key`) of which every record is right."""

    def summarise(records: Sequence[Record]) -> Summary:
        whole = [(name, some, min(float(r["score"]) for r in some)) for name, some in by(records, key).items()]
        units = tuple(Unit(name, "", (right,)) for name, _, right in whole)
        firsts = [{**some[0], "score": right} for _, some, right in whole]
        parts = {"each question": part(list(records))}
        parts |= {f"{name} {value}": part(some) for name in fields for value, some in by(firsts, name).items()}
        return Summary(mean([u.values[0] for u in units]), metric, "share", "mean", len(units), units, parts)

    return summarise


def pope(records: Sequence[Record]) -> Summary:
    """Mean over the splits of F1 with `yes` as the positive; accuracy, precision, recall, yes ratio per split."""
    parts: dict[str, Part] = {}
    units = []
    for split, some in by(records, "split").items():
        wanted = [r["truth"]["answer"] == "yes" for r in some]
        # what was not asked counts as wrong, which an empty reply, read as no, need not be
        pairs = [
            (r["parsed"] == "yes" if not r.get("error") else not is_, is_) for r, is_ in zip(some, wanted, strict=True)
        ]
        rows = [(float(said and is_), float(said and not is_), float(not said and is_)) for said, is_ in pairs]
        units += [Unit(r["id"], split, row) for r, row in zip(some, rows, strict=True)]
        hit, wrong, missed = (sum(column) for column in zip(*rows, strict=True))
        n = len(some)
        parts[f"{split} accuracy"] = part(some)
        parts[f"{split} precision"] = Part(_ratio(hit, hit + wrong), n)
        parts[f"{split} recall"] = Part(_ratio(hit, hit + missed), n)
        parts[f"{split} f1"] = Part(_ratio(2 * hit, 2 * hit + wrong + missed), n)
        parts[f"{split} yes ratio"] = Part(_ratio(hit + wrong, n), n)
    scores = [value.score for name, value in parts.items() if name.endswith(" f1")]
    parts["accuracy"] = part(list(records))
    return Summary(mean(scores), "mean f1", "share", "macro_f1", len(records), tuple(units), parts)


def _ratio(upper: float, lower: float) -> float:
    return upper / lower if lower else 0.0


MME_PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme(records: Sequence[Record]) -> Summary:
    """Perception points: per category, accuracy in percent plus the percentage of images with both answers right."""
    parts: dict[str, Part] = {}
    units = []
    for category, some in by(records, "category").items():
        images = by(some, "image")
        values = {name: _mme_points([float(r["score"]) for r in two]) for name, two in images.items()}
        parts[category] = Part(mean(list(values.values())), len(some))
        if category in MME_PERCEPTION:
            units += [Unit(f"{category}/{name}", category, (points,)) for name, points in values.items()]
    sums = {
        "perception": [parts[c].score for c in MME_PERCEPTION if c in parts],
        "cognition": [parts[c].score for c in MME_COGNITION if c in parts],
    }
    counts = {"perception": MME_PERCEPTION, "cognition": MME_COGNITION}
    for name, scores in sums.items():
        parts[name] = Part(sum(scores), sum(parts[c].n for c in counts[name] if c in parts))
    parts["perception / 20"] = Part(parts["perception"].score / 20, parts["perception"].n)
    return Summary(parts["perception"].score, "perception", "points", "sum", len(records), tuple(units), parts)


def _mme_points(right: Sequence[float]) -> float:
    return 100 * mean(right) + 100 * float(len(right) > 0 and all(right))


def mme_reasoning(records: Sequence[Record]) -> Summary:
    """Overall mean; per capability and kind of reasoning a record may count several times, as in the original table."""
    from vlm.scoring.mme_reasoning import CAPABILITIES, REASONING_TYPES

    parts = {}
    for field_name, names in (("capability", CAPABILITIES), ("reasoning_type", REASONING_TYPES)):
        for name in names:
            some = [r for r in records if name in str(r["group"].get(field_name, ""))]
            if some:
                parts[name] = part(some)
    for kind, some in by(records, "question_type").items():
        parts[f"{kind} questions"] = part(some)
    return Summary(
        mean([float(r["score"]) for r in records]),
        "accuracy",
        "share",
        "mean",
        len(records),
        tuple(Unit(r["id"], "", (float(r["score"]),)) for r in records),
        parts,
    )
