"""Candidate drawing on plain tensors: distributions, weights, packing."""

from __future__ import annotations

import pytest
import torch

from distill import attention, ribbon

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -20.0])


def uniform(rows: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, count, generator=torch.Generator().manual_seed(seed))


def test_independent_draws_follow_the_students_distribution_and_repeats_are_merged() -> None:
    ids, weight = ribbon.propose(LOGITS.repeat(20_000, 1), uniform(20_000, 3), "multinomial")
    torch.testing.assert_close(weight.sum(dim=1), torch.ones(20_000))
    seen = torch.zeros(5).index_add_(0, ids.flatten(), weight.flatten()) / 20_000
    torch.testing.assert_close(seen, LOGITS.softmax(-1), atol=0.01, rtol=0)
    for row, share in zip(ids[:500].tolist(), weight[:500].tolist(), strict=True):
        kept = [token for token, w in zip(row, share, strict=True) if w > 0]
        assert len(kept) == len(set(kept)) == len(set(row))
        for token, w in zip(row, share, strict=True):
            assert w == pytest.approx(row.count(token) / 3) or w == 0


def test_distinct_draws_are_without_replacement() -> None:
    ids, weight = ribbon.propose(LOGITS.repeat(20_000, 1), uniform(20_000, 3), "distinct")
    assert all(len(set(row)) == 3 for row in ids[:500].tolist())
    assert (weight == weight[0, 0]).all()
    p = LOGITS.softmax(-1)
    first = torch.bincount(ids[:, 0], minlength=5) / len(ids)
    torch.testing.assert_close(first, p, atol=0.015, rtol=0)
    # probability of drawing i first and j second without replacement is p_i p_j / (1 - p_i)
    pair = ((ids[:, 0] == 0) & (ids[:, 1] == 1)).float().mean()
    assert float(pair) == pytest.approx(float(p[0] * p[1] / (1 - p[0])), abs=0.015)


def test_top_k_candidates_are_the_most_likely_tokens() -> None:
    ids, _ = ribbon.propose(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), uniform(1, 2), "top-k")
    assert ids.tolist() == [[1, 3]]


@pytest.mark.parametrize("sampling", ["multinomial", "distinct", "top-k"])
def test_forbidden_and_impossible_tokens_are_never_drawn(sampling: ribbon.Sampling) -> None:
    logits = torch.tensor([[9.0, 1.0, 1.0, 1.0, -torch.inf]]).repeat(1000, 1)
    edge = torch.full((1000, 3), 1 - 2.0**-24)
    for numbers in (uniform(1000, 3), edge, torch.zeros(1000, 3)):
        ids, _ = ribbon.propose(logits, numbers, sampling, forbidden=(0,))
        assert not ((ids == 0) | (ids == 4)).any()


def test_uniform_numbers_are_uniform_and_depend_on_the_key_alone() -> None:
    keys = torch.arange(20_000)
    numbers = ribbon.uniforms(keys, 4)
    assert 0 <= float(numbers.min()) <= float(numbers.max()) < 1
    assert torch.equal(ribbon.uniforms(keys[77:78], 4)[0], numbers[77])
    for column in numbers.T:
        counts = torch.histc(column, bins=20, min=0, max=1)
        assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8  # chi-squared with 19 degrees of freedom, p = 0.001
    assert float(torch.corrcoef(numbers.T).fill_diagonal_(0).abs().max()) < 0.03


def test_mix_is_splitmix64() -> None:
    # first output of the published generator with seed 0 and with seed 1234567 (as unsigned numbers)
    for seed, expected in ((0, 0xE220A8397B1DCDAF), (1234567, 6457827717110365317)):
        value = int(ribbon.mix(torch.tensor(seed) + ribbon._GOLDEN))
        assert value % (1 << 64) == expected


