"""Output of `raymask check`: what is pruned in the blocks, and what is left out."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from raymask.commands.check import show_left_out, weight_table
from raymask.train.model import ModelInfo
from raymask.train.prunable import Sizes


def info(prunable: int, encoder: int) -> ModelInfo:
    """A model of two layers with experts, a router and a norm."""
    layers = ("model.layers.0", "model.layers.1")
    shapes = {f"{layer}.proj.weight": (4, 8) for layer in layers} | {
        f"{layer}.experts.up": (3, 4, 8) for layer in layers
    }
    left_out = {f"{layer}.gate.weight": (3, 8) for layer in layers} | {f"{layer}.norm.weight": (8,) for layer in layers}
    return ModelInfo(None, shapes, Sizes(prunable, encoder, 1000), left_out=left_out)


def test_weights_are_listed_by_pattern_shape_count_and_share() -> None:
    columns = [list(column.cells) for column in weight_table(info(256, 512)).columns]
    assert list(zip(*columns, strict=True)) == [
        ("model.layers.*.proj.weight", "pruned", "4 x 8", "2", "12.50%"),
        ("model.layers.*.experts.up", "pruned", "3 x 4 x 8", "2", "37.50%"),
        ("model.layers.*.gate.weight", "left out", "3 x 8", "2", "9.38%"),
        ("vectors", "left out", "", "2", "3.12%"),
    ]


@pytest.mark.parametrize(("prunable", "warned"), [(256, False), (255, True)])
def test_less_than_half_of_the_blocks_is_worth_a_warning(prunable: int, warned: bool) -> None:
    console = Console(file=io.StringIO(), width=160)
    show_left_out(console, info(prunable, 512))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.startswith("warning  only 49.80% of the weights in the blocks can become zeros") == warned
    assert bool(said) == warned
