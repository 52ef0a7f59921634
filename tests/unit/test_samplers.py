"""Samplers: fast votes of the same distribution as the method's slow ones."""

from collections import Counter
from functools import partial
from itertools import combinations, pairwise, permutations, product
from math import comb, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from support.selections import unstructured

from raymask.core.masking import samplers
from raymask.core.masking.patterns import num_kept, topk_mask
from raymask.core.masking.samplers import (
    MARGIN,
    MAX_EXACT_DRAWS,
    MAX_EXACT_VOTES,
    SAMPLERS,
    histogram,
    prepare_binomial,
    random,
    sample_exact,
    sample_grouped,
    sample_undecided,
    votes_from_ratio,
    voting,
)
from raymask.testing import check_sampler
from raymask.testing.masking import check_sample

SIDE = 96
KEPT = SIDE * SIDE // 16
EDGES = [0, KEPT // 2, 7 * KEPT // 8, KEPT, 9 * KEPT // 8, 3 * KEPT // 2, 3 * KEPT, SIDE * SIDE]
"""Ranks by magnitude that bound the buckets, narrow where the outcome is open."""


def method(scores, density, ratio, exponent=5.0):
    """The method's votes in one contest of all `scores`, (1, entries), with as many votes as it takes."""
    kept = num_kept(scores.numel(), density)
    return voting(scores, kept, exponent, votes_from_ratio(scores.numel(), kept, ratio))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def judge(scores, rng, *, k, exponent, num_votes):
    """The method to the letter: V draws without replacement summed, ties in the sum broken at random."""
    chances = (scores.reshape(-1).double() / scores.max()) ** exponent
    tally = torch.rand(chances.numel(), generator=rng, dtype=torch.float64)
    for _ in range(num_votes):
        tally[torch.multinomial(chances, k, generator=rng)] += 1
    keep = torch.zeros(chances.numel(), dtype=torch.bool)
    keep[tally.topk(k).indices] = True
    return keep.view(scores.shape)


def masks_of(draw, scores, times, density=1 / 16):
    """bool (times, entries): masks drawn one after another, each of the exact count."""
    rng = seeded(11)
    masks = torch.stack([unstructured(draw(scores, rng), density).reshape(-1) for _ in range(times)])
    assert set(masks.sum(1).tolist()) == {num_kept(scores.numel(), density)}
    return masks


def agree(found, expected, scores):
    """Equal rates of inclusion by magnitude and an equal distance from the magnitude mask, both within 4.5 sigma."""
    order = scores.reshape(-1).argsort(descending=True)
    for start, end in pairwise(EDGES):
        ours, theirs = (masks[:, order[start:end]].float().mean().item() for masks in (found, expected))
        rate = (ours + theirs) / 2
        trials = (end - start) / (1 / len(found) + 1 / len(expected))
        error = sqrt(rate * (1 - rate) / trials)
        assert abs(ours - theirs) <= 4.5 * error + 1e-4, f"ranks {start} to {end}: {ours:.4f}, not {theirs:.4f}"
    ours, theirs = (masks[:, order[KEPT:]].sum(1) / KEPT for masks in (found, expected))
    error = sqrt(ours.var() / len(ours) + theirs.var() / len(theirs))
    assert abs(ours.mean() - theirs.mean()) <= 4.5 * error + 1e-4, (
        f"distance {ours.mean():.4f}, not {theirs.mean():.4f}"
    )


def strays(mask, scores, density):
    """Share of the kept entries that differ from the magnitude mask."""
    return int((mask & ~unstructured(scores, density)).sum()) / int(mask.sum())


@pytest.fixture(scope="module")
def square(gaussian):
    return gaussian(1, SIDE * SIDE).abs()


@pytest.mark.parametrize(("exponent", "count"), [(5.0, 1), (5.0, 8), (1.0, 20), (0.05, 20), (30.0, 20)])
def test_both_paths_agree_with_the_slow_sampler(square, exponent, count):
    arguments = {"k": KEPT, "exponent": exponent, "num_votes": count}
    expected = torch.stack([judge(square, rng, **arguments).reshape(-1) for rng in map(seeded, range(40))])
    agree(masks_of(partial(sample_exact, **arguments), square, 40), expected, square)
    if count > 1:  # a single vote is always a race
        agree(masks_of(prepare_binomial(square, **arguments), square, 80), expected, square)


def test_both_paths_agree_with_the_slow_sampler_on_a_parent_that_is_already_sparse(square):
    scores = square * (square >= square.reshape(-1).topk(3 * KEPT).values[-1])
    arguments = {"k": KEPT, "exponent": 5.0, "num_votes": 20}
    expected = torch.stack([judge(scores, rng, **arguments).reshape(-1) for rng in map(seeded, range(40))])
    agree(masks_of(partial(sample_exact, **arguments), scores, 40), expected, scores)
    agree(masks_of(prepare_binomial(scores, **arguments), scores, 80), expected, scores)


def slow_voting(chances, kept, count):
    """The exact probability of every kept set, over all orders, all sequences of votes and all broken ties."""
    single = Counter()
    for order in permutations(range(len(chances)), kept):
        probability, left = 1.0, sum(chances)
        for entry in order:
            probability *= chances[entry] / left
            left -= chances[entry]
        single[frozenset(order)] += probability
    outcome = Counter()
    for ballots in product(single, repeat=count):
        probability = 1.0
        tally = Counter()
        for ballot in ballots:
            probability *= single[ballot]
            tally.update(ballot)
        boundary = sorted((tally[entry] for entry in range(len(chances))), reverse=True)[kept - 1]
        sure = {entry for entry in tally if tally[entry] > boundary}
        tied = [entry for entry in range(len(chances)) if tally[entry] == boundary]
        for chosen in combinations(tied, kept - len(sure)):
            outcome[frozenset(sure.union(chosen))] += probability / comb(len(tied), kept - len(sure))
    return outcome


@pytest.mark.parametrize("count", [1, 3])
def test_masks_of_a_tiny_matrix_follow_the_exact_plackett_luce_probabilities(count):
    scores = torch.tensor([[1.0, 1.3, 0.7, 1.1, 0.9]])
    expected = slow_voting((scores[0].double() ** 2).tolist(), 2, count)
    assert sum(expected.values()) == pytest.approx(1.0)
    rng, found = seeded(count), Counter()
    for _ in range(4000):
        keys = sample_exact(scores, rng, k=2, exponent=2.0, num_votes=count)
        found[frozenset(unstructured(keys, 0.4)[0].nonzero()[:, 0].tolist())] += 1
    assert set(found) <= set(expected)
    observed = [found[outcome] for outcome in expected]
    assert chisquare(observed, [4000 * p for p in expected.values()]).pvalue > 1e-3


def test_one_vote_is_a_race_and_many_votes_on_a_large_matrix_are_predicted(gaussian):
    scores = gaussian(1, 1024 * 1024).abs()
    assert method(scores, 1 / 16, ratio=1e-7).func is sample_exact
    assert method(scores, 1 / 16, ratio=1e-5).func is sample_undecided
    assert method(scores[:, :64], 1 / 16, ratio=1.0).func is sample_exact
    assert scores.numel() == MAX_EXACT_DRAWS


@pytest.mark.parametrize("kind", ["race", "predicted"])
@settings(max_examples=20)
@given(
    exponent=st.sampled_from([0.05, 1.0, 5.0, 200.0, 1000.0]),
    count=st.integers(2, 300),
    share=st.floats(0.02, 0.9),
    seed=st.integers(0, 99),
)
def test_score_zero_is_never_kept_and_the_count_is_exact_whatever_the_noise(kind, exponent, count, share, seed):
    scores = torch.rand(1, 2000, generator=seeded(seed))
    scores[torch.rand(1, 2000, generator=seeded(seed + 100)) < 0.5] = 0
    live = int(scores.count_nonzero())
    kept = max(1, int(share * live))
    arguments = {"k": kept, "exponent": exponent, "num_votes": count}
    keys = (
        sample_exact(scores, seeded(seed), **arguments)
        if kind == "race"
        else prepare_binomial(scores, **arguments)(scores, seeded(seed))
    )
    mask = unstructured(keys, kept / scores.numel())
    assert not mask[scores == 0].any()
    assert int(mask.sum()) == kept
    assert bool((keys >= 0).all())


def test_score_zero_is_never_kept_where_too_few_entries_got_a_vote():
    scores = torch.rand(1, 400, generator=seeded(0))
    scores[:, ::2] = 0
    draw = prepare_binomial(scores, k=40, exponent=1000.0, num_votes=2)
    short = 0
    for seed in range(100):
        keys = draw(scores, seeded(seed))
        short += int((keys > 1).sum()) < 40
        assert not unstructured(keys, 0.1)[scores == 0].any()
    assert short > 0


@pytest.mark.parametrize("kind", ["race", "predicted"])
def test_ties_are_broken_at_random_and_not_by_position(kind):
    equal = torch.ones(1, SIDE * SIDE)
    arguments = {"k": KEPT, "exponent": 5.0, "num_votes": 20}
    draw = prepare_binomial(equal, **arguments) if kind == "predicted" else partial(sample_exact, **arguments)
    front = masks_of(draw, equal, 40)[:, : SIDE * SIDE // 2].float().mean().item()
    assert front == pytest.approx(1 / 16, abs=4.5 * sqrt(15 / 16 / 16 / (40 * SIDE * SIDE / 2)))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
@given(
    values=st.lists(st.sampled_from([0.0, 1e-40, 1e-3, 1.0, 1e30]) | st.floats(0, 1, width=32), max_size=40),
    contestants=st.integers(1, 40),
    share=st.floats(0, 1),
    exponent=st.sampled_from([0.1, 1.0, 5.0, 40.0]),
    count=st.sampled_from([1, 2, 20, 10**6]),
)
def test_every_sampler_fills_the_places_of_every_contest_with_live_entries_only(
    sampler, values, contestants, share, exponent, count
):
    whole = len(values) // contestants * contestants
    scores = torch.tensor(values[:whole], dtype=torch.float32).view(-1, contestants) if whole else torch.zeros(1, 0)
    check_sample(sampler, scores, int(share * scores.shape[1]), exponent, count)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
def test_every_sampler_keeps_the_rules(sampler):
    check_sampler(sampler)


def test_chance_alone_keeps_any_entry_that_has_a_score(square):
    scores = torch.where(square.abs() > 0.3, square.abs(), 0.0)
    masks = masks_of(random(scores, KEPT, 5.0, 7), scores, 300).float()
    live = scores.flatten() > 0
    rate = KEPT / int(live.sum())
    found = masks.reshape(300, -1)[:, live].mean(0)
    assert not masks.reshape(300, -1)[:, ~live].any()
    assert found.mean().item() == pytest.approx(rate)
    assert found.std().item() == pytest.approx(sqrt(rate * (1 - rate) / 300), rel=0.1)
    assert abs(torch.corrcoef(torch.stack([found, scores.flatten()[live]]))[0, 1].item()) < 0.1


@pytest.mark.parametrize("ratio", [1e-7, 0.01], ids=["race", "predicted"])
def test_the_same_generator_gives_the_same_keys_and_another_gives_others(gaussian, ratio):
    scores = gaussian(1, 256 * 256).abs()
    draw, again = method(scores, 1 / 16, ratio), method(scores, 1 / 16, ratio)
    assert torch.equal(draw(scores, seeded(1)), again(scores, seeded(1)))
    assert not torch.equal(unstructured(draw(scores, seeded(1)), 1 / 16), unstructured(draw(scores, seeded(2)), 1 / 16))


@pytest.mark.parametrize("count", [1, 30])
def test_a_very_large_exponent_gives_the_magnitude_mask(square, count):
    arguments = {"k": KEPT, "exponent": 1000.0, "num_votes": count}
    assert strays(unstructured(sample_exact(square, seeded(0), **arguments), 1 / 16), square, 1 / 16) <= 0.01
    assert (
        strays(unstructured(prepare_binomial(square, **arguments)(square, seeded(0)), 1 / 16), square, 1 / 16) <= 0.01
    )


def test_more_and_more_votes_converge_to_the_magnitude_mask(square):
    far = [
        strays(unstructured(prepare_binomial(square, KEPT, 5.0, count)(square, seeded(0)), 1 / 16), square, 1 / 16)
        for count in (10, 1000, 100_000, 10_000_000)
    ]
    assert far == sorted(far, reverse=True)
    assert far[0] > 0.1
    assert far[-1] == 0.0


def test_a_tiny_exponent_forgets_the_magnitudes(square):
    mask = unstructured(sample_exact(square, seeded(0), k=KEPT, exponent=1e-3, num_votes=1), 1 / 16)
    assert strays(mask, square, 1 / 16) == pytest.approx(15 / 16, abs=0.04)


@pytest.mark.parametrize(
    ("density", "ratio", "count", "share"),
    [
        (1 / 16, 1e-6, 1, 0.40),
        (1 / 16, 5e-5, 27, 0.11),
        (1 / 16, 3e-4, 165, 0.045),
        (1 / 100, 1e-6, 1, 0.69),
        (1 / 100, 5e-5, 29, 0.26),
        (1 / 100, 3e-4, 175, 0.11),
    ],
)
def test_masks_stray_from_the_magnitude_mask_as_far_as_was_measured(gaussian, density, ratio, count, share):
    scores = gaussian(1, 768 * 768).abs()
    assert votes_from_ratio(scores.numel(), num_kept(scores.numel(), density), ratio) == count
    keys = method(scores, density, ratio)(scores, seeded(1))
    assert strays(unstructured(keys, density), scores, density) == pytest.approx(share, abs=0.015)


def outside(arguments, miss):
    """`arguments` of `sample_undecided` whose boundary or span is wrong on purpose."""
    low, high = arguments["span"]
    wrong = {
        "boundary too high": {"boundary": (arguments["num_votes"], arguments["num_votes"])},
        "boundary too low": {"boundary": (0, 0)},
        "span too high": {"span": (high * 1.5, float("inf"))},
        "span too low": {"span": (low / 4, low / 2)},
    }
    return {**arguments, **wrong[miss]}


@pytest.mark.parametrize("miss", ["boundary too high", "boundary too low", "span too high", "span too low"])
def test_a_mispredicted_boundary_falls_back_to_drawing_every_live_entry(square, miss):
    arguments = prepare_binomial(square, KEPT, 5.0, 100).keywords
    assert 0 < arguments["span"][0] < arguments["span"][1] < float("inf")
    expected = masks_of(partial(sample_undecided, **{**arguments, "span": (0.0, float("inf"))}), square, 60)
    found = masks_of(partial(sample_undecided, **outside(arguments, miss)), square, 60)
    agree(found, expected, square)
    drawn = sample_undecided(square, seeded(0), **outside(arguments, miss))
    assert int(drawn.count_nonzero()) == square.numel()  # nothing was left out as certain


def test_a_well_predicted_boundary_draws_only_what_is_open(square):
    draw = prepare_binomial(square, KEPT, 5.0, 1000)
    keys = draw(square, seeded(0))
    low, high = draw.keywords["span"]
    assert torch.equal(keys > 0, square >= low)
    assert torch.equal(keys == 1002, square >= high)
    lowest, highest = draw.keywords["boundary"]
    assert 2 * MARGIN <= highest - lowest <= 2 * (MARGIN + 20)  # half a bin is worth a few votes of 1,000


@pytest.mark.parametrize("count", [10, 300, 1000, 12_680, 100_000])
def test_the_boundary_is_well_predicted_however_many_votes_there_are(monkeypatch, count):
    """A bin of the histogram is worth many votes of a large matrix, but the whole matrix must not be drawn for that."""
    weights = torch.randn(1, 300_000, generator=seeded(4)).abs()
    draws = [prepare_binomial(scores, scores.numel() // 16, 5.0, count) for scores in (weights, weights[:, :100_000])]
    monkeypatch.setattr(samplers, "sample_undecided", lambda *args, **more: pytest.fail("every live entry is drawn"))
    for draw, scores in zip(draws, (weights, weights[:, :100_000]), strict=True):
        for seed in range(3):
            draw(scores, seeded(seed))


@given(st.lists(st.floats(0, width=32, allow_infinity=False), min_size=1, max_size=60).filter(any))
def test_the_histogram_counts_every_live_entry(values):
    scores = torch.tensor(values, dtype=torch.float32)
    top, centers, sizes = histogram(scores)
    assert top == scores.max()
    assert sizes.sum() == scores.count_nonzero()
    assert (centers < 0).all()
    assert len(centers) == len(sizes)


@pytest.mark.parametrize(("entries", "kept", "ratio", "count"), [(10, 5, 1.0, 5), (10, 5, 1e-9, 1), (10, 10, 1.0, 1)])
def test_the_number_of_votes_is_the_method_s(entries, kept, ratio, count):
    assert votes_from_ratio(entries, kept, ratio) == count


def test_a_matrix_of_more_than_16_million_entries_is_drawn_exactly(gaussian):
    scores = gaussian(1, 4100 * 4100).abs()
    assert scores.numel() > 2**24  # which torch.multinomial refuses
    keys = method(scores, 1 / 16, ratio=5e-5)(scores, seeded(0))
    mask = unstructured(keys, 1 / 16)
    assert int(mask.sum()) == num_kept(scores.numel(), 1 / 16)
    assert strays(mask, scores, 1 / 16) == pytest.approx(0.022, abs=0.005)  # as sqrt(27 / 788) of 11.5 % at V = 27


# Many contests of few.


def rates(mask, order):
    """Share of the contests in which the entry of each rank is kept."""
    return mask.float().gather(1, order).mean(0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_race_of_many_small_contests_is_the_exact_one_in_each(count):
    chances = [1.0, 1.3, 0.7, 1.1, 0.9]
    scores = torch.tensor([chances]).repeat(4000, 1)
    keys = sample_exact(scores, seeded(count), k=2, exponent=2.0, num_votes=count)
    found = Counter(frozenset(row.nonzero()[:, 0].tolist()) for row in topk_mask(keys, 2))
    expected = slow_voting([chance**2 for chance in chances], 2, count)
    assert set(found) <= set(expected)
    assert chisquare([found[outcome] for outcome in expected], [4000 * p for p in expected.values()]).pvalue > 1e-3


@pytest.mark.parametrize(("size", "kept"), [(2, 1), (4, 1), (4, 2), (4, 3), (8, 4), (16, 1), (16, 4), (16, 8)])
@pytest.mark.parametrize("count", [MAX_EXACT_VOTES + 1, 200])
def test_votes_of_many_contests_agree_with_their_race(gaussian, size, kept, count):
    """To as much as `tally_contests` claims, beside four standard errors."""
    scores = gaussian(24_000 // size, size).abs()
    order, magnitude = scores.argsort(1, descending=True), topk_mask(scores, kept)
    arguments = {"k": kept, "exponent": 5.0, "num_votes": count}
    fast, slow = (topk_mask(draw(scores, seeded(1), **arguments), kept) for draw in (sample_grouped, sample_exact))
    assert fast.sum(1).tolist() == slow.sum(1).tolist() == [kept] * len(scores)
    close = 0.04 if size < 16 or kept < 3 else 0.15
    ours, theirs = (float((mask & ~magnitude).float().mean()) * size / kept for mask in (fast, slow))
    assert abs(ours - theirs) <= close * theirs + 4 * sqrt(2 * theirs / (len(scores) * kept))
    error = 4 * (0.5 / len(scores)) ** 0.5
    assert float((rates(fast, order) - rates(slow, order)).abs().max()) <= close * 0.3 + error


def test_few_votes_are_raced_and_many_tallied(gaussian):
    scores = gaussian(300_000, 4).abs()
    assert voting(scores, 2, 5.0, MAX_EXACT_VOTES).func is sample_exact
    assert voting(scores, 2, 5.0, MAX_EXACT_VOTES + 1).func is sample_grouped
    assert voting(scores[:1000], 2, 5.0, 100).func is sample_exact
    assert scores.numel() * (MAX_EXACT_VOTES + 1) > MAX_EXACT_DRAWS


@pytest.mark.parametrize("draw", [sample_exact, sample_grouped])
def test_contests_with_too_few_live_entries_keep_these_and_the_others_their_places(gaussian, draw):
    scores = gaussian(2000, 8).abs()
    scores[torch.rand(2000, 8, generator=seeded(0)) < 0.6] = 0
    mask = topk_mask(draw(scores, seeded(1), k=4, exponent=5.0, num_votes=20), 4)
    assert not mask[scores == 0].any()
    assert mask.sum(1).tolist() == scores.count_nonzero(1).clamp(max=4).tolist()


@pytest.mark.parametrize("draw", [sample_exact, sample_grouped])
def test_ties_within_contests_are_broken_at_random_and_not_by_position(draw):
    equal = torch.ones(20_000, 4)
    kept = topk_mask(draw(equal, seeded(0), k=2, exponent=5.0, num_votes=10), 2).float().mean(0)
    assert kept.tolist() == pytest.approx([0.5] * 4, abs=4.5 * sqrt(0.25 / 20_000))


@pytest.mark.parametrize(("exponent", "count"), [(1000.0, 20), (5.0, 10**7)])
def test_certain_groups_are_the_magnitude_mask_s(gaussian, exponent, count):
    """An entry that gets all votes, and one that gets none, are still ranked."""
    scores = gaussian(5000, 8).abs()
    mask = topk_mask(sample_grouped(scores, seeded(0), k=4, exponent=exponent, num_votes=count), 4)
    assert float((mask & ~topk_mask(scores, 4)).sum() / mask.sum()) <= 0.01


@pytest.mark.parametrize("count", [2, 20])
def test_contests_depend_on_the_generator_alone(gaussian, count):
    scores = gaussian(3000, 4).abs()
    for draw in (sample_exact, sample_grouped):
        first, again, other = (draw(scores, seeded(seed), k=2, exponent=5.0, num_votes=count) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(topk_mask(first, 2), topk_mask(other, 2))
