"""Do the words say what the figures say?"""

from __future__ import annotations

import pytest

from raymask.core.records import Interval, Result
from raymask.report.words import duration, verdict


def result(gain: Interval | None, metrics: tuple[str, ...] = ("accuracy",)) -> Result:
    return Result(
        run="r",
        model="m",
        task="t",
        metrics=metrics,
        rows=(),
        gain=gain,
        levels=(),
        imp=(),
        seconds={},
        scored=(300, 400),
        timeline=(),
        export="e",
    )


@pytest.mark.parametrize(
    ("mean", "low", "high", "finding"),
    [
        (0.02, 0.01, 0.03, "more than noise: the selected mask is better"),
        (-0.02, -0.03, -0.01, "more than noise: the control is better"),
        (0.02, -0.01, 0.05, "within noise"),
    ],
)
def test_the_verdict_says_who_is_better_and_whether_that_is_noise(
    mean: float, low: float, high: float, finding: str
) -> None:
    said = verdict(result(Interval(mean=mean, low=low, high=high)))
    assert said.startswith(f"Selected against control on `report`, accuracy: {mean:+.4f} (95 % interval {low:+.4f} to")
    assert said.endswith(f"{high:+.4f}), {finding}.")


def test_the_verdict_names_the_mean_of_several_metrics_and_a_missing_baseline() -> None:
    assert "the metrics' mean" in verdict(result(Interval(mean=0, low=0, high=0), ("accuracy", "f1")))
    assert verdict(result(None)).startswith("There was no baseline to compare with")


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.25, "0.2 s"), (59.4, "59.4 s"), (61, "1 min 1 s"), (7265, "2 h 1 min")]
)
def test_durations_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said
