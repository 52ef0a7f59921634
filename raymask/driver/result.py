"""Result of a search: test metrics of the models, export, and the result record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np

from raymask.core import seeds
from raymask.core.lineage import DENSE, IMP, branch, branches
from raymask.core.recipe import Recipe, has_baseline
from raymask.core.records import BASELINE, RAYMASK, ConfidenceInterval, LevelRecord, ModelMetrics, Result
from raymask.core.seeds import derive
from raymask.core.stats import bootstrap
from raymask.data.metrics import constant_prediction, selection_metric
from raymask.driver.branches import best_branch
from raymask.driver.setup import SearchSetup
from raymask.export.hf import export
from raymask.report.timeline import seconds_by_phase, worker_spans
from raymask.report.writer import write_report
from raymask.runs.run_dir import RunDir


def build_result(setup: SearchSetup, run_dir: RunDir, wall: float) -> Result:
    """Compare the models on `test`, export the selected one, and write report and result.

    Args:
        setup: The search's setup.
        run_dir: The run directory, with all levels done.
        wall: Seconds since this start of the search.

    Returns:
        The result, as it was written.
    """
    recipe, data = setup.recipe, setup.context.data
    last = len(recipe.densities)
    records = {
        (lineage, level): run_dir.read_level(lineage, level)
        for level in range(1, last + 1)
        for lineage in branches(recipe.spec)
        if run_dir.has_level(lineage, level)
    }
    lineages = selected_lineages(recipe, run_dir, records)
    levels = tuple(records.pop((lineage, level)) for level, lineage in enumerate(lineages, 1))
    other_levels = tuple(records.values())
    imp = tuple(run_dir.read_level(IMP, level) for level in range(1, last + 1)) if has_baseline(recipe.spec) else ()
    dense = run_dir.read_level(DENSE, 0)
    baseline = [(BASELINE, IMP, imp[-1])] if imp else []
    rows, gain = compare_on_test(
        setup, run_dir, [("dense", DENSE, dense), *baseline, (RAYMASK, lineages[-1], levels[-1])]
    )
    evaluations = [evaluation for level in range(1, last + 1) for evaluation in run_dir.evaluations(level)]
    timeline = worker_spans(run_dir.finished(), evaluations)
    result = Result(
        run=run_dir.uri,
        model=Path(recipe.spec.model.name).name if Path(recipe.spec.model.name).is_dir() else recipe.spec.model.name,
        task=recipe.spec.task.name or str(recipe.spec.task.train),
        kind=data.kind,
        metrics=tuple(dense.test_metrics),
        models=rows,
        sizes=asdict(setup.model_info.sizes),
        gain=gain,
        levels=levels,
        other_levels=other_levels,
        baseline_levels=imp,
        rows_scored=(len(setup.context.scored_rows), len(data.validation)),
        seconds={**seconds_by_phase(timeline), "wall": wall},
        timeline=timeline,
        export=run_dir.export_uri,
    )
    files = export(
        run_dir, setup.model_info, setup.tokenizer, result, lineages[-1], recipe.spec.model.trust_remote_code
    )
    result = result.model_copy(update={"files": files})
    write_report(run_dir, "finished", result)
    run_dir.write_result(result)  # written last: its existence means that the search is done
    return result


def selected_lineages(recipe: Recipe, run_dir: RunDir, records: Mapping[tuple[str, int], LevelRecord]) -> list[str]:
    """The lineages that lead to the selected model, level 1 first.

    Args:
        recipe: The recipe.
        run_dir: The run directory, with all levels done.
        records: Records of the search's levels by lineage and level.
    """
    last = len(recipe.densities)
    lineages = [branch(best_branch(recipe, run_dir, last))]
    for level in range(last, 1, -1):
        lineages.insert(0, branch(records[lineages[0], level].winner.candidate.parent_branch))
    return lineages


def compare_on_test(
    setup: SearchSetup, run_dir: RunDir, models: Sequence[tuple[str, str, LevelRecord]]
) -> tuple[tuple[ModelMetrics, ...], ConfidenceInterval | None]:
    """Compare models on the same bootstrap resamples of `test`.

    Args:
        setup: The search's setup.
        run_dir: The run directory, which has the models' predictions on `test`.
        models: Name, lineage and level record by model: dense, the IMP baseline if it ran, and raymask last.

    Returns:
        One row per model, and the gain of the last model's mean metric over that of the model before it; the gain is
        None without a baseline.
    """
    data = setup.context.data
    logits = [run_dir.read_logits(lineage, record.level) for _, lineage, record in models]

    def metrics_and_gain(rows: np.ndarray) -> list[float]:
        metrics = [data.test_metrics(model_logits, rows) for model_logits in logits]
        gain = selection_metric(metrics[-1]) - selection_metric(metrics[-2])
        return [*chain(*(model_metrics.values() for model_metrics in metrics)), gain]

    *intervals, gain = bootstrap(len(data.test), metrics_and_gain, derive(setup.recipe.spec.seed, seeds.BOOTSTRAP))
    next_intervals = iter(intervals)  # of all metrics of the first model, then of the second, and so on
    rows = tuple(
        ModelMetrics(
            name=name,
            test_metrics=record.test_metrics,
            intervals=dict(zip(record.test_metrics, next_intervals, strict=False)),
            sparsity=setup.model_info.sizes.sparsities(record.num_prunable - record.num_kept),
            constant_prediction=constant_prediction(setup.dataset.classes, model_logits),
        )
        for (name, _, record), model_logits in zip(models, logits, strict=True)
    )
    return rows, gain if len(models) > 2 else None
