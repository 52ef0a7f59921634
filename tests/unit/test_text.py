"""Texts about figures: verdicts, levels, durations."""

from __future__ import annotations

import pytest

from raymask.core.masking.noise import Noise
from raymask.core.records import (
    BASELINE,
    RAYMASK,
    Candidate,
    ConfidenceInterval,
    EvalPoint,
    Evaluation,
    ModelMetrics,
    Result,
)
from raymask.report.text import duration, evaluated_line, verdict


def result(
    gain: ConfidenceInterval | None, metrics: tuple[str, ...] = ("accuracy",), always: tuple[str | None, ...] = ()
) -> Result:
    return Result(
        run="r",
        model="m",
        task="t",
        metrics=metrics,
        models=tuple(
            ModelMetrics(name=name, test_metrics={}, intervals={}, sparsity={}, constant_prediction=answer)
            for name, answer in zip(("dense", BASELINE, RAYMASK), always, strict=False)
        ),
        sizes={},
        gain=gain,
        levels=(),
        baseline_levels=(),
        seconds={},
        rows_scored=(300, 400),
        timeline=(),
        export="e",
    )


@pytest.mark.parametrize(
    ("mean", "low", "high", "finding"),
    [
        (0.02, 0.01, 0.03, "more than noise: raymask is better"),
        (-0.02, -0.03, -0.01, "more than noise: IMP is better"),
        (0.02, -0.01, 0.05, "within noise"),
    ],
)
def test_the_verdict_says_who_is_better_and_whether_that_is_noise(
    mean: float, low: float, high: float, finding: str
) -> None:
    said = verdict(result(ConfidenceInterval(mean=mean, low=low, high=high)))
    assert said.startswith(f"raymask against IMP on `test`, accuracy: {mean:+.4f} (95 % interval {low:+.4f} to")
    assert said.endswith(f"{high:+.4f}), {finding}.")


def test_the_verdict_names_the_mean_of_several_metrics_and_a_missing_baseline() -> None:
    assert "the metrics' mean" in verdict(result(ConfidenceInterval(mean=0, low=0, high=0), ("accuracy", "f1")))
    assert verdict(result(None)).startswith("There is no baseline to compare with")


def test_a_perplexity_is_compared_by_what_is_more_when_it_is_better() -> None:
    said = verdict(result(ConfidenceInterval(mean=0.02, low=0.01, high=0.03), ("perplexity",)))
    assert said.startswith("raymask against IMP on `test`, -log(perplexity): +0.0200 (95 % inter")
    assert said.endswith("more than noise: raymask is better.")


def test_models_that_tell_no_rows_apart_are_no_draw() -> None:
    draw = ConfidenceInterval(mean=0, low=0, high=0)
    assert verdict(result(draw, always=(None, None, None))).endswith("within noise.")
    said = verdict(result(draw, always=(None, "yes", "no")))
    assert said.endswith(
        "within noise. IMP predicts 'yes' for every row of `test`: its metrics are those of a constant prediction. "
        "raymask predicts 'no' for every row of `test`: its metrics are those of a constant prediction. Train longer "
        "(finetune.epochs, early_eval.epochs, more levels)."
    )
    said = verdict(result(draw, always=("yes", None, None)))
    assert said.endswith(
        "dense predicts 'yes' for every row of `test`: its metrics are those of a constant prediction. Train "
        "longer (dense.epochs)."
    )


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.25, "0.2 s"), (59.4, "59.4 s"), (61, "1 min 1 s"), (7265, "2 h 1 min")]
)
def test_durations_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_an_evaluation_says_how_far_it_went_and_in_which_order_of_rows() -> None:
    candidate = Candidate(
        level=1, index=3, seed=0, density=0.5, noise=Noise(exponent=5, sampling_ratio=1e-4), parent_branch=2
    )
    curve = (EvalPoint(step=5, loss=0.25, metric=0.75),)
    found = Evaluation(candidate=candidate, rung=1, repeat=2, score=-0.25, curve=curve, distance=0.125, seconds=2.0)
    assert evaluated_line(found, (0.25, 0.5, 1.0)) == (
        "candidate 3 of branch 2 after 50%, repeat 2: score -0.2500, last loss 0.2500, last metric 0.7500, distance "
        "12.50%, 2.0 s"
    )
    assert evaluated_line(found.model_copy(update={"repeat": 0})).startswith("candidate 3 of branch 2: score")
