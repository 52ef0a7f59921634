"""A search as a trial of Ray Tune: what it takes of a cluster, and what is said before any trial."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune as ray_tune
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from support.builders import refused

from raymask.executor import resources
from raymask.tune import command, trial

SPEC: dict[str, Any] = {
    "model": "quickstart",
    "task": "quickstart",
    "levels": [0.5, 0.9],
    "candidates": {"count": 2, "sampling_ratios": [0.02]},
}

pytestmark = pytest.mark.usefixtures("one_cpu")


def fit(folder: Path, space: dict[str, Any]) -> None:
    with command.quiet_tune():
        ray_tune.Tuner(
            trial.trainable(SPEC),
            param_space=space,
            tune_config=ray_tune.TuneConfig(metric="score", mode="max"),
            run_config=ray_tune.RunConfig(name="tuning", storage_path=str(folder), verbose=0),
        ).fit()


def test_a_trial_takes_its_workers_and_nothing_else() -> None:
    spec = trial.trial_spec(SPEC, {"workers": {"count": 2, "cpus": 0.5}})
    asked = trial.placement_bundles(spec)
    memory = trial.worker_context(spec).peak_host_memory(on_gpu=False)
    assert asked.head_bundle_is_empty
    assert asked.bundles == [{"CPU": 0.5, "memory": memory}] * 2
    assert "no node can hold a worker" in refused(
        trial.placement_bundles, trial.trial_spec(SPEC, {"workers.gpus": 1.0})
    )
    assert "a trial asks for 2 workers at once" in refused(
        trial.placement_bundles, trial.trial_spec(SPEC, {"workers.count": 2})
    )


def test_a_pool_inside_a_placement_group_sees_its_bundles_only() -> None:
    class Driver:
        def look(self) -> list[list[Any]]:
            with ThreadPoolExecutor(1) as elsewhere:  # Tune runs a trial in a thread
                return [resources.node_resources(), elsewhere.submit(resources.node_resources).result()]

    group = ray.util.placement_group([{"CPU": 0.5}])
    inside = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    driver = ray.remote(num_cpus=0)(Driver).options(scheduling_strategy=inside).remote()
    found = ray.get(driver.look.remote())
    ray.kill(driver)
    ray.util.remove_placement_group(group)
    assert found == [[{"CPU": 0.5}]] * 2
    [node] = resources.node_resources()
    assert node["CPU"] == 1


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"candidates.exponnet": 3.0}, "candidates.exponnet: there is no such key; did you mean exponent?"),
        ({"candidates.count": ray_tune.uniform(2, 8)}, "candidates.count: input should be a valid integer"),
        ({"workers.count": 1000}, "a trial asks for 1000 workers at once"),
    ],
)
def test_a_mistake_in_the_space_is_said_before_any_trial(tmp_path: Path, space: dict[str, Any], said: str) -> None:
    assert said in refused(fit, tmp_path, space)
    assert not list(tmp_path.rglob("run"))
