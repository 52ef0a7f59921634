"""Summary of a run: all numbers that pages, tables and other programs show."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from raymask.core.lineage import DENSE, IMP, SEARCH, branch
from raymask.core.recipe import (
    Recipe,
    dense_distillation_config,
    finetune_config,
    level_evaluations,
    planned_epochs,
    resolve,
)
from raymask.core.records import BASELINE, RAYMASK, Evaluation, LevelRecord, Record, Result, Span
from raymask.core.spec import Spec
from raymask.core.successive_halving import rung_fraction
from raymask.report.timeline import phase_of, worker_spans
from raymask.runs.run_dir import MASK, RunDir

State = Literal["running", "stopped", "failed", "finished"]


class LevelSummary(Record):
    """How far a level is.

    Attributes:
        level: Counted from 1.
        sparsity: Share in [0, 1] of the prunable weights that the level prunes.
        num_evaluations: Number of planned early evaluations.
        evaluations: Early evaluations that ended, without their losses by row.
        finetuned: Records of what was fine-tuned, by lineage.
    """

    level: int
    sparsity: float
    num_evaluations: int
    evaluations: tuple[Evaluation, ...]
    finetuned: dict[str, LevelRecord]

    @property
    def winners(self) -> frozenset[int]:
        """Indices of the candidates that the search fine-tuned."""
        return frozenset(record.winner.candidate.index for lineage, record in self.finetuned.items() if lineage != IMP)


class RunSummary(Record):
    """A run, as far as it is.

    Attributes:
        run: Path or URI of the run directory.
        state: Whether the search is running, stopped (interrupted or killed), failed (ended by an error) or finished.
        written: Unix time of the summary in seconds.
        spec: What was asked.
        starts: Versions and machine of every start.
        dense: Record of the dense model; None when it is not done.
        levels: Every level of the spec, done or not.
        path: Records of the levels that lead to the selected mask; before the end, to the first branch's last one.
        densities: The share in [0, 1] that each matrix keeps, by parameter name, at the last finished level: under
            RAYMASK for the search, under BASELINE for its baseline.
        planned: Epochs by phase that the whole search trains.
        spent: Epochs by phase so far.
        timeline: All finished work.
        result: The result; None before the end.
    """

    run: str
    state: State
    written: float
    spec: Spec
    starts: tuple[dict[str, Any], ...]
    dense: LevelRecord | None
    levels: tuple[LevelSummary, ...]
    path: tuple[LevelRecord, ...]
    densities: dict[str, dict[str, float]]
    planned: dict[str, float]
    spent: dict[str, float]
    timeline: tuple[Span, ...]
    result: Result | None

    @property
    def error(self) -> str:
        """The error that ended the last start; empty if none did."""
        return str(self.starts[-1].get("error", "")) if self.starts else ""

    @property
    def imp(self) -> tuple[LevelRecord, ...]:
        """The finished levels of the IMP baseline."""
        return self.lineage(IMP)

    def lineage(self, name: str) -> tuple[LevelRecord, ...]:
        """The finished levels of a lineage."""
        return tuple(level_summary.finetuned[name] for level_summary in self.levels if name in level_summary.finetuned)


def load_summary(run_dir: RunDir, state: State | None = None, result: Result | None = None) -> RunSummary:
    """Read a run directory.

    Args:
        run_dir: The run directory.
        state: The search's state, when its driver asks; None: read from the directory.
        result: The result that is about to be written; None: the one in the directory, if any.

    Returns:
        The summary.

    Raises:
        UserError: When the directory is no run.
    """
    spec = run_dir.read_spec()
    recipe = resolve(spec)
    result = result or run_dir.read_result()
    finished = run_dir.finished()
    levels = tuple(
        LevelSummary(
            level=level,
            sparsity=1 - density,
            num_evaluations=level_evaluations(recipe, level),
            evaluations=tuple(
                evaluation.model_copy(update={"row_losses": b""}) for evaluation in run_dir.evaluations(level)
            ),
            finetuned={lineage: record for lineage, record in finished if record.level == level},
        )
        for level, density in enumerate(recipe.densities, 1)
    )
    path = path_of(levels, result)
    starts = tuple(run_dir.starts())
    return RunSummary(
        run=run_dir.uri,
        state=state or state_of(run_dir, starts, result),
        written=time.time(),
        spec=spec,
        starts=starts,
        dense=dict(finished).get(DENSE),
        levels=levels,
        path=tuple(levels[level - 1].finetuned[lineage] for lineage, level in path),
        densities=densities(run_dir, levels, path),
        planned=planned_epochs(recipe),
        spent=spent(recipe, levels, finished),
        timeline=worker_spans(
            finished, [evaluation for level_summary in levels for evaluation in level_summary.evaluations]
        ),
        result=result,
    )


def state_of(run_dir: RunDir, starts: Sequence[Mapping[str, Any]], result: Result | None) -> State:
    """The search's state, as its run directory shows it.

    Args:
        run_dir: The run directory.
        starts: Every start of the search; an error that ended it stands there.
        result: The result; None before the end.
    """
    if result:
        return "finished"
    if run_dir.storage.is_locked():
        return "running"
    return "failed" if starts and "error" in starts[-1] else "stopped"


def path_of(levels: Sequence[LevelSummary], result: Result | None) -> list[tuple[str, int]]:
    """Lineage and level of each step to the selected mask; without a result, to the first branch's last mask."""
    ends = [
        (lineage, level_summary.level)
        for level_summary in levels
        for lineage, record in level_summary.finetuned.items()
        if (lineage != IMP and record == result.levels[-1] if result else lineage == SEARCH)
    ]
    path = ends[-1:]
    while path and path[0][1] > 1:
        lineage, level = path[0]
        parent = branch(levels[level - 1].finetuned[lineage].winner.candidate.parent_branch)
        if parent not in levels[level - 2].finetuned:
            break  # the level's files were deleted
        path.insert(0, (parent, level - 1))
    return path


