"""Successive halving over a level's candidates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from raymask.core.records import Candidate, EvalKey, Evaluation
from raymask.core.selection import ranked
from raymask.core.stats import win_probabilities
from raymask.core.tasks import EvalTask

MIN_WIN_PROBABILITY = 0.05  # of being the best candidate, below which a repeat is not worth its cost


def rung_sizes(num_random: int, rungs: Sequence[float]) -> list[int]:
    """How many random candidates are evaluated to each rung, so that every rung costs about the same.

    Args:
        num_random: Number of random candidates.
        rungs: Shares of the early evaluation in (0, 1], increasing.

    Returns:
        Number of random candidates by rung. All of them are evaluated to rung 0. Magnitude masks are evaluated to
        every rung and not counted here.
    """
    sizes = [num_random]
    for lower, upper in pairwise(rungs):
        sizes.append(math.ceil(sizes[-1] * lower / upper))
    return sizes


def num_evaluations(num_random: int, num_magnitude: int, rungs: Sequence[float]) -> int:
    """How many early evaluations, each from one rung to the next, a level has.

    Args:
        num_random: Number of random candidates.
        num_magnitude: Number of magnitude masks, one a parent. They are evaluated to every rung.
        rungs: Shares of the early evaluation in (0, 1], increasing.

    Returns:
        The number of evaluations, without repeats and speculative ones.
    """
    return sum(num_magnitude + size for size in rung_sizes(num_random, rungs))


def num_full_evaluations(num_random: int, num_magnitude: int, rungs: Sequence[float]) -> float:
    """The cost of a level's `num_evaluations`, in units of one full early evaluation. Same arguments."""
    sizes = rung_sizes(num_random, rungs)
    return sum((num_magnitude + size) * rung_fraction(rungs, rung) for rung, size in enumerate(sizes))


def rung_fraction(rungs: Sequence[float], rung: int, order: int = 0) -> float:
    """Cost of one evaluation, in units of one full early evaluation.

    Args:
        rungs: Shares of the early evaluation in (0, 1], increasing.
        rung: Rung that the evaluation runs to, from 0.
        order: Number of the repeat. A repeat above 0 starts from the parent, not from the rung below.

    Returns:
        The share in (0, 1].
    """
    return rungs[rung] - (rungs[rung - 1] if rung and not order else 0.0)


