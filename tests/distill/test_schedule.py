"""KPOD's schedule: budget, monotonicity, and greedy choices against every subset."""

from __future__ import annotations

import numpy as np
import pytest

from distill import schedule


def random_difficulty(count: int, longest: int, seed: int) -> tuple[list[schedule.Floats], schedule.Ints]:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, count)
    return [random.exponential(2.0, n) for n in lengths], random.integers(0, 5, count)


def test_the_budget_starts_at_c0_and_ends_with_everything() -> None:
    for stages, total, growth in ((4, 100.0, 0.5), (9, 3.7, 0.0), (3, 1e6, 2.0)):
        assert schedule.budget(0, stages, total, 0.3 * total, growth) == pytest.approx(0.3 * total, abs=1e-9)
        assert schedule.budget(stages, stages, total, 0.3 * total, growth) == pytest.approx(total, rel=1e-12)
        values = [schedule.budget(t, stages, total, 0.3 * total, growth) for t in range(stages + 1)]
        assert values == sorted(values)


@pytest.mark.parametrize("stages", [1, 4, 10])
@pytest.mark.parametrize("longest", [3, 17])
def test_the_plan_keeps_its_budget_and_ends_with_nothing_given(stages: int, longest: int) -> None:
    difficulty, clusters = random_difficulty(60, longest, seed=stages)
    found = schedule.plan(difficulty, clusters, stages, start=0.3, growth=0.5, diversity=12.0)
    assert found.given_SN.shape == (stages + 1, 60)
    assert (np.diff(found.given_SN, axis=0) <= 0).all()
    assert (found.given_SN >= 0).all()
    assert (found.given_SN[-1] == 0).all()
    assert (found.learned_S <= found.budget_S + 1e-9).all()
    assert found.learned_S[-1] == pytest.approx(sum(d.sum() for d in difficulty))
    if stages > 1:
        assert found.given_SN[0].any(), "the first stage gives something"
        assert found.learned_S[0] > 0, "and learns something"


def test_stages_have_equal_length_and_end_before_the_run_does() -> None:
    difficulty, clusters = random_difficulty(8, 5, seed=0)
    found = schedule.plan(difficulty, clusters, 4, 0.3, 0.5, 12.0)
    seen = [found.stage(step, 100, 0.5) for step in range(100)]
    assert seen == sorted(seen)
    assert [seen.count(t) for t in range(5)] == [13, 12, 13, 12, 50]
    assert schedule.Plan(np.zeros((1, 3), np.int64), np.zeros(1), np.zeros(1)).stage(0, 100, 0.5) == 0


@pytest.mark.parametrize(("steps", "stages", "until"), [(30, 20, 0.9), (100, 36, 0.5), (100, 49, 0.5), (7, 3, 1.0)])
def test_whole_rationales_come_when_they_are_promised(steps: int, stages: int, until: float) -> None:
    found = schedule.Plan(np.zeros((stages + 1, 1), np.int64), np.zeros(stages + 1), np.zeros(stages + 1))
    seen = [found.stage(step, steps, until) for step in range(steps)]
    assert seen == sorted(seen)
    whole = round(steps * until)
    assert all(t < stages for t in seen[:whole])
    assert all(t == stages for t in seen[whole:])


def test_greedy_choices_reach_half_of_the_best_subset() -> None:
    random = np.random.default_rng(7)
    worst = 1.0
    for _ in range(200):
        count = int(random.integers(1, 13))
        cost = random.exponential(1.0, count) * random.choice([0.1, 1.0, 10.0])
        cluster = random.integers(0, 5, count)
        room = float(random.uniform(0.05, 1.0) * cost.sum())
        beta = float(random.choice([0.0, 0.5, 12.0]))
        chosen = schedule.choose(cost, cluster, room, beta)
        assert cost[chosen].sum() <= room + 1e-12
        assert len(set(chosen.tolist())) == len(chosen)
        best = best_gain(cost, cluster, room, beta)
        if best > 0:
            worst = min(worst, schedule.gain(chosen, cost, cluster, beta) / best)
    assert worst >= 0.5


def best_gain(cost: schedule.Floats, cluster: schedule.Ints, room: float, beta: float) -> float:
    """The largest gain of all subsets that fit."""
    inside = (np.arange(1 << len(cost))[:, None] >> np.arange(len(cost))) & 1
    spent = inside @ cost
    counts = inside @ np.eye(5)[cluster]
    return float((spent + beta * np.sqrt(counts).sum(axis=1))[spent <= room].max())


def test_a_room_too_small_for_anything_chooses_nothing() -> None:
    assert len(schedule.choose(np.array([2.0, 3.0]), np.array([0, 1]), 1.0, 12.0)) == 0
