"""Metrics for Prometheus, with gauges and counters that write down what they are set to."""

from __future__ import annotations

from typing import Any

import pytest
from support.builders import tiny_context

from raymask.core.recipe import propose_candidates, resolve
from raymask.core.records import Evaluation
from raymask.executor import prometheus


class Metric:
    """A gauge or counter: values by its name and tags."""

    def __init__(self, values: dict[tuple[str, ...], float], name: str) -> None:
        self.values, self.name = values, name

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values[(self.name, *(tags or {}).values())] = value

    def inc(self, value: float) -> None:
        assert value > 0, "Ray refuses to add nothing"
        self.values[(self.name,)] = self.values.get((self.name,), 0.0) + value


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    found: dict[tuple[str, ...], float] = {}

    def metric(name: str, description: str, **options: Any) -> Metric:
        return Metric(found, name)

    monkeypatch.setattr(prometheus, "Gauge", metric)
    monkeypatch.setattr(prometheus, "Counter", metric)
    return found


def test_metrics_follow_the_events_of_a_search(values: dict[tuple[str, ...], float]) -> None:
    context = tiny_context()
    callback = prometheus.PrometheusCallback(context)
    assert values == {}, "a metric that is made before Ray runs is lost"
    magnitude, first, second, _ = propose_candidates(resolve(context.spec), 1)
    callback.on_phase_begin("level 1/2: early evaluation", 1, 4, [])
    callback.on_progress({first.name: 0.5})
    callback.on_evaluation(Evaluation(candidate=magnitude, score=-0.3, seconds=2.0))
    callback.on_evaluation(Evaluation(candidate=second, error="it broke"))
    callback.on_object_put(0)
    callback.on_object_put(7)
    assert values["raymask_level",] == 1
    assert values["raymask_candidates", "done"] == values["raymask_candidates", "failed"] == 1
    assert values["raymask_candidates", "running"] == 1
    assert values["raymask_best_score",] == -0.3
    assert values["raymask_early_eval_seconds",] == 2.0
    examples = context.spec.early_eval.epochs * len(context.data.train)
    assert values["raymask_examples_per_second",] == pytest.approx(examples / 2.0)
    assert values["raymask_put_bytes",] == 7
