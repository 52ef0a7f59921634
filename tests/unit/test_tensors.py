"""Packed tensors of every type and shape."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymask.core.tensors import ALIGN, PackedTensors, copy_into, pack

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
shapes = st.lists(st.integers(0, 5), max_size=3)


@st.composite
def tensors(draw):
    """One tensor of any type and shape, 0-d and empty ones included."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    values = torch.randn(draw(shapes), generator=rng, dtype=torch.float64) * 50
    return values.abs().round().to(draw(st.sampled_from(DTYPES))) if draw(st.booleans()) else values.float()


collections = st.dictionaries(st.text(max_size=5), tensors(), max_size=6)


def same(found, expected):
    return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)


@given(collections)
def test_packed_tensors_come_back_as_they_went(live):
    views = pack(live).views()
    assert list(views) == list(live)
    assert all(same(views[name], live[name]) for name in live)


@given(collections)
def test_loading_restores_the_live_tensors_in_place(live):
    packed = pack(live)
    target = {name: torch.zeros_like(tensor) for name, tensor in live.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in target.items()}
    copy_into(packed, target)
    assert all(same(target[name], live[name]) for name in live)
    assert addresses == {name: tensor.data_ptr() for name, tensor in target.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 3)], ids=str)
def test_every_type_survives_beside_a_neighbour_of_odd_size(dtype, shape):
    odd = torch.ones(3, dtype=torch.bool)
    live = {"odd": odd, "own": torch.ones(shape, dtype=dtype), "end": torch.ones(1)}
    views = pack(live).views()
    assert all(same(views[name], live[name]) for name in live)


@given(collections)
def test_every_tensor_begins_on_an_aligned_byte_and_none_overlap(live):
    packed = pack(live)
    end = 0
    for offset, size, _, _ in packed.index.values():
        assert offset % ALIGN == 0
        assert offset >= end
        end = offset + size
    assert packed.buffer.dtype == np.uint8
    assert packed.buffer.size == end


@given(collections)
def test_packing_twice_gives_the_same_bytes(live):
    assert pack(live).buffer.tobytes() == pack(live).buffer.tobytes()


def test_packing_copies():
    live = {"w": torch.zeros(4)}
    packed = pack(live)
    live["w"].fill_(1)
    assert packed.views()["w"].tolist() == [0, 0, 0, 0]


def test_views_share_the_buffer():
    packed = pack({"w": torch.zeros(4)})
    packed.buffer[:4] = np.frombuffer(np.float32(2).tobytes(), np.uint8)
    assert packed.views()["w"].tolist() == [2, 0, 0, 0]


def test_nan_payloads_and_negative_zero_keep_their_bits():
    bits = torch.tensor([0x7FC00001, -0x80000000, 0x7F800000], dtype=torch.int64).to(torch.int32)
    views = pack({"w": bits.view(torch.float32)}).views()
    assert torch.equal(views["w"].view(torch.int32), bits)


def test_a_transposed_tensor_and_a_parameter_are_packed_by_value():
    live = {"t": torch.arange(6.0).view(2, 3).T, "p": torch.nn.Parameter(torch.ones(2))}
    views = pack(live).views()
    assert views["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert views["p"].tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # pytest resets the module's filter
def test_a_read_only_buffer_can_be_loaded_from():
    packed = pack({"w": torch.arange(5.0), "n": torch.tensor(7)})
    packed.buffer.setflags(write=False)
    target = {"w": torch.zeros(5), "n": torch.tensor(0)}
    copy_into(packed, target)
    assert target["w"].tolist() == [0, 1, 2, 3, 4]
    assert target["n"].item() == 7


def test_a_parameter_that_wants_gradients_can_be_loaded_into():
    parameter = torch.nn.Parameter(torch.zeros(3))
    copy_into(pack({"w": torch.ones(3)}), {"w": parameter})
    assert parameter.tolist() == [1, 1, 1]
    assert parameter.grad_fn is None


def test_only_the_names_of_the_target_are_loaded():
    target = {"a": torch.zeros(1)}
    copy_into(pack({"a": torch.ones(1), "b": torch.ones(1)}), target)
    assert target["a"].item() == 1
    assert list(target) == ["a"]


def test_a_name_that_was_never_packed_is_refused():
    with pytest.raises(KeyError, match="missing"):
        copy_into(pack({"a": torch.ones(1)}), {"missing": torch.zeros(1)})


def test_nothing_packs_into_nothing():
    packed = pack({})
    assert packed.buffer.size == 0
    assert PackedTensors(packed.buffer, packed.index).views() == {}
