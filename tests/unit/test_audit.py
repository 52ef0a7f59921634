"""Audits: whether a score picks well."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from support.builders import refused
from support.fakes import Fakes, setup_of

from raymask.commands.audit import BUDGETS, audit_spec, by_level, early_score, rank_correlations, show_audit
from raymask.config import make_spec
from raymask.core.records import Candidate, EvalPoint, Evaluation, LevelRecord, Result
from raymask.core.spec import Spec
from raymask.driver.result import build_result
from raymask.runs.run_dir import RunDir

BASE = {"model": "quickstart", "task": "quickstart", "levels": [0.5, 0.9], "candidates": {"count": 3}, "distill": False}


pytestmark = pytest.mark.usefixtures("few_resamples")


@pytest.fixture
def searched(tmp_path: Path) -> Result:
    """An audit's search whose every mask was fine-tuned."""
    search_setup = setup_of(**{**audit_spec(make_spec(BASE)).model_dump(), "distill": False})
    store = RunDir(tmp_path)
    Fakes(search_setup, scores=(0.1, 0.2, 0.4, 0.3)).run(store)
    return build_result(search_setup, store, 1.0)


def retold(result: Result, tell: Callable[[LevelRecord], LevelRecord]) -> Result:
    """The same with other levels."""
    levels, others = (tuple(map(tell, found)) for found in (result.levels, result.other_levels))
    return result.model_copy(update={"levels": levels, "other_levels": others})


def test_an_audit_fine_tunes_every_mask_and_runs_no_baseline(searched: Result) -> None:
    found = by_level(searched)
    assert {level: [record.winner.candidate.index for record in records] for level, records in found.items()} == {
        1: [0, 1, 2, 3],
        2: [0, 1, 2, 3],
    }
    assert searched.baseline_levels == ()


def test_an_audit_records_every_evaluation_and_needs_the_dense_model_s_opinion() -> None:
    spec = audit_spec(make_spec({**BASE, "early_eval": {"rungs": [0.5, 1.0], "score_window": 3}}))
    assert (spec.early_eval.rungs, spec.select.keep, spec.imp.run, spec.uses_teacher) == ((1.0,), 4, False, True)
    assert spec.early_eval.score_window > 10**5


def test_one_random_mask_is_too_few() -> None:
    said = refused(audit_spec, make_spec({**BASE, "candidates": {"count": 1}}))
    assert said == "candidates.count: an audit needs 2 or more random masks per level, not 1"


def test_a_score_that_foretells_the_end_correlates_and_picks_without_regret(searched: Result) -> None:
    """The early loss is right, the metric is the wrong way round, and the agreement is the same everywhere."""

    def tell(record: LevelRecord) -> LevelRecord:
        worth = record.winner.candidate.index / 10
        early = tuple(EvalPoint(step=s, loss=1 - worth, metric=-worth, agreement=-1.0) for s in (1, 2, 3, 4))
        final = record.finetune_result.model_copy(update={"curve": (EvalPoint(step=9, loss=0.5 - worth, metric=0.5),)})
        winner = record.winner.model_copy(update={"curve": early})
        test_metrics = dict.fromkeys(record.test_metrics, worth)
        return record.model_copy(update={"winner": winner, "finetune_result": final, "test_metrics": test_metrics})

    found = rank_correlations(retold(searched, tell), 2, 0)
    assert [(c.level, c.score, c.budget) for c in found] == [
        (level, score, budget) for level in (1, 2) for score in ("loss", "metric", "agreement") for budget in BUDGETS
    ]
    for correlation in found:
        expected = {"loss": 1.0, "metric": -1.0, "agreement": 0.0}[correlation.score]
        assert correlation.by_loss.mean == pytest.approx(expected)
        assert correlation.by_test.mean == pytest.approx(expected)
        assert correlation.by_loss.low <= correlation.by_loss.mean <= correlation.by_loss.high
        assert correlation.regret == pytest.approx(0.0 if correlation.score == "loss" else 0.3)


def test_a_language_model_is_audited_without_agreement_and_its_regret_is_the_logarithm_s(searched: Result) -> None:
    task = {"kind": "causal-lm", "train": "a.txt", "test": "b.txt"}
    assert audit_spec(make_spec({**BASE, "model": "m", "task": task})).early_eval.score == "loss"

    def tell(record: LevelRecord) -> LevelRecord:
        worth = record.winner.candidate.index / 10
        early = (EvalPoint(step=1, loss=5 + worth, metric=-5 - worth),)  # the wrong way round
        winner = record.winner.model_copy(update={"curve": early})
        return record.model_copy(update={"winner": winner, "test_metrics": {"perplexity": math.exp(5 - worth)}})

    told = retold(searched, tell).model_copy(update={"metrics": ("perplexity",)})
    found = rank_correlations(told, 2, 0)
    assert [c.score for c in found] == ["loss"] * 3 + ["metric"] * 3 + ["loss"] * 3 + ["metric"] * 3
    for correlation in found:
        assert correlation.by_test.mean == pytest.approx(-1.0)
        assert correlation.regret == pytest.approx(0.3)
    console = Console(file=io.StringIO(), width=160)
    show_audit(console, told, make_spec(BASE))
    said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert said.endswith("of the mask with the best early score, in -log(perplexity).")
    assert "148.4132" in said


@pytest.mark.parametrize(
    ("budget", "last", "expected"), [(1.0, 2, -3.5), (1.0, 9, -2.5), (0.5, 9, -1.5), (0.25, 2, -1.0), (0.1, 2, -1.0)]
)
def test_an_early_score_is_of_the_last_evaluations_within_the_budget(budget: float, last: int, expected: float) -> None:
    curve = tuple(EvalPoint(step=step, loss=float(step), metric=0.0) for step in (1, 2, 3, 4))
    evaluation = Evaluation(candidate=Candidate(level=1, index=0, seed=0, density=0.5), score=0.0, curve=curve)
    assert early_score(evaluation, "loss", budget, last) == expected


def test_the_tables_name_every_mask_and_every_score(searched: Result) -> None:
    spec: Spec = make_spec(BASE)

    def tell(record: LevelRecord) -> LevelRecord:
        curve = tuple(point.model_copy(update={"agreement": -0.1}) for point in record.winner.curve)
        return record.model_copy(update={"winner": record.winner.model_copy(update={"curve": curve})})

    console = Console(file=io.StringIO(), width=160)
    show_audit(console, retold(searched, tell), spec)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "candidate 3",
        "magnitude mask",
        "agreement",
        "25%",
        "with final loss",
        "Regret: the best mask's metric on `test` minus that of the mask with the best early score",
    ):
        assert part in said
