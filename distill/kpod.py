"""KPOD beside a run: learn the token weights, measure the steps' difficulty, plan the stages, hand all of it to training.

What is found is kept in OUT/kpod.safetensors, so a resumed run trains with the very same numbers.

Deviations from arXiv 2405.16064, which was made for text: the image stays in the prompt; the predictor is a copy of the
student; questions are clustered by their mean student embedding; a stage moves by as many steps as all of a rationale
need (one step a stage cannot empty long ones).

Shape legend: N = records, B = samples of a batch, T = tokens, R = rationale tokens, D = hidden.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from distill import access, processes, schedule, weigher
from distill.batch import Batch
from distill.config import TrainConfig
from distill.data import Collator, Example, Examples, to_batch
from distill.head import HeadLoss, Rows
from distill.predictor import Places, Prefixes, predictor
from vlm.console import Progress, note
from vlm.errors import DataError, UserError
from vlm.files import write_atomic

FILE = "kpod.safetensors"
BATCH = 16
PAPER = "arXiv 2405.16064"


@dataclass(frozen=True)
class Found:
    """What a run trains with.

    Attributes:
        weight: of every rationale token, record after record, float16.
        weight_at: where each record's begin, N + 1 numbers.
        given_SN: steps given at every stage; zeros without a schedule.
    """

    weight: Tensor
    weight_at: Tensor
    given_SN: Tensor

    def weights(self, number: int, steps_T: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
        """weight_T of a record's tokens: one where no step is."""
        found = np.ones(len(steps_T), np.float32)
        found[steps_T > 0] = self.weight[int(self.weight_at[number]) : int(self.weight_at[number + 1])].float().numpy()
        return found


class Weighted:
    """Examples of a data set with the weights of their tokens."""

    def __init__(self, examples: Examples, found: Found) -> None:
        self.examples, self.found = examples, found

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        example = self.examples[index]
        assert example.steps is not None
        return dataclasses.replace(example, weights=self.found.weights(index, example.steps), number=index)

    def __getattr__(self, name: str) -> Any:
        if name == "examples":  # while being unpickled
            raise AttributeError(name)
        return getattr(self.examples, name)


