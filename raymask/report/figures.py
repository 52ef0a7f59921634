"""What does a run have to say, in figures? Pages, tables and other programs are told from here."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from raymask.core.recipe import climbs_of, epochs, resolve
from raymask.core.records import Evaluation, Level, Piece, Record, Result
from raymask.core.spec import Spec
from raymask.report.timeline import worked
from raymask.store import DENSE, IMP, MASK, RunDir, branch

SELECTED, CONTROL = "selected", "control (IMP)"
"""What a search's masks and its baseline's are called."""


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

    `densities`: the share of each matrix that is kept, by name, at the last finished level of the search and of its
    baseline. `epochs`: by purpose, of the whole search. `timeline`: all finished work. `result`: once there is one.
    """

    run: str
    state: Literal["running", "stopped", "finished"]
    written: float
    spec: Spec
    starts: tuple[dict[str, Any], ...]
    dense: Level | None
    levels: tuple[Stand, ...]
    densities: dict[str, dict[str, float]]
    epochs: dict[str, float]
    timeline: tuple[Piece, ...]
    result: Result | None

    @property
    def path(self) -> tuple[Level, ...]:
        """The levels that lead to the selected mask; of an unfinished search, those of its first branch."""
        return self.result.levels if self.result else self.lineage(branch(1))

    @property
    def imp(self) -> tuple[Level, ...]:
        return self.lineage(IMP)

    def lineage(self, name: str) -> tuple[Level, ...]:
        return tuple(stand.settled[name] for stand in self.levels if name in stand.settled)


def gather(store: RunDir, result: Result | None = None) -> Figures:
    """A run's figures, with the result that is there or is about to be. Raises UserError when it is no run."""
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
    return Figures(
        run=store.uri,
        state="finished" if result else "running" if store.storage.busy() else "stopped",
        written=time.time(),
        spec=spec,
        starts=tuple(store.starts()),
        dense=dict(finished).get(DENSE),
        levels=stands,
        densities=densities(store, finished, result),
        epochs=epochs(recipe),
        timeline=worked(finished, [found for stand in stands for found in stand.evaluations]),
        result=result,
    )


def densities(
    store: RunDir, finished: Sequence[tuple[str, Level]], result: Result | None
) -> dict[str, dict[str, float]]:
    """The share of each matrix that is kept, at the last level of either side."""
    last = {}
    for lineage, record in finished:
        if lineage == IMP:
            last[CONTROL] = lineage, record.level
        elif record.level and (result is None or record == result.levels[-1]):
            last[SELECTED] = lineage, record.level
    return {name: kept_shares(store.read_tensors(*place, MASK)) for name, place in last.items()}


def kept_shares(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Of a mask's file: packed bits, uint8, with each matrix's shape beside it."""
    found = {}
    for name, bits in tensors.items():
        if f"{name}:shape" in tensors:
            entries = math.prod(tensors[f"{name}:shape"].tolist())
            found[name] = float(np.bitwise_count(bits.numpy()).sum()) / entries
    return found
