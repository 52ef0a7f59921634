"""Search spaces of a tuning, and messages about mistakes in them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.builders import refused

from raymask.config import load_spec
from raymask.tune.space import Domain, load_space

ROOT = Path(__file__).resolve().parents[2]
DATA = {"model": "m", "task": "glue/mrpc", "levels": [0.5, 0.9]}


def space(folder: Path, text: str) -> Path:
    path = folder / "space.yaml"
    path.write_text(text)
    return path


def test_every_way_to_vary_is_read(tmp_path: Path) -> None:
    text = """
candidates.exponent: {uniform: [2, 10]}
finetune.learning_rate: {loguniform: [1e-5, 1e-3]}
candidates.count: {randint: [4, 16]}
candidates.sampling_ratios: {choice: [[0.005], [0.005, 0.02]]}
early_eval.score: {grid: [loss, metric]}
model.exclude: {choice: [[], ["*.attention.*"]]}
"""
    assert load_space(space(tmp_path, text), DATA) == {
        "candidates.exponent": Domain(uniform=(2.0, 10.0)),
        "finetune.learning_rate": Domain(loguniform=(1e-5, 1e-3)),
        "candidates.count": Domain(randint=(4, 16)),
        "candidates.sampling_ratios": Domain(choice=[[0.005], [0.005, 0.02]]),
        "early_eval.score": Domain(grid=["loss", "metric"]),
        "model.exclude": Domain(choice=[[], ["*.attention.*"]]),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "candidates.exponnet: {uniform: [2, 10]}",
            "candidates.exponnet: there is no such key; did you mean exponent?",
        ),
        ("canditates: {choice: [1]}", "canditates: there is no such key; did you mean candidates?"),
        ("candidates.exponent: {unifrm: [2, 10]}", "candidates.exponent: unifrm: there is no such key; did you mean"),
        ("candidates.exponent: {}", "candidates.exponent: give one of uniform, loguniform, randint, choice, grid"),
        ("candidates.exponent: {uniform: [2, 3], choice: [2]}", "candidates.exponent: give one of uniform"),
        ("candidates.exponent: [2, 10]", "candidates.exponent: say how it varies, for instance {choice: [1, 2]}"),
        ("candidates.exponent: {uniform: [10, 2]}", "uniform: the first number must be below the second, not [10.0"),
        ("candidates.exponent: {uniform: [2]}", "candidates.exponent: uniform.1: is missing"),
        ("candidates.exponent: {loguniform: [0, 2]}", "loguniform: both numbers must be above 0"),
        ("candidates.count: {uniform: [2, 8]}", "candidates.count=2.0: candidates.count: input should be a valid int"),
        ("candidates.count: {randint: [2.5, 8]}", "candidates.count: randint.0: input should be a valid integer"),
        ("candidates.count: {randint: [-1, 8]}", "candidates.count: input should be greater than or equal to 0"),
        (
            "candidates.sampling_ratios: {choice: []}",
            "candidates.sampling_ratios: choice: list should have at least 1 item",
        ),
        (
            "candidates.sampling_ratios: {choice: [[0.1], 0.2]}",
            "candidates.sampling_ratios=0.2: candidates.sampling_ratios: input should be a",
        ),
        ("task.name.inner: {choice: [1]}", "task.name.inner: name is 'glue/mrpc', which has no keys"),
        ("seed: {grid: [1, x]}", "seed=x: seed: input should be a valid integer (it is 'x')"),
        ("levels.sparsity: {choice: [0.9]}\nlevels.sparsities: {choice: [[0.5]]}", "the first values, taken together"),
        ("- candidates", "a space is a mapping of spec keys to how they vary"),
        ("{}", "nothing varies: give at least one spec key"),
        ("seed: {grid: [1, 2]}\nseed: {grid: [1, 2]}", "the key 'seed' is given twice"),
    ],
)
def test_a_mistake_is_said_with_its_key(tmp_path: Path, text: str, said: str) -> None:
    path = space(tmp_path, text)
    message = refused(load_space, path, DATA)
    assert message.startswith(f"{path}: ")
    assert said in message


def test_all_mistakes_are_said_at_once(tmp_path: Path) -> None:
    message = refused(load_space, space(tmp_path, "seeed: {grid: [1]}\nseed: {choice: []}\nprobe.rows: 3"), DATA)
    assert len(message.splitlines()) == 4


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "spaces").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_space_of_jobs_fits_a_spec_and_says_what_it_is_for(path: Path) -> None:
    spec = load_spec(ROOT / "jobs" / "quickstart.yaml")
    assert load_space(path, spec.model_dump(mode="json", exclude_unset=True))
    assert path.read_text().startswith("# ")
