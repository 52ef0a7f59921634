"""Experiment on noise: fair comparisons of pairs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

SCRIPT = Path(__file__).resolve().parents[2] / "jobs" / "experiments" / "tune_noise.py"


@pytest.fixture(scope="module")
def noise() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        return import_module("tune_noise")


def trial(exponent: float, seed: int, loss: float, level: int = 2, error: object = None) -> SimpleNamespace:
    config = {"candidates.exponent": exponent, "candidates.sampling_ratios": [0.02], "seed": seed}
    return SimpleNamespace(config=config, error=error, metrics={"level": level, "levels": 2, "loss": loss})


def test_only_what_came_to_its_end_counts(noise: ModuleType) -> None:
    trials = [trial(2.0, 0, 0.5), trial(2.0, 1, 0.1, level=1), trial(5.0, 0, 0.1, error=ValueError())]
    assert noise.losses(trials) == {(2.0, 0.02): {0: 0.5}}


def test_pairs_are_compared_seed_by_seed(noise: ModuleType) -> None:
    """Seeds differ much more than the pairs do, which every seed ranks alike."""
    trials = [trial(exponent, seed, seed + exponent / 100) for exponent in (5.0, 2.0) for seed in range(3)]
    console = Console(record=True, width=100)
    noise.show(console, noise.losses(trials))
    best, second = [line for line in console.export_text().splitlines() if "0.02" in line]
    assert "1.0200" in best
    assert "+0.0300 ± 0.0000" in second
    assert "more than noise" in second


def test_a_single_seed_decides_nothing(noise: ModuleType) -> None:
    assert noise.behind([0.1]) == ("+0.1000", "one seed only")
    assert noise.behind([0.3, -0.1])[1] == "within noise"
