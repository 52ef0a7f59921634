"""Which candidates go on with their early evaluation, and how far?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from raymask.core.records import Candidate, Climb, Evaluate, Evaluation, Snapshot
from raymask.core.rules import ranked


def places(rivals: int, rungs: Sequence[float]) -> list[int]:
    """How many of so many random candidates are evaluated to each rung: as many as it costs about the same for.

    `rungs`: shares of the early evaluation in (0, 1], increasing.
    """
    found = [rivals]
    for share, following in pairwise(rungs):
        found.append(math.ceil(found[-1] * share / following))
    return found


def climbs(rivals: int, controls: int, rungs: Sequence[float]) -> int:
    """How many early evaluations, each from one rung to the next, that makes, controls included."""
    return sum(controls + seats for seats in places(rivals, rungs))


def cost(rivals: int, controls: int, rungs: Sequence[float]) -> float:
    """The same in whole early evaluations."""
    steps = [share - before for share, before in zip(rungs, (0.0, *rungs), strict=False)]
    return sum((controls + seats) * step for seats, step in zip(places(rivals, rungs), steps, strict=True))


class Ladder:
    """Successive halving with an outcome that does not depend on who is evaluated first.

    Every candidate is evaluated to rung 0. To each further rung go the controls and, of the others, the best by score.
    Nobody waits for a rung to be complete, as in ASHA (Li et al., 2020): who is certain to go on does so at once; and
    when nothing certain is left to do, the likeliest others go on as a guess. A guess costs only workers that would
    stand idle, and counts only if it comes true.
    """

    def __init__(self, pool: Sequence[Candidate], rungs: Sequence[float], known: Sequence[Evaluation] = ()) -> None:
        """`known`: evaluations of an earlier start."""
        self.pool = tuple(pool)
        self.places = places(sum(not candidate.is_control for candidate in pool), rungs)
        self.found: dict[tuple[int, int], Evaluation] = {}
        for evaluation in known:
            self.hear(evaluation)

    def climb(self, evaluate: Evaluate, parents: Mapping[int, Snapshot]) -> Iterator[Evaluation]:
        """Evaluate everybody as far as it is worth, from the parents by branch; in the order in which they finish."""
        for evaluation in evaluate(parents, self.wanted):
            self.hear(evaluation)
            yield evaluation

    def hear(self, evaluation: Evaluation) -> None:
        """An evaluation has ended."""
        self.found[evaluation.candidate.index, evaluation.rung] = evaluation

    def wanted(self) -> Iterator[Climb]:
        """What is worth doing now, the most worthwhile first; nothing when it is decided who is left at the top."""
        by_rung = list(enumerate(self.entrants()))
        for rung, entrants in reversed(by_rung):
            for candidate in entrants:
                if (candidate.index, rung) not in self.found:
                    yield Climb(candidate, rung)
        likely = self.pool
        for rung, certain in by_rung[1:]:
            best = ranked(self.reached(rung - 1, likely, controls=False))[: self.places[rung]]
            guesses = [each.candidate for each in best if each.candidate not in certain]
            for candidate in guesses:
                if (candidate.index, rung) not in self.found:
                    yield Climb(candidate, rung)
            likely = (*certain, *guesses)

    def finalists(self) -> list[Evaluation]:
        """The evaluations of those that went furthest, failed ones too."""
        reached = [self.reached(rung, entrants) for rung, entrants in enumerate(self.entrants())]
        return next(evaluations for evaluations in reversed(reached) if evaluations)

    def reached(self, rung: int, entrants: Sequence[Candidate], controls: bool = True) -> list[Evaluation]:
        """What was found at a rung of those that are certain to be there."""
        found = [self.found.get((each.index, rung)) for each in entrants if controls or not each.is_control]
        return [evaluation for evaluation in found if evaluation]

    def entrants(self) -> list[tuple[Candidate, ...]]:
        """By rung, who is certain to be evaluated to it, by what has been found so far."""
        found = [self.pool]
        complete = True  # whether nobody will join those of this rung any more
        for rung, seats in enumerate(self.places[1:]):
            here = found[-1]
            rivals = sum(not candidate.is_control for candidate in here) if complete else self.places[rung]
            done = self.reached(rung, here, controls=False)
            # Whoever leaves rivals - seats others behind goes on, whatever the missing ones bring.
            certain = ranked(done)[: max(0, seats - (rivals - len(done)))]
            controls = ranked([each for each in self.reached(rung, here) if each.candidate.is_control])
            complete = complete and all((candidate.index, rung) in self.found for candidate in here)
            found.append(tuple(evaluation.candidate for evaluation in (*controls, *certain)))
        return found
