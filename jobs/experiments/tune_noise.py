"""Noise for a task: a grid of exponents and sampling ratios.

    python jobs/experiments/tune_noise.py
    python jobs/experiments/tune_noise.py jobs/minilm-mrpc.yaml --set imp.run=false --ratios 5e-5 3e-4 --seeds 3

Every pair is a search for each of some seeds, by Ray Tune, and is judged by the loss on `validation` at the last level,
in which a difference shows sooner than in the metric. A seed makes another dense model, so pairs are compared seed by
seed, with a standard error: a single search says little. The same command again goes on where a killed one was.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console
from rich.table import Table

from raymask.config import load_data
from raymask.executor.connection import ray_connection
from raymask.tune import command, trial

JOBS = Path(__file__).resolve().parents[1]
Pair = tuple[float, float]
Losses = dict[Pair, dict[int, float]]
"""By exponent and ratio, then by seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", nargs="?", default=JOBS / "tune-quickstart.yaml", type=Path, help="a YAML spec")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the spec")
    parser.add_argument("--exponents", nargs="+", type=float, default=[2.0, 10.0])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.002, 0.02])
    parser.add_argument("--seeds", type=int, default=2, help="searches a pair")
    parser.add_argument("--run", default="runs/tune-noise", type=Path, help="folder of the trials")
    parser.add_argument("--address", help="a Ray cluster: auto, HOST or HOST:PORT; else a private Ray")
    asked = parser.parse_args()
    data = load_data(asked.spec, asked.set)
    with ray_connection(trial.worker_context(trial.trial_spec(data, {})), asked.address), command.quiet_tune():
        results = tuner(data, asked).fit()
    show(Console(), losses(results))


def tuner(data: dict[str, Any], asked: argparse.Namespace) -> tune.Tuner:
    """A new tuning, or the one that is there: Ray Tune's own state is pickled, so it must be yours."""
    trainable, folder = trial.trainable(data), asked.run.resolve()
    space = {
        "candidates.exponent": tune.grid_search(asked.exponents),
        "candidates.sampling_ratios": tune.grid_search([[ratio] for ratio in asked.ratios]),
        "seed": tune.grid_search(list(range(asked.seeds))),
    }
    if tune.Tuner.can_restore(str(folder)):
        return tune.Tuner.restore(str(folder), trainable, param_space=space, resume_errored=True)
    run_config = tune.RunConfig(
        name=folder.name, storage_path=str(folder.parent), verbose=0, callbacks=[command.ConsoleCallback()]
    )
    return tune.Tuner(trainable, param_space=space, run_config=run_config)


def losses(results: Iterable[Any]) -> Losses:
    """Losses at the last level; a trial that failed has none."""
    found: Losses = {}
    for result in results:
        if not result.error and result.metrics["level"] == result.metrics["levels"]:
            pair = result.config["candidates.exponent"], result.config["candidates.sampling_ratios"][0]
            found.setdefault(pair, {})[result.config["seed"]] = result.metrics["loss"]
    return found


def show(console: Console, found: Losses) -> None:
    """All pairs, best first, and how far they are behind the best."""
    ranked = sorted(found.items(), key=lambda item: statistics.mean(item[1].values()))
    table = Table(title="loss on validation at the last level", title_justify="left")
    for head in ("exponent", "ratio", "searches", "loss", "behind the best", "which is"):
        table.add_column(head, justify="right")
    for (exponent, ratio), values in ranked:
        gaps = [value - ranked[0][1][seed] for seed, value in values.items() if seed in ranked[0][1]]
        cells = (f"{exponent:g}", f"{ratio:g}", str(len(values)), f"{statistics.mean(values.values()):.4f}")
        table.add_row(*cells, *(behind(gaps) if values is not ranked[0][1] else ("", "")))
    console.print(table)


def behind(gaps: Sequence[float]) -> tuple[str, str]:
    """A mean with its standard error, and whether it is more than noise, which one seed cannot tell."""
    if len(gaps) < 2:
        return f"{statistics.mean(gaps):+.4f}" if gaps else "", "one seed only"
    mean, error = statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    return f"{mean:+.4f} ± {error:.4f}", "more than noise" if mean > 2 * error else "within noise"


if __name__ == "__main__":
    main()
