"""Inclusion probabilities, against a walk through all orders of a draw."""

from itertools import permutations
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymask.core.masking.inclusion import MAX_TRANSITIONS, NEVER, inclusion_probabilities, threshold_approximation


def slow(chances, n):
    """Over all orders, one after another."""
    found = [0.0] * len(chances)
    for order in permutations(range(len(chances)), n):
        probability, left = 1.0, sum(chances)
        for entry in order:
            probability *= chances[entry] / left
            left -= chances[entry]
        for entry in order:
            found[entry] += probability
    return found


def raced(log_p, n, times):
    """Estimated from so many races."""
    rng, found = torch.Generator().manual_seed(0), torch.zeros_like(log_p)
    for _ in range(times):
        earliness = log_p - torch.empty_like(log_p).exponential_(generator=rng).log()
        found.scatter_add_(1, earliness.topk(n, dim=1).indices, torch.ones(len(log_p), n))
    return found / times


@given(st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=6), st.data())
def test_the_chances_of_few_are_exact(chances, data):
    n = data.draw(st.integers(1, len(chances) - 1))
    log_p = torch.tensor([chances]).log()
    assert inclusion_probabilities(log_p, n)[0].tolist() == pytest.approx(slow(chances, n), abs=1e-5)


@pytest.mark.parametrize(("size", "n"), [(8, 4), (16, 2), (16, 8), (64, 16)])
@pytest.mark.parametrize("exponent", [1.0, 5.0])
def test_the_chances_are_those_of_many_races(gaussian, size, n, exponent):
    log_p = exponent * gaussian(60, size).abs().log()
    error = inclusion_probabilities(log_p, n) - raced(log_p, n, 4000)
    exact = sum(comb(size, drawn) * (size - drawn) for drawn in range(n)) <= MAX_TRANSITIONS
    assert float(error.square().mean().sqrt()) < (0.009 if exact else 0.018)  # of the races themselves: 0.008
    assert float(error.abs().max()) < (0.04 if exact else 0.13)


@pytest.mark.parametrize(("size", "n"), [(4, 2), (8, 1), (16, 8)])
@given(spread=st.sampled_from([0.0, 1.0, 300.0, 1e5]), seed=st.integers(0, 2**32))
def test_chances_sum_to_the_places_and_follow_the_scores_however_far_these_lie_apart(size, n, spread, seed):
    log_p = spread * torch.randn(20, size, generator=torch.Generator().manual_seed(seed))
    chances = inclusion_probabilities(log_p, n)
    assert bool(((chances >= 0) & (chances <= 1)).all())
    assert chances.sum(1).tolist() == pytest.approx([float(n)] * 20, abs=1e-3)
    ranked = chances.gather(1, log_p.argsort(1, descending=True))
    assert bool((ranked.diff() <= 1e-5).all())


@pytest.mark.parametrize("chances", [inclusion_probabilities, threshold_approximation])
def test_what_is_out_leaves_its_places_to_the_others(chances):
    log_p = torch.tensor([[0.0, -1.0, NEVER, NEVER], [0.0, NEVER, NEVER, NEVER], [0.0, 0.0, 0.0, NEVER]])
    found = chances(log_p, 2)
    assert found[0, :2].tolist() == pytest.approx([1.0, 1.0])
    assert found[1, 0] == pytest.approx(1.0)
    assert found[2].tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 0.0], abs=0.01)