@dataclass(frozen=True)
class Curriculum:
    """Takes the given steps out of a micro-batch: their tokens stay in the sequence and weigh nothing."""

    plan: schedule.Plan
    steps: int
    until: float

    def __call__(self, tensors: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        given_N = torch.from_numpy(self.plan.given_SN[self.plan.stage(step, self.steps, self.until)])
        given_B1 = given_N[tensors["record"].cpu()][:, None].to(tensors["step"].device)
        learned_BT = (tensors["step"] == 0) | (tensors["step"] > given_B1)
        return {**tensors, "token_weight": tensors["token_weight"] * learned_BT}


def wanted(config: TrainConfig) -> bool:
    return config.tokens.weights == "kpod" or config.schedule == "kpod"


def refuse_without_steps(examples: Examples) -> None:
    """Raises UserError where the data has no reasonings."""
    if examples[0].steps is None:
        raise UserError(
            "kpod weighs the steps of rationales and this data has none; it needs records with question, steps and answer "
            "(--format rationale)"
        )


def prepare(config: TrainConfig, student: nn.Module, examples: Examples, pad: int, device: torch.device) -> Found:
    """Weights and plan of a run: found anew, or as they were found when it began.

    Raises:
        UserError: the data has no rationales.
    """
    path = config.out / FILE
    if not path.is_file():
        processes.first(lambda: _find(config, student, examples, pad, device))
    from safetensors.torch import load_file

    stored = load_file(path)
    return Found(stored["weight"], stored["weight_at"], stored["given"])


def header(config: TrainConfig) -> str:
    """What a run says of its token weights and schedule, departures from the paper named."""
    kpod = config.kpod
    weights = (
        f"weights=kpod alpha={kpod.alpha:g} floor={kpod.floor:g}" if config.tokens.weights == "kpod" else "weights=none"
    )
    plan = (
        f"schedule=kpod C0={kpod.start:g} p={kpod.growth:g} beta={kpod.diversity:g} until={kpod.until:g}"
        if config.schedule == "kpod"
        else "schedule=none"
    )
    return (
        f"kpod: {weights} {plan} normalise={config.tokens.normalise}; not as in {PAPER}: images in the prompt, the student's "
        "own chat template, a copy of the student as predictor, a weigher that looks back only and at first pays nothing, "
        f"{kpod.prefixes} prefixes drawn of all, clusters of mean student embeddings, stages of equal steps"
    )


def curriculum(config: TrainConfig, found: Found) -> Curriculum | None:
    if config.schedule != "kpod":
        return None
    nothing = np.zeros(len(found.given_SN))
    plan = schedule.Plan(found.given_SN.numpy().astype(np.int64), nothing, nothing)
    return Curriculum(plan, config.steps, config.kpod.until)


def _find(config: TrainConfig, student: nn.Module, examples: Examples, pad: int, device: torch.device) -> None:
    refuse_without_steps(examples)
    before = next(student.parameters()).device
    was_training = student.training
    student.to(device).eval()
    finder = Finder(config, student, examples, Collator(pad), device)
    try:
        finder.write(config.out / FILE)
    finally:
        student.to(before).train(was_training)


class Finder:
    """Runs the three parts over a data set."""

    def __init__(
        self, config: TrainConfig, student: nn.Module, examples: Examples, collate: Collator, device: torch.device
    ) -> None:
        self.config, self.student, self.examples = config, student, examples
        self.collate, self.device, self.kpod = collate, device, config.kpod

    def write(self, path: Path) -> None:
        """Find everything and keep it."""
        from safetensors.torch import save

        weighing = self.config.tokens.weights == "kpod"
        weigher_ = self.train_weigher() if weighing else None
        weight, at, difficulty, cluster_N = self.measure(weigher_)
        given = np.zeros((1, len(difficulty)), np.int64)
        if self.config.schedule == "kpod":
            found = self._plan(difficulty, cluster_N)
            given = found.given_SN
        told = {"options": json.dumps(dataclasses.asdict(self.kpod)), "weights": self.config.tokens.weights}
        tensors = {
            "weight": torch.from_numpy(weight.astype(np.float16)),
            "weight_at": torch.from_numpy(at),
            "difficulty": torch.from_numpy(np.concatenate(difficulty).astype(np.float32)),
            "steps": torch.tensor([len(d) for d in difficulty]),
            "cluster": torch.from_numpy(cluster_N),
            "given": torch.from_numpy(given.astype(np.int32)),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(tensors, metadata=told))
        if weighing:
            low, middle, high = np.percentile(weight, (10, 50, 90))
            note(
                f"kpod: weights of {len(weight)} rationale tokens: 10 % below {low:.2f}, half below {middle:.2f}, 10 % above {high:.2f}"
            )

    def _plan(self, difficulty: Sequence[npt.NDArray[np.float64]], cluster_N: npt.NDArray[np.int64]) -> schedule.Plan:
        config, kpod = self.config, self.kpod
        a_step = config.batch_size * config.accumulate * processes.world()
        epochs = config.steps * a_step / len(difficulty)
        stages = kpod.stages or max(4, round(epochs / 2))
        found = schedule.plan(difficulty, cluster_N, stages, kpod.start, kpod.growth, kpod.diversity)
        total = max(float(found.learned_S[-1]), 1e-9)
        shares = " ".join(f"{100 * value / total:.0f}" for value in found.learned_S)
        note(
            f"kpod: {stages} stages in the first {kpod.until:g} of the steps; per cent of all difficulty learned: {shares}"
        )
        return found

    def train_weigher(self) -> weigher.Weigher:
        """Weigher and predictor together, on a copy of the student."""
        kpod = self.kpod
        # everything random below is from here: the run's own stream stays as it is
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            model, trained = predictor(self.student, kpod)
            made = weigher.Weigher(_table(self.student).shape[1]).to(self.device)
        model.to(self.device)
        generator = torch.Generator().manual_seed(self.config.seed)
        order = self._order(generator)
        progress = Progress(kpod.weigher_steps, "kpod: token weights", every_s=10)

        def loss_of(_: int, temperature: float) -> weigher.Losses:
            batch, steps_BT = self._batch([self.examples[next(order)] for _ in range(kpod.weigher_batch)])
            at = Places.of(batch, steps_BT)
            embeds_BRD = _table(self.student)[at.ids(batch)].detach()
            predict = Prefixes(model, batch, at, kpod.prefixes)
            blank_D = _table(self.student).detach().mean(dim=0)
            return weigher.losses(made, embeds_BRD, at.real_BR, blank_D, predict, kpod.prefixes, temperature, generator)

        def look(_: int, found: weigher.Losses) -> None:
            progress.advance(1, f"answer {float(found.prediction.detach()):.3f}  kept {float(found.mask.detach()):.1f}")

        groups = [(list(made.parameters()), kpod.weigher_lr), (trained, kpod.predictor_lr)]
        with torch.enable_grad():
            weigher.fit(groups, loss_of, kpod.alpha, kpod.weigher_steps, look)
        return made.eval()

    def _order(self, generator: torch.Generator) -> Iterator[int]:
        while True:
            yield from torch.randperm(len(self.examples), generator=generator).tolist()

    def _batch(self, examples: Sequence[Example]) -> tuple[Batch, Tensor]:
        weighted = [dataclasses.replace(e, weights=np.ones(len(e.ids), np.float32)) for e in examples]
        for example in examples:
            if example.steps is None:
                raise DataError("some records have no steps; kpod needs rationales throughout")
        tensors = {name: value.to(self.device) for name, value in self.collate(weighted).items()}
        return to_batch(tensors), tensors["step"].long()

    @torch.no_grad()
    def measure(
        self, made: weigher.Weigher | None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], list[npt.NDArray[np.float64]], npt.NDArray[np.int64]]:
        """(weight of every rationale token, where each record's begin, difficulty of every step, cluster_N)."""
        weights: list[npt.NDArray[np.float32]] = []
        difficulty: list[npt.NDArray[np.float64]] = []
        questions: list[Tensor] = []
        progress = Progress(len(self.examples), "kpod: difficulty of steps", every_s=10)
        scheduled = self.config.schedule == "kpod"
        for start in range(0, len(self.examples), BATCH):
            chosen = [self.examples[i] for i in range(start, min(start + BATCH, len(self.examples)))]
            batch, steps_BT = self._batch(chosen)
            at = Places.of(batch, steps_BT)
            weight_BR = torch.ones_like(at.real_BR, dtype=torch.float32)
            if made is not None:
                logit_BR = made(_table(self.student)[at.ids(batch)], at.real_BR)
                weight_BR = torch.sigmoid(logit_BR).clamp(min=self.kpod.floor)
            cost_BT = _costs(self.student, batch) if scheduled else torch.zeros(steps_BT.shape, device=self.device)
            table = _table(self.student)
            for b in range(len(chosen)):
                weight_R = weight_BR[b, at.real_BR[b]]
                steps_R = steps_BT[b, steps_BT[b] > 0]
                weights.append(weight_R.cpu().numpy())
                difficulty.append(step_difficulty(weight_R, cost_BT[b, steps_BT[b] > 0], steps_R))
                questions.append(table[batch.input_ids_BT[b, batch.instruction_BT[b]]].mean(dim=0).float().cpu())
            progress.advance(len(chosen))
        at_N = np.cumsum([0, *map(len, weights)])
        clusters = np.zeros(len(difficulty), np.int64)
        if scheduled:
            clusters = _clusters(torch.stack(questions).nan_to_num().numpy(), self.kpod.clusters, self.config.seed)
        return np.concatenate(weights), at_N, difficulty, clusters


