"""Masks: what a seed, a density and a method make of weights, and packed bits."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.selections import unstructured

from raymask.core.masking.allocations import ALLOCATIONS
from raymask.core.masking.masks import (
    PruningMethod,
    apply,
    digest,
    distance,
    draw_mask,
    match_names,
    max_kept,
    num_kept_bits,
    pack_bits,
    unpack_bits,
)
from raymask.core.masking.noise import Noise
from raymask.core.masking.patterns import parse_pattern
from raymask.core.masking.samplers import random, voting
from raymask.core.masking.scorers import SCORERS, Calibration

NOISE = Noise(exponent=5.0, sampling_ratio=1e-3)
MAGNITUDE = {"density": 0.25, "seed": 5}
RANDOM = MAGNITUDE | {"noise": NOISE}
either = pytest.mark.parametrize("arguments", [MAGNITUDE, RANDOM], ids=["magnitude mask", "random"])


@st.composite
def bits(draw):
    """A bool tensor of any shape, empty and 0-d ones included."""
    shape = draw(st.lists(st.integers(0, 6), max_size=3))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    return torch.rand(shape, generator=rng) < draw(st.floats(0, 1))


masks = st.dictionaries(st.text(max_size=5), bits(), max_size=5)
full_masks = masks.filter(lambda mask: any(tensor.numel() for tensor in mask.values()))


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def fingerprint(mask):
    return digest(pack_bits(mask))


@pytest.fixture(scope="module")
def weights(gaussian):
    """Three matrices, two of them equal, large enough that the votes are predicted rather than raced."""
    return {
        "q.weight": gaussian(256, 128, seed=1),
        "k.weight": gaussian(256, 128, seed=1),
        "up.weight": gaussian(512, 128, seed=2),
    }


@given(masks)
def test_packed_bits_come_back_as_they_went(mask):
    again = unpack_bits(pack_bits(mask))
    assert same(again, mask)
    assert all(tensor.dtype == torch.bool and tensor.shape == mask[name].shape for name, tensor in again.items())


@given(masks)
def test_a_packed_mask_takes_one_bit_an_entry_in_whole_bytes(mask):
    assert pack_bits(mask).buffer.nbytes == sum(-(-tensor.numel() // 8) for tensor in mask.values())


@given(masks, st.integers(0, 99))
def test_packed_masks_are_counted_and_compared_as_they_are(mask, seed):
    rng = torch.Generator().manual_seed(seed)
    magnitude = {name: torch.rand(tensor.shape, generator=rng) < 0.5 for name, tensor in mask.items()}
    keeps = sum(int(tensor.sum()) for tensor in mask.values())
    strays = sum(int((tensor & ~magnitude[name]).sum()) for name, tensor in mask.items())
    assert num_kept_bits(pack_bits(mask)) == keeps
    assert astray(mask, magnitude) == strays / max(keeps, 1)


def test_bits_are_packed_row_by_row_from_the_most_significant():
    mask = {"w": torch.tensor([[True, False], [True, True], [False, False], [False, False], [True, False]])}
    assert pack_bits(mask).buffer.tolist() == [0b10110000, 0b10000000]
    assert pack_bits({"w": mask["w"].T}).buffer.tolist() == [0b11001010, 0b00000000]


def test_a_read_only_buffer_can_be_unpacked_and_its_masks_written(weights):
    packed = pack_bits(draw_mask(weights, **MAGNITUDE))
    packed.buffer.setflags(write=False)
    mask = unpack_bits(packed)
    mask["q.weight"].fill_(False)
    assert same(unpack_bits(packed), draw_mask(weights, **MAGNITUDE))


@given(full_masks, st.data())
def test_a_single_bit_changes_the_digest(mask, data):
    name = data.draw(st.sampled_from([name for name in mask if mask[name].numel()]))
    flipped = {key: tensor.clone() for key, tensor in mask.items()}
    position = data.draw(st.integers(0, mask[name].numel() - 1))
    flipped[name].view(-1)[position] ^= True
    assert fingerprint(flipped) != fingerprint(mask)


@given(masks.filter(bool), st.text(max_size=5), st.data())
def test_a_name_changes_the_digest(mask, name, data):
    assume(name not in mask)
    old = data.draw(st.sampled_from(sorted(mask)))
    renamed = {name if key == old else key: tensor for key, tensor in mask.items()}
    assert fingerprint(renamed) != fingerprint(mask)


@given(masks, st.text(max_size=5))
def test_one_more_matrix_changes_the_digest_even_an_empty_one(mask, name):
    assume(name not in mask)
    assert fingerprint({**mask, name: torch.zeros(0, 3, dtype=torch.bool)}) != fingerprint(mask)


def test_the_shape_changes_the_digest_where_the_bits_do_not():
    flat = torch.ones(12, dtype=torch.bool)
    shapes = [(12,), (3, 4), (4, 3), (2, 6), (1, 12)]
    assert len({fingerprint({"w": flat.view(shape)}) for shape in shapes}) == len(shapes)


@given(masks, st.data())
def test_the_order_of_names_does_not_change_the_digest(mask, data):
    shuffled = dict(data.draw(st.permutations(list(mask.items()))))
    assert fingerprint(shuffled) == fingerprint(mask)


def test_the_digest_stays_the_same_from_version_to_version():
    mask = {"b": torch.tensor([[True, False, True]]), "a": torch.tensor([False, True])}
    assert fingerprint(mask) == "e77fb305d0035cd2741b7be012b0f558"


def test_the_deterministic_mask_is_the_magnitude_mask(weights):
    mask = draw_mask(weights, **MAGNITUDE)
    assert list(mask) == list(weights)
    assert same(mask, {name: unstructured(weight.abs(), 0.25) for name, weight in weights.items()})


@pytest.mark.parametrize(
    "noise", [None, NOISE, Noise(exponent=5.0, sampling_ratio=1e-7)], ids=["magnitude mask", "voting", "race"]
)
def test_every_matrix_keeps_its_exact_share(weights, noise):
    mask = draw_mask(weights, 0.25, seed=5, noise=noise)
    assert {name: int(tensor.sum()) for name, tensor in mask.items()} == {
        name: weight.numel() // 4 for name, weight in weights.items()
    }
    assert num_kept_bits(pack_bits(mask)) == sum(weight.numel() for weight in weights.values()) // 4


def test_the_same_seed_gives_the_same_mask_and_another_seed_another(weights):
    assert same(draw_mask(weights, **RANDOM), draw_mask(weights, **RANDOM))
    assert not same(draw_mask(weights, **RANDOM), draw_mask(weights, 0.25, seed=6, noise=NOISE))


def test_of_each_matrix_only_what_is_taken_stays(weights):
    seen = {}

    def first_row(name, mask):
        seen[name] = mask
        return mask[:1]

    taken = draw_mask(weights, **RANDOM, transform=first_row)
    assert same(seen, draw_mask(weights, **RANDOM))
    assert same(taken, {name: mask[:1] for name, mask in seen.items()})


def test_no_seed_changes_the_mask_of_the_largest_scores(weights):
    assert same(draw_mask(weights, 0.25), draw_mask(weights, 0.25, seed=6))


def test_equal_matrices_of_other_names_have_independent_masks(weights):
    mask = draw_mask(weights, **RANDOM)
    assert torch.equal(weights["q.weight"], weights["k.weight"])
    assert not torch.equal(mask["q.weight"], mask["k.weight"])


@settings(max_examples=15)
@given(st.permutations(["q.weight", "k.weight", "up.weight"]), st.integers(1, 3))
def test_neither_the_order_nor_the_other_matrices_matter(weights, names, count):
    some = {name: weights[name] for name in names[:count]}
    mask = draw_mask(weights, **RANDOM)
    assert same(draw_mask(some, **RANDOM), {name: mask[name] for name in some})


def test_what_is_prepared_once_serves_every_candidate(weights):
    prepared, calls = {}, []

    def counting(*arguments):
        calls.append(arguments)
        return voting(*arguments)

    for seed in (1, 2, 3):
        arguments = RANDOM | {"seed": seed}
        mask = draw_mask(weights, **arguments, method=PruningMethod(sampler=counting), sampler_cache=prepared)
        assert same(mask, draw_mask(weights, **arguments))
    assert len(calls) == len(weights)


def squared(weight, calibration):
    return weight.float() ** 2


@pytest.mark.parametrize(
    "update",
    [
        {"density": 0.1},
        {"noise": Noise(exponent=2.0, sampling_ratio=1e-3)},
        {"noise": None},
        {"method": PruningMethod(sampler=random)},
        {"method": PruningMethod(scorer=squared)},
        {"method": PruningMethod(pattern=parse_pattern("n:4"))},
        {"method": PruningMethod(allocation=ALLOCATIONS["global"])},
    ],
    ids=["density", "exponent", "no noise", "sampler", "score", "pattern", "allocation"],
)
def test_what_another_mask_needs_is_prepared_anew(weights, update):
    prepared = {}
    draw_mask(weights, **RANDOM, sampler_cache=prepared)
    arguments = RANDOM | update
    assert same(draw_mask(weights, **arguments, sampler_cache=prepared), draw_mask(weights, **arguments))


@either
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_mask_of_the_same_values_in_full(weights, dtype, arguments):
    halves = {name: weight.to(dtype) for name, weight in weights.items()}
    full = {name: weight.float() for name, weight in halves.items()}
    assert same(draw_mask(halves, **arguments), draw_mask(full, **arguments))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@either
def test_a_weight_that_is_not_finite_is_refused_by_name(value, dtype, arguments):
    sick = torch.ones(4, 4, dtype=dtype)
    sick[2, 1] = value
    with pytest.raises(ValueError, match=r"^b holds values that are not finite: it cannot be pruned$"):
        draw_mask({"a": torch.ones(4, 4), "b": sick}, **arguments)


@either
def test_empty_and_one_dimensional_weights_have_masks_too(gaussian, arguments):
    mask = draw_mask({"empty": torch.zeros(0, 4), "vector": gaussian(40), "zeros": torch.zeros(3, 3)}, **arguments)
    assert mask["empty"].shape == (0, 4)
    assert mask["vector"].sum() == 10
    assert not mask["zeros"].any()


@settings(max_examples=10)
@given(st.integers(0, 2**63 - 1), st.sampled_from([1e-7, 1e-3, 0.1]))
def test_levels_nest_whatever_the_noise(weights, seed, ratio):
    pruned = {name: weight.clone() for name, weight in weights.items()}
    parent = draw_mask(pruned, 0.25, seed=seed, noise=NOISE)
    apply(pruned, parent)
    noise = Noise(exponent=1.0, sampling_ratio=ratio)
    child = draw_mask(pruned, 0.2, seed=seed, noise=noise)
    assert all(not (child[name] & ~parent[name]).any() for name in child)
    assert num_kept_bits(pack_bits(child)) == sum(int(weight.numel() * 0.2) for weight in weights.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_applying_zeroes_the_pruned_and_leaves_the_rest_to_the_bit(gaussian, dtype):
    tensors = {"w": torch.nn.Parameter(gaussian(8, 8).to(dtype)), "bias": gaussian(8)}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    mask = draw_mask({"w": tensors["w"]}, **MAGNITUDE)
    address = tensors["w"].data_ptr()
    apply(tensors, mask)
    assert torch.equal(tensors["w"][mask["w"]], before["w"][mask["w"]])
    assert tensors["w"][~mask["w"]].count_nonzero() == 0
    assert torch.equal(tensors["bias"], before["bias"])
    assert tensors["w"].data_ptr() == address
    assert tensors["w"].dtype == dtype


def test_applying_a_mask_to_tensors_without_its_matrix_is_refused():
    with pytest.raises(KeyError, match="missing"):
        apply({"w": torch.ones(1)}, {"missing": torch.ones(1, dtype=torch.bool)})


def astray(mask, magnitude):
    return distance(pack_bits(mask), pack_bits(magnitude))


@given(masks)
def test_a_mask_is_no_distance_from_itself(mask):
    assert astray(mask, mask) == 0.0


def test_the_distance_is_the_share_of_kept_entries_that_the_magnitude_mask_prunes():
    mask = {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True, True])}
    magnitude = {"a": torch.tensor([True, False, True, False]), "b": torch.tensor([True, True])}
    assert astray(mask, magnitude) == 1 / 4
    assert astray({"a": ~mask["b"]}, {"a": mask["b"]}) == 0.0  # nothing kept, nothing astray


@given(full_masks)
def test_the_distance_from_a_mask_that_keeps_nothing_is_one(mask):
    assume(num_kept_bits(pack_bits(mask)))
    assert astray(mask, {name: torch.zeros_like(tensor) for name, tensor in mask.items()}) == 1.0


def test_names_match_any_of_the_shell_style_patterns():
    names = ["layer.0.q.weight", "layer.1.q.weight", "layer.1.Q.weight", "pooler.weight"]
    assert match_names(names, ["layer.*.q.weight", "pool??.weight"]) == {names[0], names[1], names[3]}
    assert match_names(names, ["layer.[12].*"]) == {names[1], names[2]}
    assert match_names(names, []) == set()
    assert match_names(iter(names), iter(["*"])) == set(names)


# Where sparsity goes.

WHERE = [
    (pattern, allocation)
    for pattern in ("unstructured", "n:4", "n:16", "4x4", "16x1")
    for allocation in ALLOCATIONS
    if ":" not in pattern or allocation == "uniform"
]
every_where = pytest.mark.parametrize(("pattern", "allocation"), WHERE)
NOISES = [None, Noise(exponent=5.0, sampling_ratio=1e-7), Noise(exponent=1.0, sampling_ratio=1e-3)]


def method_of(pattern, allocation):
    return PruningMethod(pattern=parse_pattern(pattern), allocation=ALLOCATIONS[allocation])


def drawn(weights, pattern, allocation, noise=NOISE, density=0.25, seed=5):
    return draw_mask(weights, density, seed=seed, noise=noise, method=method_of(pattern, allocation))


def counts(mask, names):
    return sum(int(mask[name].sum()) for name in names)


@every_where
@pytest.mark.parametrize("noise", NOISES, ids=["magnitude mask", "race", "voting"])
def test_every_budget_is_spent_to_the_weight(weights, pattern, allocation, noise):
    mask = drawn(weights, pattern, allocation, noise)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    expected = max_kept(shapes, 0.25, method_of(pattern, allocation))
    assert list(mask) == list(weights)
    assert {names: counts(mask, names) for names in expected} == expected
    entries = sum(weight.numel() for weight in weights.values())
    block = 16 if "x" in pattern else 1
    assert entries / 4 - block * len(expected) < num_kept_bits(pack_bits(mask)) <= entries / 4


@every_where
@given(seed=st.integers(0, 2**63 - 1), noise=st.sampled_from(NOISES))
@settings(max_examples=10)
def test_levels_nest_wherever_sparsity_goes(gaussian, pattern, allocation, seed, noise):
    weights = {"a": gaussian(32, 16, seed=seed % 97), "b": gaussian(16, 64, seed=seed % 89)}
    parent = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    before = 2048
    for density in (0.5, 0.25, 0.0625) if pattern != "n:4" else (0.75, 0.5, 0.25):
        mask = drawn(weights, pattern, allocation, noise, density, seed)
        assert all(not (mask[name] & ~parent[name]).any() for name in mask)
        assert 1536 * density - 32 <= num_kept_bits(pack_bits(mask)) < before
        apply(weights, mask)
        parent, before = mask, num_kept_bits(pack_bits(mask))


@every_where
def test_a_seed_says_everything_wherever_sparsity_goes(weights, pattern, allocation):
    first, again, other = (drawn(weights, pattern, allocation, seed=seed) for seed in (5, 5, 6))
    assert same(first, again)
    assert not same(first, other)
    assert not same(first, drawn(weights, pattern, allocation, noise=None))


@pytest.mark.parametrize(("pattern", "allocation"), [pair for pair in WHERE if pair[1] != "global"])
def test_the_order_of_matrices_does_not_matter_where_each_has_its_budget(weights, pattern, allocation):
    backwards = dict(reversed(weights.items()))
    assert same(drawn(backwards, pattern, allocation), drawn(weights, pattern, allocation))


def test_in_one_contest_large_weights_take_the_places_of_small_ones(gaussian):
    weights = {"small": 0.01 * gaussian(32, 16), "large": gaussian(32, 16, seed=1)}
    mask = drawn(weights, "unstructured", "global", noise=None)
    assert counts(mask, ["small"]) == 0
    assert counts(mask, ["large"]) == 256


def test_ratios_mean_the_same_noise_for_one_matrix_as_for_many(gaussian):
    """One group over four matrices has as many votes as each had alone, so it strays about as far."""
    many = {name: gaussian(128, 128, seed=seed) for seed, name in enumerate("abcd")}
    noise = Noise(exponent=5.0, sampling_ratio=2e-3)
    strays = {
        allocation: astray(
            drawn(many, "unstructured", allocation, noise), drawn(many, "unstructured", allocation, None)
        )
        for allocation in ("uniform", "global")
    }
    assert strays["global"] == pytest.approx(strays["uniform"], rel=0.15)
    assert strays["uniform"] > 0.01


def test_calibration_reaches_its_matrix_by_name():
    weights = {"a": torch.ones(2, 4), "b": torch.ones(2, 4)}
    gradient = torch.ones(2, 4)
    seen = {
        "a": Calibration(torch.tensor([1.0, 2.0, 3.0, 4.0]), gradient),
        "b": Calibration(torch.tensor([4.0, 3.0, 2.0, 1.0]), gradient),
    }
    mask = draw_mask(weights, 0.5, method=PruningMethod(scorer=SCORERS["wanda"]), calibration=seen)
    assert mask["a"].int().tolist() == [[0, 0, 1, 1]] * 2
    assert mask["b"].int().tolist() == [[1, 1, 0, 0]] * 2


def test_a_calibration_that_is_not_finite_is_told_from_a_weight_that_is_not():
    seen = {"a": Calibration(torch.ones(4), torch.full((4, 4), float("nan")))}
    with pytest.raises(
        ValueError, match=r"^the calibration of a holds values that are not finite: it cannot be pruned$"
    ):
        draw_mask({"a": torch.ones(4, 4)}, 0.25, method=PruningMethod(scorer=SCORERS["saliency"]), calibration=seen)
