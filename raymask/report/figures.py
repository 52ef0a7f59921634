"""What does a run have to say, in figures? Pages, tables and other programs are told from here."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from raymask.core.recipe import Recipe, climbs_of, epochs, finetune_stage, resolve, warm_stage
from raymask.core.records import CONTROL, SELECTED, Evaluation, Level, Piece, Record, Result
from raymask.core.rungs import share
from raymask.core.spec import Spec
from raymask.report.timeline import purpose_of, worked
from raymask.store import DENSE, IMP, MASK, SEARCH, RunDir, branch

State = Literal["running", "stopped", "finished"]


class Stand(Record):
    """How far a level is: of `climbs` early evaluations those in `evaluations` are done, without their losses row by
    row; `settled` is what was fine-tuned, by lineage."""

    level: int
    sparsity: float
    climbs: int
    evaluations: tuple[Evaluation, ...]
    settled: dict[str, Level]

    @property
    def winners(self) -> frozenset[int]:
        """Indices of the candidates that the search fine-tuned."""
        return frozenset(found.winner.candidate.index for lineage, found in self.settled.items() if lineage != IMP)


class Figures(Record):
    """A run, as far as it is. `written`: Unix time, seconds. `starts`: versions and machine of every start.

    `path`: the levels that lead to the selected mask, of an unfinished search to that of its first branch. `densities`:
    the share of each matrix that is kept, by name, at the last finished level of the search and of its baseline.
    `planned` and `spent`: epochs by purpose, of the whole search and so far. `timeline`: all finished work. `result`:
    once there is one.
    """

    run: str
    state: State
    written: float
    spec: Spec
    starts: tuple[dict[str, Any], ...]
    dense: Level | None
    levels: tuple[Stand, ...]
    path: tuple[Level, ...]
    densities: dict[str, dict[str, float]]
    planned: dict[str, float]
    spent: dict[str, float]
    timeline: tuple[Piece, ...]
    result: Result | None

    @property
    def imp(self) -> tuple[Level, ...]:
        return self.lineage(IMP)

    def lineage(self, name: str) -> tuple[Level, ...]:
        return tuple(stand.settled[name] for stand in self.levels if name in stand.settled)


def gather(store: RunDir, state: State | None = None, result: Result | None = None) -> Figures:
    """A run's figures; its driver knows the `state`, and the result that is about to be written.

    Raises UserError when it is no run.
    """
    spec = store.read_spec()
    recipe = resolve(spec)
    result = result or store.read_result()
    finished = store.finished()
    stands = tuple(
        Stand(
            level=level,
            sparsity=1 - density,
            climbs=climbs_of(recipe, level),
            evaluations=tuple(found.model_copy(update={"row_losses": b""}) for found in store.evaluations(level)),
            settled={lineage: record for lineage, record in finished if record.level == level},
        )
        for level, density in enumerate(recipe.densities, 1)
    )
    path = path_of(stands, result)
    return Figures(
        run=store.uri,
        state=state or ("finished" if result else "running" if store.storage.busy() else "stopped"),
        written=time.time(),
        spec=spec,
        starts=tuple(store.starts()),
        dense=dict(finished).get(DENSE),
        levels=stands,
        path=tuple(stands[level - 1].settled[lineage] for lineage, level in path),
        densities=densities(store, stands, path),
        planned=epochs(recipe),
        spent=spent(recipe, stands, finished),
        timeline=worked(finished, [found for stand in stands for found in stand.evaluations]),
        result=result,
    )


def path_of(stands: Sequence[Stand], result: Result | None) -> list[tuple[str, int]]:
    """Lineage and level of each step to the selected mask, or to the last one of the first branch."""
    ends = [
        (lineage, stand.level)
        for stand in stands
        for lineage, record in stand.settled.items()
        if (lineage != IMP and record == result.levels[-1] if result else lineage == SEARCH)
    ]
    found = ends[-1:]
    while found and found[0][1] > 1:
        lineage, level = found[0]
        above = branch(stands[level - 1].settled[lineage].winner.candidate.parent)
        if above not in stands[level - 2].settled:
            break  # somebody has deleted it
        found.insert(0, (above, level - 1))
    return found


def densities(store: RunDir, stands: Sequence[Stand], path: Sequence[tuple[str, int]]) -> dict[str, dict[str, float]]:
    """The share of each matrix that is kept, at the last level of either side; a run that was fetched has no masks."""
    ends = {SELECTED: path[-1:], CONTROL: [(IMP, stand.level) for stand in stands if IMP in stand.settled][-1:]}
    return {
        name: kept_shares(store.read_tensors(*place, MASK))
        for name, places in ends.items()
        for place in places
        if store.has_tensors(*place, MASK)
    }


def spent(recipe: Recipe, stands: Sequence[Stand], finished: Sequence[tuple[str, Level]]) -> dict[str, float]:
    """Epochs by purpose of all that is finished."""
    probe, found = recipe.spec.probe, dict.fromkeys(epochs(recipe), 0.0)
    for stand in stands:
        for one in stand.evaluations:
            if one.ok:
                found["early evaluation"] += probe.epochs * share(probe.rungs, one.rung, one.order)
    warm = warm_stage(recipe.spec)
    for lineage, record in finished:
        if lineage == DENSE:
            trained = recipe.spec.dense.epochs
        elif record.level == 0:
            trained = warm.epochs if warm else 0.0
        else:
            trained = finetune_stage(recipe, record.level, imp=lineage == IMP).epochs
        found[purpose_of(lineage, record.level)] += trained
    return found


def kept_shares(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Of a mask's file: packed bits, uint8, with each matrix's shape beside it."""
    found = {}
    for name, bits in tensors.items():
        if f"{name}:shape" in tensors:
            entries = math.prod(tensors[f"{name}:shape"].tolist())
            found[name] = float(np.bitwise_count(bits.numpy()).sum()) / entries
    return found
