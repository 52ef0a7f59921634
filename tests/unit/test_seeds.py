"""Seeds: stable over time, and different for different names."""

from hypothesis import given
from hypothesis import strategies as st

from raymask.core.seeds import derive

seeds = st.integers(0, 2**63 - 1)
names = st.lists(st.one_of(st.integers(0, 99), st.text("ab.", min_size=1, max_size=4)), max_size=3).map(tuple)


@given(seeds, names)
def test_a_seed_is_what_torch_and_numpy_accept(seed, path):
    assert 0 <= derive(seed, *path) < 2**63


@given(seeds, names, seeds, names)
def test_seeds_differ_exactly_when_seed_or_names_differ(seed, path, other_seed, other_path):
    same = (seed, *path) == (other_seed, *other_path)
    assert (derive(seed, *path) == derive(other_seed, *other_path)) is same


def test_where_one_name_ends_and_the_next_begins_matters():
    assert derive(0, "a", 12) != derive(0, "a1", 2)
    assert derive(1, 2, "mask") != derive(12, "mask")
    assert derive(0, "a", "") != derive(0, "a")


def test_the_order_of_names_matters():
    assert derive(0, "a", "b") != derive(0, "b", "a")


def test_seeds_stay_the_same_from_version_to_version():
    assert derive(0) == 4761921975702974394
    assert derive(7, "mask", "encoder.weight") == 7479828929236046282