def densities(
    run_dir: RunDir, levels: Sequence[LevelSummary], path: Sequence[tuple[str, int]]
) -> dict[str, dict[str, float]]:
    """The share that each matrix keeps at the last level of the search and of the baseline.

    A run that was copied by `raymask fetch` has no masks; the result is empty then.
    """
    ends = {
        RAYMASK: path[-1:],
        BASELINE: [(IMP, level_summary.level) for level_summary in levels if IMP in level_summary.finetuned][-1:],
    }
    return {
        name: kept_shares(run_dir.read_tensors(lineage, level, MASK))
        for name, last_levels in ends.items()
        for lineage, level in last_levels
        if run_dir.has_tensors(lineage, level, MASK)
    }


def spent(
    recipe: Recipe, levels: Sequence[LevelSummary], finished: Sequence[tuple[str, LevelRecord]]
) -> dict[str, float]:
    """Epochs of all finished training by phase. Failed early evaluations do not count.

    Args:
        recipe: The resolved spec.
        levels: The levels with their early evaluations.
        finished: Lineage and record of every finished level.
    """
    section, totals = recipe.spec.early_eval, dict.fromkeys(planned_epochs(recipe), 0.0)
    for level_summary in levels:
        for evaluation in level_summary.evaluations:
            if evaluation.ok:
                share = rung_fraction(section.rungs, evaluation.rung, evaluation.repeat)
                totals["early evaluation"] += section.epochs * share
    distillation = dense_distillation_config(recipe.spec)
    for lineage, record in finished:
        if lineage == DENSE:
            trained = recipe.spec.dense.epochs
        elif record.level == 0:
            trained = distillation.epochs if distillation else 0.0
        else:
            trained = finetune_config(recipe, record.level, imp=lineage == IMP).epochs
        totals[phase_of(lineage, record.level)] += trained
    return totals


def kept_shares(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The share in [0, 1] that a mask keeps of each matrix.

    Args:
        tensors: A mask's file: packed bits as uint8 by parameter name, and each matrix's shape under `<name>:shape`.
    """
    shares = {}
    for name, bits in tensors.items():
        if f"{name}:shape" in tensors:
            entries = math.prod(tensors[f"{name}:shape"].tolist())
            shares[name] = float(np.bitwise_count(bits.numpy()).sum()) / entries
    return shares