def test_sample_keys_ignore_padding_and_neighbours() -> None:
    ids = torch.tensor([[7, 8, 9, 0], [8, 7, 9, 0], [0, 7, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 1]])
    keys = ribbon.sample_keys(ids, mask).tolist()
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize("vocabulary", [7, 512, 1024, 1300])
def test_draws_are_the_inverse_of_the_cumulative_distribution(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn(6, vocabulary, generator=generator, dtype=torch.float64)
    logits[:, vocabulary // 3 : vocabulary // 2] = -torch.inf
    logits[0, -2:] = -torch.inf
    uniform = torch.rand(6, 40, generator=generator)
    uniform[:, 0], uniform[:, 1] = 0, 1 - 2.0**-24
    ids = ribbon._inverse(logits.softmax(dim=-1), uniform)
    whole = logits.softmax(dim=-1).cumsum(dim=-1)
    plain = torch.searchsorted(whole, uniform.double() * whole[:, -1:], right=True)
    assert torch.equal(ids, plain.clamp(max=vocabulary - 1))
    assert torch.isfinite(logits.gather(1, ids)).all()


def test_thinned_candidates_are_few_and_keep_their_expected_weights() -> None:
    weight = torch.tensor(
        [[0.75, 0.25, 0.0, 0.0], [0.0, 0.25, 0.25, 0.25], [0.5, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]
    )
    sample = torch.tensor([0, 0, 0, 2])
    thinned = torch.stack(
        [ribbon.thin(weight, sample, 0.25, torch.tensor([u, 0.5, u])) for u in torch.linspace(0, 0.999, 1000).tolist()]
    )
    torch.testing.assert_close(thinned.mean(dim=0), weight, atol=3e-3, rtol=0)
    counts = (thinned > 0).flatten(2).sum(dim=-1)
    assert set(counts[:, :3].sum(dim=1).tolist()) <= {2, 3}, "2.25 of nine draws"
    assert set(counts[:, 3].tolist()) == {1}
    assert torch.equal(ribbon.thin(weight, sample, 1.0, torch.zeros(3)), weight)


def test_thinning_a_sample_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(0, 3, (30, 3), generator=generator) / 3
    sample = torch.arange(30) // 10
    uniform = torch.rand(3, generator=generator)
    together = ribbon.thin(weight, sample, 0.3, uniform)
    alone = [ribbon.thin(weight[sample == b], sample[sample == b] - b, 0.3, uniform[b : b + 1]) for b in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_drawn_visual_weights_are_unbiased_and_few() -> None:
    weight = torch.tensor([[0.5, 0.3, 0.0, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    drawn = torch.stack(
        [attention.draw_visual(weight, 3, torch.tensor([u, u])) for u in torch.linspace(0, 0.999, 1000).tolist()]
    )
    torch.testing.assert_close(drawn.mean(dim=0), weight, atol=2e-3, rtol=0)
    assert int((drawn > 0).sum(dim=-1).max()) <= 3
    torch.testing.assert_close(drawn.sum(dim=-1), weight.sum(dim=-1).expand(1000, -1))


def test_arrange_drops_gold_and_repeats_and_packs_ragged_rows() -> None:
    ids = torch.tensor([[5, 6], [7, 7], [9, 5]])
    weight = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])
    where = torch.tensor([0, 0, 2]), torch.tensor([3, 4, 2]), torch.tensor([5, 1, 9])
    packed = ribbon.arrange(ids, weight, *where, batch=3)
    assert packed.keep_BC.sum(dim=1).tolist() == [2, 0, 1]
    assert packed.ids_BC[0].tolist() == [6, 7]
    assert packed.place_BC[0].tolist() == [3, 4]
    assert packed.weight_BC[0].tolist() == [0.5, 1.0]
    assert packed.ids_BC[2, 0] == 5
    everything = ribbon.arrange(ids, weight, *where, batch=3, drop_gold=False)
    assert int(everything.keep_BC.sum()) == 5


def test_no_candidates_at_all_gives_an_empty_block() -> None:
    one = torch.tensor([1])
    packed = ribbon.arrange(torch.tensor([[4]]), torch.ones(1, 1), one - 1, one, torch.tensor([4]), batch=2)
    assert packed.ids_BC.shape == (2, 0)
    assert not packed.keep_BC.any()
