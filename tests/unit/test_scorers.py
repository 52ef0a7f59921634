"""Scorers: formulas, and weights that the parent has pruned."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymask.core.masking.scorers import DATA_FREE, MIN_RELATIVE_SCORE, SCORERS, Calibration, magnitude, saliency, wanda
from raymask.testing import check_score
from raymask.testing.masking import check_scored

WEIGHT = torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.0, -4.0]])
SEEN = Calibration(inputs=torch.tensor([3.0, 0.5, 1.0]), gradient=torch.tensor([[-1.0, 0.0, 9.0], [2.0, 9.0, 0.25]]))


def test_the_formulas():
    assert magnitude(WEIGHT).tolist() == [[1.0, 2.0, 0.0], [0.5, 0.0, 4.0]]
    assert wanda(WEIGHT, SEEN).tolist() == [[3.0, 1.0, 0.0], [1.5, 0.0, 4.0]]
    found = saliency(WEIGHT, SEEN)
    assert found[0, 1] == pytest.approx(MIN_RELATIVE_SCORE)  # it is there, though it changes nothing
    assert found.tolist() == [[1.0, found[0, 1].item(), 0.0], [1.0, 0.0, 1.0]]


@pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS.keys())
@given(
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e4]),
    asleep=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_scorer_is_zero_where_the_weight_is_and_only_there(scorer, seed, scale, asleep, dtype):
    rng = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(2, 6, 8, generator=rng)
    weight[torch.rand(6, 8, generator=rng) < 0.5] = 0
    awake = torch.rand(8, generator=rng) >= asleep
    seen = Calibration(scale * torch.rand(8, generator=rng) * awake, scale * gradient * awake)
    check_scored(scorer, weight.to(dtype), seen)


@pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS.keys())
def test_every_scorer_keeps_the_rules(scorer):
    check_score(scorer)


def test_only_the_magnitude_needs_no_calibration():
    assert {name for name, scorer in SCORERS.items() if scorer in DATA_FREE} == {"magnitude"}
    for scorer in set(SCORERS.values()) - DATA_FREE:
        with pytest.raises(AssertionError, match="needs calibration"):
            scorer(WEIGHT, None)
