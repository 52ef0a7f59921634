"""Which candidates go on with their early evaluation, and how far?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from raymask.core.records import Candidate, Climb, Evaluate, Evaluation, Place, Snapshot
from raymask.core.rules import ranked
from raymask.core.stats import chances

DOUBT = 0.05  # the least probability of being the best that is worth another evaluation


def places(rivals: int, rungs: Sequence[float]) -> list[int]:
    """How many of so many random candidates are evaluated to each rung: as many as it costs about the same for.

    `rungs`: shares of the early evaluation in (0, 1], increasing.
    """
    found = [rivals]
    for here, following in pairwise(rungs):
        found.append(math.ceil(found[-1] * here / following))
    return found


def climbs(rivals: int, controls: int, rungs: Sequence[float]) -> int:
    """How many early evaluations, each from one rung to the next, that makes, controls included."""
    return sum(controls + seats for seats in places(rivals, rungs))


def cost(rivals: int, controls: int, rungs: Sequence[float]) -> float:
    """The same in whole early evaluations."""
    return sum((controls + seats) * share(rungs, rung) for rung, seats in enumerate(places(rivals, rungs)))


def share(rungs: Sequence[float], rung: int, order: int = 0) -> float:
    """Which share of an early evaluation lies between the rung below and this one; all of it for a repeat."""
    return rungs[rung] - (rungs[rung - 1] if rung and not order else 0.0)


class Ladder:
    """Successive halving with an outcome that does not depend on who is evaluated first.

    Every candidate is evaluated to rung 0. To each further rung go the controls and, of the others, the best by score.
    Nobody waits for a rung to be complete, as in ASHA (Li et al., 2020): who is certain to go on does so at once; and
    when nothing certain is left to do, the likeliest others go on as a guess. A guess costs only workers that would
    stand idle, and counts only if it comes true. At the top, `repeats` of those between which the losses leave a doubt.
    """

    def __init__(
        self,
        pool: Sequence[Candidate],
        rungs: Sequence[float],
        known: Sequence[Evaluation] = (),
        *,
        repeats: int = 1,
        seed: int = 0,
    ) -> None:
        """`known`: evaluations of an earlier start. `seed`: of the bootstrap that says where a repeat is worth it."""
        self.pool = tuple(pool)
        self.places = places(sum(not candidate.is_control for candidate in pool), rungs)
        self.found: dict[Place, Evaluation] = {}
        self.repeats, self.seed = repeats, seed
        self.doubtful: dict[int, list[Candidate]] = {}
        for evaluation in known:
            self.hear(evaluation)

    def climb(self, evaluate: Evaluate, parents: Mapping[int, Snapshot]) -> Iterator[Evaluation]:
        """Evaluate everybody as far as it is worth, from the parents by branch; in the order in which they finish."""
        for evaluation in evaluate(parents, self.wanted):
            self.hear(evaluation)
            yield evaluation

    def hear(self, evaluation: Evaluation) -> None:
        """An evaluation has ended."""
        self.found[evaluation.place] = evaluation

    def wanted(self) -> Iterator[Climb]:
        """What is worth doing now, the most worthwhile first; nothing when it is decided who is at the top."""
        open_climbs = False
        for climb in self.upward():
            open_climbs = True
            yield climb
        if not open_climbs:
            yield from self.repetitions()

    def upward(self) -> Iterator[Climb]:
        """From rung to rung: what is certain, the higher rungs first, then what is guessed."""
        by_rung = list(enumerate(self.entrants()))
        for rung, entrants in reversed(by_rung):
            for candidate in entrants:
                if (candidate.index, rung, 0) not in self.found:
                    yield Climb(candidate, rung)
        likely = self.pool
        for rung, certain in by_rung[1:]:
            best = ranked(self.reached(rung - 1, likely, controls=False))[: self.places[rung]]
            guesses = [each.candidate for each in best if each.candidate not in certain]
            for candidate in guesses:
                if (candidate.index, rung, 0) not in self.found:
                    yield Climb(candidate, rung)
            likely = (*certain, *guesses)

    def repetitions(self) -> Iterator[Climb]:
        """At the top: those that may be the best once more, and once more, while there are several."""
        top = len(self.places) - 1
        for order in range(1, self.repeats):
            if order not in self.doubtful:
                self.doubtful[order] = self.doubts(order)
            missing = [each for each in self.doubtful[order] if (each.index, top, order) not in self.found]
            yield from (Climb(candidate, top, order) for candidate in missing)
            if missing:
                return

    def doubts(self, orders: int) -> list[Candidate]:
        """Who may be the best by the first so many orders, and the controls; nobody when there is no doubt."""
        alive = [evaluation for evaluation in self.finalists(orders) if evaluation.ok]
        if len(alive) < 2:
            return []
        likely = chances(np.stack([evaluation.losses() for evaluation in alive]), self.seed) >= DOUBT
        contenders = [each.candidate for each, may in zip(alive, likely, strict=True) if may]
        controls = [each.candidate for each in alive if each.candidate.is_control and each.candidate not in contenders]
        return [*contenders, *controls] if len(contenders) > 1 else []

    def finalists(self, orders: int | None = None) -> list[Evaluation]:
        """The evaluations of those that went furthest, failed ones too, each the mean over the first so many `orders`,
        or all, in which it was evaluated."""
        reached = [self.reached(rung, entrants) for rung, entrants in enumerate(self.entrants())]
        furthest = next(evaluations for evaluations in reversed(reached) if evaluations)
        return [self.averaged(evaluation, orders or self.repeats) for evaluation in furthest]

    def failed(self) -> int:
        """How many of those that were certain to be evaluated to a rung failed on the way there."""
        return sum(not each.ok for rung, here in enumerate(self.entrants()) for each in self.reached(rung, here))

    def averaged(self, first: Evaluation, orders: int) -> Evaluation:
        """Score and losses of a candidate, the mean over orders."""
        again = (self.found.get((first.candidate.index, first.rung, order)) for order in range(1, orders))
        every = [first, *(each for each in again if each and each.ok)]
        if len(every) == 1 or not first.ok:
            return first
        losses = np.mean([each.losses() for each in every], axis=0, dtype=np.float64).astype(np.float32)
        score = float(np.mean([each.score for each in every if each.score is not None]))
        return first.model_copy(update={"score": score, "row_losses": losses.tobytes()})

    def reached(self, rung: int, entrants: Sequence[Candidate], controls: bool = True) -> list[Evaluation]:
        """What was found at a rung of those that are certain to be there."""
        found = [self.found.get((each.index, rung, 0)) for each in entrants if controls or not each.is_control]
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
            complete = complete and all((candidate.index, rung, 0) in self.found for candidate in here)
            found.append(tuple(evaluation.candidate for evaluation in (*controls, *certain)))
        return found
