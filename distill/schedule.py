"""KPOD's progressive schedule (arXiv 2405.16064): from the last steps of a reasoning backwards to all of it.

At stage t a sample's first c_i(t) steps are given and the rest is learned. What is learned may be as difficult in all as a
budget D(t) that grows from C0 at stage 0 to B, everything, at stage T:

    D(t) = u t^(p+1) / (p+1) + C0,   u = (B - C0) (p+1) / T^(p+1)
    H(t) = sum over samples of d_k over the steps k > c_i(t)

A stage chooses the set S of samples that lose `stride` given steps; with dH(S) what that adds to H,

    maximise  F(S) = -(D(t) - H - dH(S)) + beta sum over clusters C of sqrt(|C and S|)   where  dH(S) <= D(t) - H

F(S) - F(empty) is monotone and submodular, so greedy choices by gain a unit of cost, by gain, and the best single sample
are tried and the best of them kept. After stage T nothing is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """How many steps are given, stage by stage.

    Attributes:
        given_SN: of each sample at stages 0 .. T; the last row is zero.
        learned_S: H(t), difficulty of what is learned.
        budget_S: D(t).
    """

    given_SN: Ints
    learned_S: Floats
    budget_S: Floats

    @property
    def stages(self) -> int:
        """T."""
        return len(self.given_SN) - 1

    def stage(self, step: int, steps: int, until: float) -> int:
        """The stage of an optimiser step (from 0): stages of equal length in the first `until` of the run, T after it."""
        end = steps * until
        return self.stages if step >= end else int(step * self.stages / end)


def budget(t: float, stages: int, total: float, start: float, growth: float) -> float:
    """D(t); `start` is C0, `growth` the paper's p."""
    if stages == 0:
        return total
    rate = (total - start) * (growth + 1) / stages ** (growth + 1)
    return rate * t ** (growth + 1) / (growth + 1) + start


def plan(
    difficulty: Sequence[Floats], cluster_N: Ints, stages: int, start: float, growth: float, diversity: float
) -> Plan:
    """Choose for every stage which samples lose given steps.

    Args:
        difficulty: of every sample d_k by step.
        start: C0 as a share of all difficulty.
        diversity: the paper's beta.
    """
    steps_N = np.array([len(d) for d in difficulty])
    # tail[i][c]: difficulty of sample i's steps after the first c
    tails = [np.concatenate([np.cumsum(d[::-1])[::-1], [0.0]]) for d in difficulty]
    total = float(sum(tail[0] for tail in tails))
    stride = max(1, math.ceil((int(steps_N.max()) - 1) / max(stages, 1)))
    given_N = steps_N.copy()
    given, learned, budgets = [], [], []
    for t in range(stages + 1):
        allowed = budget(t, stages, total, start * total, growth)
        now = float(sum(tail[c] for tail, c in zip(tails, given_N, strict=True)))
        if t == stages:
            given_N = np.zeros_like(given_N)
        else:
            fewer_N = np.maximum(given_N - stride, 0)
            pairs = zip(tails, fewer_N, given_N, strict=True)
            cost_N = np.array([tail[after] - tail[before] for tail, after, before in pairs])
            open_N = np.flatnonzero(given_N > 0)
            chosen = open_N[choose(cost_N[open_N], cluster_N[open_N], allowed - now, diversity)]
            given_N = given_N.copy()
            given_N[chosen] = fewer_N[chosen]
        given.append(given_N)
        learned.append(float(sum(tail[c] for tail, c in zip(tails, given_N, strict=True))))
        budgets.append(allowed)
    return Plan(np.stack(given), np.array(learned), np.array(budgets))


def gain(chosen: Ints, cost_N: Floats, cluster_N: Ints, diversity: float) -> float:
    """F(S) - F(empty)."""
    counts = np.bincount(cluster_N[chosen]) if len(chosen) else np.zeros(1)
    return float(cost_N[chosen].sum() + diversity * np.sqrt(counts).sum())


def choose(cost_N: Floats, cluster_N: Ints, room: float, diversity: float) -> Ints:
    """A set of samples of nearly the largest gain whose cost fits into `room`."""
    fits = np.flatnonzero(cost_N <= room)
    if not len(fits):
        return np.zeros(0, np.int64)
    single = fits[np.argmax(cost_N[fits])]
    candidates = [
        np.array([single]),
        *(_greedy(cost_N, cluster_N, room, diversity, by_cost) for by_cost in (True, False)),
    ]
    return max(candidates, key=lambda chosen: gain(chosen, cost_N, cluster_N, diversity))


def _greedy(cost_N: Floats, cluster_N: Ints, room: float, diversity: float, by_cost: bool) -> Ints:
    """Take the best next sample until nothing fits.

    All samples of a cluster offer the same diversity, so the best of them is the cheapest (gain a unit of cost) or the
    dearest (gain), and one sorted queue a cluster is enough.
    """
    order = np.argsort(cost_N if by_cost else -cost_N, kind="stable")
    queues: dict[int, list[int]] = {}
    for i in order.tolist():
        queues.setdefault(int(cluster_N[i]), []).append(i)
    heads, taken = dict.fromkeys(queues, 0), dict.fromkeys(queues, 0)
    chosen: list[int] = []
    while True:
        best, best_value = None, -math.inf
        for cluster, queue in queues.items():
            while heads[cluster] < len(queue) and cost_N[queue[heads[cluster]]] > room:
                heads[cluster] += 1
            if heads[cluster] == len(queue):
                continue
            cost = float(cost_N[queue[heads[cluster]]])
            worth = cost + diversity * (math.sqrt(taken[cluster] + 1) - math.sqrt(taken[cluster]))
            value = worth / cost if by_cost and cost > 0 else math.inf if by_cost else worth
            if value > best_value:
                best, best_value = cluster, value
        if best is None:
            return np.array(chosen, np.int64)
        i = queues[best][heads[best]]
        heads[best] += 1
        taken[best] += 1
        chosen.append(i)
        room -= float(cost_N[i])