def step_difficulty(weight_R: Tensor, cost_R: Tensor, steps_R: Tensor) -> npt.NDArray[np.float64]:
    """d_k = sum over the step's tokens of softmax(w) times what the token costs the untrained student, in nats."""
    found = []
    for step in range(1, int(steps_R.max()) + 1):
        inside = steps_R == step
        found.append(float((weight_R[inside].softmax(dim=0) * cost_R[inside]).sum()) if inside.any() else 0.0)
    return np.array(found)


def _costs(model: nn.Module, batch: Batch) -> Tensor:
    """cost_BT: what each response token costs the model, in nats."""
    hidden_BTD = access.gold_pass(model, batch, keep_cache=False).hidden_BTD
    sample_N, place_N = batch.response_places()
    head = access.head(model)
    found = HeadLoss(head, len(head.weight_VD)).add(
        Rows(
            hidden_BTD[sample_N, place_N - 1],
            label_R=batch.input_ids_BT[sample_N, place_N],
            ce_weight_R=torch.ones(len(sample_N), device=hidden_BTD.device),
        )
    )
    cost_BT = torch.zeros(batch.input_ids_BT.shape, device=hidden_BTD.device)
    assert found.ce_R is not None
    cost_BT[sample_N, place_N] = found.ce_R
    return cost_BT


def _table(student: nn.Module) -> Tensor:
    table: Tensor = access.decoder(student).get_input_embeddings().weight
    return table


def _clusters(question_ND: npt.NDArray[np.float32], count: int, seed: int) -> npt.NDArray[np.int64]:
    from sklearn.cluster import KMeans

    different = len(np.unique(question_ND, axis=0))
    made = KMeans(min(count, different), n_init=4, random_state=seed % (1 << 32)).fit(question_ND)
    return np.asarray(made.labels_, np.int64)
