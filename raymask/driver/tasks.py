"""Fine-tunings of a level: the winners they come from, their labels and their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raymask.core import seeds
from raymask.core.lineage import DENSE, IMP
from raymask.core.recipe import Recipe
from raymask.core.records import BASELINE, RAYMASK, Candidate, ConfidenceInterval, Evaluation, LevelRecord, TrainConfig
from raymask.core.seeds import derive
from raymask.core.stats import paired_gain, win_probabilities
from raymask.core.tasks import Checkpoint, Snapshot
from raymask.driver.setup import SearchSetup


@dataclass(frozen=True)
class Selection:
    """The outcome of a level's early evaluation.

    Attributes:
        winners: Evaluations of the selected candidates, the best first.
        finalists: Evaluations of all candidates at the last rung, winners included; empty for a single candidate.
        num_evaluated: Number of candidates.
        num_failed: Number of candidates that failed.
    """

    winners: Sequence[Evaluation]
    finalists: Sequence[Evaluation] = ()
    num_evaluated: int = 0
    num_failed: int = 0


@dataclass(frozen=True)
class PendingFinetune:
    """The fine-tuning of one lineage at one level, which is still to be done.

    Attributes:
        lineage: The lineage.
        parent: The snapshot to start from.
        config: How to train.
        selection: The selection that the mask comes from.
        winner_index: Index of the mask's candidate in `selection.winners`.
    """

    lineage: str
    parent: Snapshot
    config: TrainConfig
    selection: Selection
    winner_index: int = 0

    @property
    def winner(self) -> Evaluation:
        """The evaluation of the candidate whose mask is fine-tuned."""
        return self.selection.winners[self.winner_index]


def single(candidate: Candidate) -> Selection:
    """The selection of a candidate without competitors, which needs no score."""
    return Selection([Evaluation(candidate=candidate)])


def pending_branches(
    open_branches: Sequence[str],
    selection: Selection,
    parents: Mapping[int, Snapshot],
    config: TrainConfig,
    done: Sequence[LevelRecord],
) -> list[PendingFinetune]:
    """The fine-tunings of a level's open branches, one winner each.

    Args:
        open_branches: Lineages of the branches that are not done.
        selection: The level's winners, as many as branches or fewer.
        parents: Parent snapshots by branch number.
        config: How to train.
        done: Records of the branches that are done; their winners are not fine-tuned again.
    """
    done_candidates = {record.winner.candidate for record in done}
    open_winners = [index for index, winner in enumerate(selection.winners) if winner.candidate not in done_candidates]
    return [
        PendingFinetune(lineage, parents[selection.winners[index].candidate.parent_branch], config, selection, index)
        for lineage, index in zip(open_branches, open_winners, strict=False)
    ]


def describe_level(setup: SearchSetup, item: PendingFinetune, checkpoint: Checkpoint) -> LevelRecord:
    """The record of a finished level, without the files' hashes.

    The metrics on `test` are computed here. No selection uses them.

    Args:
        setup: The search's setup.
        item: The fine-tuning that was done.
        checkpoint: Its outcome.
    """
    data, seed = setup.context.data, setup.recipe.spec.seed
    candidate, finalists = item.winner.candidate, item.selection.finalists
    return LevelRecord(
        level=candidate.level,
        density=candidate.density,
        num_kept=checkpoint.num_kept,
        num_prunable=checkpoint.num_prunable,
        winner=item.winner,
        num_evaluated=item.selection.num_evaluated,
        num_failed=item.selection.num_failed,
        gain=gain_on_validation(item.winner, finalists, derive(seed, seeds.BOOTSTRAP, candidate.level)),
        win_probability=win_probability(item.winner, finalists, derive(seed, seeds.CONFIDENCE, candidate.level)),
        finetune_result=checkpoint.finetune_result,
        test_metrics=data.test_metrics(checkpoint.test_outputs),
        digest=checkpoint.digest,
        parent_key=item.parent.key,
        data_fingerprint=data.fingerprint(),
    )


def gain_on_validation(winner: Evaluation, finalists: Sequence[Evaluation], seed: int) -> ConfidenceInterval | None:
    """How much lower the winner's early loss is than that of the magnitude mask, paired over validation rows.

    Args:
        winner: The winner's evaluation.
        finalists: Evaluations at the last rung; the magnitude mask of the winner's parent is looked up here.
        seed: Seed of the bootstrap.

    Returns:
        The mean difference with its interval, positive when the winner is better; None when the winner is itself a
        magnitude mask, or when the magnitude mask failed or was not evaluated.
    """
    magnitude_masks = [finalist for finalist in finalists if finalist.candidate.is_magnitude and finalist.ok]
    parent_branch = winner.candidate.parent_branch
    baseline = next((mask for mask in magnitude_masks if mask.candidate.parent_branch == parent_branch), None)
    if baseline is None or winner.candidate.is_magnitude:
        return None
    return paired_gain(baseline.losses(), winner.losses(), seed)


def win_probability(winner: Evaluation, finalists: Sequence[Evaluation], seed: int) -> float | None:
    """The probability in [0, 1] that no finalist has a lower early loss than the winner, by bootstrap over rows.

    Args:
        winner: The winner's evaluation, one of the finalists.
        finalists: Evaluations at the last rung.
        seed: Seed of the bootstrap.

    Returns:
        The probability; None when fewer than two finalists succeeded.
    """
    succeeded = [evaluation for evaluation in finalists if evaluation.ok]
    if len(succeeded) < 2:
        return None
    losses = np.stack([evaluation.losses() for evaluation in succeeded])
    return float(win_probabilities(losses, seed)[succeeded.index(winner)])


def level_label(recipe: Recipe, level: int) -> str:
    """A level's label for the user, such as `level 1/4, sparsity 54.00%`."""
    if level == 0:
        return "dense model"
    return f"level {level}/{len(recipe.densities)}, sparsity {1 - recipe.densities[level - 1]:.2%}"


def task_label(item: PendingFinetune) -> str:
    """A fine-tuning's label for the user while it runs."""
    candidate = item.winner.candidate
    if candidate.level == 0:
        return "dense" if item.lineage == DENSE else "dense distillation"
    return BASELINE if item.lineage == IMP else f"{RAYMASK} ({candidate.name})"
