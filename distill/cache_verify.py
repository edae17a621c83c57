"""Short runs that show how exact a cache is: along a live run step by step, and as a run of its own."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill import placement, processes, report
from distill.batch import Batch, Normaliser
from distill.cache import Cached, open_cached
from distill.config import TrainConfig
from distill.data import Collator
from distill.methods import LavitOptions
from distill.objective import Objective
from distill.train import Run, load_run, recomputed
from distill.trainer import METRICS, DistillTrainer
from vlm.console import note
from vlm.errors import GateFailed, UserError

# terms a cache can be held against the live teacher in: TPA draws its candidates from elsewhere
TERMS = ("kd", "iva")
# relative, where all logits are stored: sums in another order
EXACT = 1e-4


@dataclass(frozen=True)
class Followed:
    """One term over the steps of the verifying runs.

    Attributes:
        within: steps at which |cached - live| of one and the same student is within the step's bound; None without one.
        bound: mean of the bound relative to the live loss.
        error, largest_error: mean and largest |cached / live - 1| at the live run's students.
        drift, largest_drift: mean and largest |loss of the run from the cache / loss of the live run - 1|.
    """

    steps: int
    within: int | None
    bound: float | None
    error: float
    largest_error: float
    drift: float
    largest_drift: float

    def text(self, term: str) -> str:
        same = f"{_percent(self.error)} (largest {_percent(self.largest_error)})"
        if self.within is None:
            held = "no bound (see docs/teacher-cache.md)"
        else:
            held = f"bound {_percent(self.bound or 0)}, holds at {self.within} of {self.steps} steps"
        drift = f"{_percent(self.drift)} (largest {_percent(self.largest_drift)})"
        return f"{term}: same student: mean |cached - live| / live {same}; {held}. Runs of their own: {drift}"


@dataclass(frozen=True)
class Verified:
    """What both runs say, by term."""

    terms: dict[str, Followed]

    @property
    def text(self) -> str:
        return "\n".join(followed.text(term) for term, followed in self.terms.items())

    def to_json(self) -> dict[str, Any]:
        return {term: dataclasses.asdict(followed) for term, followed in self.terms.items()}

    def refuse_misses(self) -> None:
        """Raises GateFailed where a bound did not hold."""
        missed = [term for term, item in self.terms.items() if item.within is not None and item.within < item.steps]
        if missed:
            raise GateFailed(
                f"the loss from the cache left its bound ({', '.join(missed)}): the cache does not say what the teacher "
                "says; make it again with another --out"
            )


class Beside(Objective):
    """A live objective that also computes what a cache says of the same student: values `cached_kd` and the like."""

    def __init__(self, live: Objective, cached: Objective) -> None:
        super().__init__(live.terms, live.weights, live.align, live.teacher, live.vocabulary)
        self.cached = cached

    def __call__(
        self,
        student: nn.Module,
        batch: Batch,
        normaliser: Normaliser,
        seeds: Sequence[int] | None = None,
        step: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, values = super().__call__(student, batch, normaliser, seeds, step)
        with torch.no_grad():
            _, stored = self.cached(student, batch, normaliser, seeds)
        return loss, values | {f"cached_{name}": value for name, value in stored.items()}


def verify(config: TrainConfig, cache: Path, steps: int) -> Verified:
    """Train `steps` live, with the cache beside the teacher, and the same steps from the cache.

    Args:
        config: of the run; its tpa is left out.

    Raises:
        UserError: several processes, nothing to compare, or the cache does not fit or hold the data.
    """
    if processes.world() > 1:
        raise UserError("--verify runs in one process; run it alone, after all shards are done")
    terms = tuple(term for term in config.terms if term in TERMS)
    if not terms:
        raise UserError(f"--verify compares kd and iva, and objective {config.objective!r} has neither")
    with tempfile.TemporaryDirectory() as folder:
        note(f"verify: {steps} steps with the live teacher, then {steps} from the cache")
        live = _run(_short(config, steps, Path(folder) / "live", None), terms, cache)
        own = _run(_short(config, steps, Path(folder) / "cached", cache), terms, None)
    return Verified({term: _followed(term, live, own) for term in terms})


def _short(config: TrainConfig, steps: int, out: Path, cache: Path | None) -> TrainConfig:
    """The run cut to its first steps, without tpa and anything that is not a training step."""
    changes: dict[str, Any] = {"out": out, "teacher_cache": cache, "steps": steps, "save_every": 2 * steps}
    changes |= {"weights": dataclasses.replace(config.weights, tpa=0.0)}
    changes |= {"log_every": 1, "eval_every": 0, "visual_every": 0, "final": "last", "report_to": "none"}
    if cache is not None:
        changes |= {"teacher_device": "auto", "teacher_load": "none"}
    return dataclasses.replace(config, **changes)


def _run(config: TrainConfig, terms: tuple[str, ...], beside: Path | None) -> list[dict[str, float]]:
    """Logged values of every step; with a cache beside the live teacher also what it says (`Beside`)."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    run = load_run(config)
    align = recomputed(run)
    cached = None if beside is None else _open(config, run, beside)
    layer = 0 if cached is None else cached.layer
    objective = Objective(config.terms, config.weights, align, run.asked(align, layer), run.vocabulary)
    if cached is not None:
        objective = Beside(objective, Objective(terms, config.weights, align, cached.teacher, cached.vocabulary))
    config.out.mkdir(parents=True, exist_ok=True)  # a student with latents was written there
    pad = run.student_source.tokenizer.spec.pad_token_id
    trainer = DistillTrainer(config, run.student, objective, run.data.train, Collator(pad, keys=True), _nothing)
    trainer.go(None)
    logged = [line for line in report.read_metrics(config.out / METRICS) if terms[0] in line]
    if cached is not None and cached.teacher.head is not None:
        for line in logged:
            line |= {f"cached_{term}_bound": EXACT * line[term] for term in terms}
    return logged


def _open(config: TrainConfig, run: Run, cache: Path) -> Cached:
    """The cache beside a live run; asked for nothing but `TERMS`."""
    objective = "kd+iva" if "iva" in config.terms else "kd"
    asked = dataclasses.replace(
        config,
        teacher_cache=cache,
        objective=objective,
        lavit=LavitOptions(),
        teacher_device="auto",
        teacher_load="none",
    )
    return open_cached(asked, run.student_source, None, placement.student_device(), run.data.train)


def _nothing(_: DistillTrainer) -> dict[str, float]:
    return {}


def _followed(term: str, live: Sequence[dict[str, float]], own: Sequence[dict[str, float]]) -> Followed:
    pairs = [(line[f"cached_{term}"], line[term]) for line in live]
    bounds = [line.get(f"cached_{term}_bound") for line in live]
    errors = [abs(a / b - 1) for a, b in pairs]
    drifts = [abs(a[term] / b[term] - 1) for a, b in zip(own, live, strict=True)]
    known = [bound for bound in bounds if bound is not None]
    within, bound = None, None
    if len(known) == len(pairs):
        within = sum(abs(a - b) <= bound for (a, b), bound in zip(pairs, known, strict=True))
        bound = statistics.fmean(bound / b for (_, b), bound in zip(pairs, known, strict=True))
    return Followed(
        len(pairs), within, bound, statistics.fmean(errors), max(errors), statistics.fmean(drifts), max(drifts)
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