class SuccessiveHalving:
    """Successive halving whose result does not depend on the order in which evaluations finish.

    Every candidate is evaluated to rung 0. The magnitude masks are promoted to each further rung, and of the random
    masks those with the best scores. Promotion is asynchronous, as in ASHA (Li et al., 2020): a candidate that is
    certain to be promoted is promoted at once. When no certain evaluation is left to run, the most likely others are
    evaluated speculatively. Speculative evaluations use only idle workers, and count only where the candidate turns
    out to be promoted. At the last rung, candidates whose losses are too close to tell apart are evaluated up to
    `repeats` times.

    Attributes:
        pool: The level's candidates.
        results: Evaluations so far, by key.
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
        """Start, or resume from the evaluations of an earlier start.

        Args:
            pool: The level's candidates.
            rungs: Shares of the early evaluation in (0, 1], increasing.
            known: Evaluations of an earlier start.
            repeats: Number of evaluations at the last rung, at most; 1 for no repeats.
            seed: Seed of the bootstrap that decides which candidates are repeated.
        """
        self.pool = tuple(pool)
        self._rungs = tuple(rungs)
        self._rung_sizes = rung_sizes(sum(not candidate.is_magnitude for candidate in pool), rungs)
        self.results: dict[EvalKey, Evaluation] = {}
        self._max_repeats, self._seed = repeats, seed
        self._contenders: dict[int, list[Candidate]] = {}  # by repeat, decided once
        for evaluation in known:
            self.tell(evaluation)

    @property
    def num_planned(self) -> int:
        """How many evaluations, each from one rung to the next, are planned, without repeats and speculative ones."""
        return num_evaluations(self._rung_sizes[0], len(self.pool) - self._rung_sizes[0], self._rungs)

    def tell(self, evaluation: Evaluation) -> None:
        """Report an evaluation that has ended."""
        self.results[evaluation.key] = evaluation

    def ask(self) -> list[EvalTask]:
        """Suggest evaluations to run.

        Evaluations that are already running are suggested again, until they are told.

        Returns:
            The tasks, the most useful first. None when the finalists are decided.
        """
        return list(self.promotions()) or list(self.repeats())

    def promotions(self) -> Iterator[EvalTask]:
        """Evaluations to the rungs: the certain ones, higher rungs first, then the speculative ones."""
        by_rung = list(enumerate(self.promoted()))
        for rung, candidates in reversed(by_rung):
            for candidate in candidates:
                if (candidate.index, rung, 0) not in self.results:
                    yield EvalTask(candidate, rung)
        likely = self.pool
        for rung, certain in by_rung[1:]:
            best = ranked(self.results_at(rung - 1, likely, include_magnitude=False))[: self._rung_sizes[rung]]
            speculative = [evaluation.candidate for evaluation in best if evaluation.candidate not in certain]
            for candidate in speculative:
                if (candidate.index, rung, 0) not in self.results:
                    yield EvalTask(candidate, rung)
            likely = (*certain, *speculative)

    def repeats(self) -> Iterator[EvalTask]:
        """Repeats at the last rung: one more of each contender at a time, while there are several contenders."""
        last_rung = len(self._rung_sizes) - 1
        for repeat in range(1, self._max_repeats):
            if repeat not in self._contenders:
                self._contenders[repeat] = self.contenders(repeat)
            missing = [
                candidate
                for candidate in self._contenders[repeat]
                if (candidate.index, last_rung, repeat) not in self.results
            ]
            yield from (EvalTask(candidate, last_rung, repeat) for candidate in missing)
            if missing:
                return

    def contenders(self, num_repeats: int) -> list[Candidate]:
        """Candidates that may be the best by their first `num_repeats` evaluations, with the magnitude masks.

        A contender has the lowest mean loss with a probability of MIN_WIN_PROBABILITY or more. The list is empty where
        there is only one, which is then the best.
        """
        finalists = [evaluation for evaluation in self.finalists(num_repeats) if evaluation.ok]
        if len(finalists) < 2:
            return []
        losses = np.stack([evaluation.losses() for evaluation in finalists])
        is_likely = win_probabilities(losses, self._seed) >= MIN_WIN_PROBABILITY
        candidates = [evaluation.candidate for evaluation in finalists]
        contenders = [candidate for candidate, likely in zip(candidates, is_likely, strict=True) if likely]
        magnitude = [candidate for candidate in candidates if candidate.is_magnitude and candidate not in contenders]
        return [*contenders, *magnitude] if len(contenders) > 1 else []

    def finalists(self, num_repeats: int | None = None) -> list[Evaluation]:
        """Evaluations at the highest rung that any candidate has reached for certain, failed ones included.

        Args:
            num_repeats: How many evaluations of a candidate to average at most, None for all.

        Returns:
            One evaluation a candidate, the mean over those of its repeats that succeeded.
        """
        by_rung = [self.results_at(rung, candidates) for rung, candidates in enumerate(self.promoted())]
        highest = next(evaluations for evaluations in reversed(by_rung) if evaluations)
        return [self.mean_over_repeats(evaluation, num_repeats or self._max_repeats) for evaluation in highest]

    def num_failed(self) -> int:
        """How many candidates failed on the way to a rung that they were certain to be evaluated to."""
        return sum(
            not evaluation.ok
            for rung, candidates in enumerate(self.promoted())
            for evaluation in self.results_at(rung, candidates)
        )

    def mean_over_repeats(self, first: Evaluation, num_repeats: int) -> Evaluation:
        """A candidate's first evaluation, with score and row losses averaged over its first `num_repeats` ones."""
        others = (self.results.get((first.candidate.index, first.rung, repeat)) for repeat in range(1, num_repeats))
        evaluations = [first, *(other for other in others if other and other.ok)]
        if len(evaluations) == 1 or not first.ok:
            return first
        losses = np.mean([evaluation.losses() for evaluation in evaluations], axis=0, dtype=np.float64)
        score = float(np.mean([evaluation.score for evaluation in evaluations if evaluation.score is not None]))
        return first.model_copy(update={"score": score, "row_losses": losses.astype(np.float32).tobytes()})

    def results_at(
        self, rung: int, candidates: Sequence[Candidate], include_magnitude: bool = True
    ) -> list[Evaluation]:
        """The first evaluations of these candidates at a rung, as far as they have ended."""
        evaluations = [
            self.results.get((candidate.index, rung, 0))
            for candidate in candidates
            if include_magnitude or not candidate.is_magnitude
        ]
        return [evaluation for evaluation in evaluations if evaluation]

    def promoted(self) -> list[tuple[Candidate, ...]]:
        """By rung, the candidates that are certain to be evaluated to it, given the evaluations so far."""
        by_rung = [self.pool]
        is_complete = True  # whether no more candidates can join the current rung
        for rung, size in enumerate(self._rung_sizes[1:]):
            current = by_rung[-1]
            num_random = (
                sum(not candidate.is_magnitude for candidate in current) if is_complete else self._rung_sizes[rung]
            )
            done = self.results_at(rung, current, include_magnitude=False)
            # A candidate that is ahead of num_random - size others is promoted, whatever the missing ones score.
            certain = ranked(done)[: max(0, size - (num_random - len(done)))]
            magnitude = ranked(
                [evaluation for evaluation in self.results_at(rung, current) if evaluation.candidate.is_magnitude]
            )
            is_complete = is_complete and all((candidate.index, rung, 0) in self.results for candidate in current)
            by_rung.append(tuple(evaluation.candidate for evaluation in (*magnitude, *certain)))
        return by_rung
