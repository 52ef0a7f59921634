"""Delta coding of masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from raymask.export.delta import decode, decode_bits, decode_gaps, encode_bits, encode_gaps, encode_mask

SIZE = 1500
FLAT = st.sets(st.integers(0, SIZE - 1), max_size=40).map(sorted)
DENSE = st.lists(st.booleans(), max_size=200).map(lambda bits: [i for i, bit in enumerate(bits) if bit])


def mask_of(places: list[int], size: int = SIZE) -> Tensor:
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, torch.tensor(places, dtype=torch.long), True)


def slow_code(places: list[int]) -> list[int]:
    """By the definition, entry by entry."""
    codes, last = [], -1
    for place in places:
        gap = place - last - 1
        while gap >= 255:
            codes.append(255)
            gap -= 255
        codes.append(gap)
        last = place
    return codes


@given(places=FLAT | DENSE)
def test_codes_are_the_definition_s_and_give_back_the_places(places: list[int]) -> None:
    kept = mask_of(places)
    assert encode_gaps(kept).tolist() == slow_code(places)
    assert decode_gaps(encode_gaps(kept)).tolist() == places
    assert decode_bits(encode_bits(kept)).tolist() == places
    name, codes = encode_mask(kept)
    assert decode(name, codes).tolist() == places
    assert codes.dtype == torch.uint8
    assert len(codes) == min(len(slow_code(places)), -(-SIZE // 8))


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 765])
def test_gaps_around_what_a_byte_holds(gap: int) -> None:
    for places in ([gap], [0, gap + 1], [gap, 2 * gap + 1]):
        kept = mask_of(places, 2 * gap + 2)
        assert encode_gaps(kept).tolist() == slow_code(places)
        assert decode_gaps(encode_gaps(kept)).tolist() == places


@pytest.mark.parametrize(
    ("kept", "code"),
    [
        (torch.zeros(0, 4, dtype=torch.bool), "gaps"),
        (torch.zeros(300, 7, dtype=torch.bool), "gaps"),
        (torch.ones(3, 5, dtype=torch.bool), "bits"),
        (torch.ones(1, 1, dtype=torch.bool), "gaps"),
        (torch.arange(900)[None] == 899, "gaps"),
        ((torch.arange(900) == 0)[:, None], "gaps"),
    ],
    ids=["no entries", "none kept", "all kept", "one entry", "the last of a row", "the first of a column"],
)
def test_edges(kept: Tensor, code: str) -> None:
    name, codes = encode_mask(kept)
    assert name == code
    assert torch.equal(decode(name, codes), kept.reshape(-1).nonzero()[:, 0])


def test_bits_are_shorter_above_an_eighth() -> None:
    order = torch.randperm(256 * 256, generator=torch.Generator().manual_seed(0)).view(256, 256)
    for share, code in ((0.12, "gaps"), (0.13, "bits")):
        assert encode_mask(order < share * order.numel())[0] == code
