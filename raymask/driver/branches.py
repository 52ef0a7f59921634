"""Branches of a search: which parent a level has, and which levels are done."""

from __future__ import annotations

from raymask.core.errors import UserError
from raymask.core.lineage import DENSE, IMP, SEARCH, branch, branches
from raymask.core.recipe import Recipe
from raymask.core.tasks import Snapshot
from raymask.core.tensors import PackedTensors
from raymask.driver.setup import SearchSetup
from raymask.runs.run_dir import MODEL, RunDir


def parent_branches(recipe: Recipe, run_dir: RunDir, level: int) -> list[int]:
    """The branches of the previous level from which a level's candidates are drawn.

    Args:
        recipe: The recipe.
        run_dir: The run directory; the previous level must be done.
        level: The level, from 1.

    Returns:
        Branch numbers from 1: with a beam all branches of the previous level, else the best one.
    """
    if level == 1:
        return [1]
    if not recipe.spec.select.beam:
        return [best_branch(recipe, run_dir, level - 1)]
    return done_branches(recipe, run_dir, level - 1)


def done_branches(recipe: Recipe, run_dir: RunDir, level: int) -> list[int]:
    """The numbers of the branches, from 1, whose `level` is done."""
    return [n for n, lineage in enumerate(branches(recipe.spec), 1) if run_dir.has_level(lineage, level)]


def best_branch(recipe: Recipe, run_dir: RunDir, level: int) -> int:
    """The number of the branch that is best on `validation` after fine-tuning.

    On a tie the lower number wins: branches are in the order of their early scores.
    """
    # `max` returns the first of equal branches.
    return max(
        done_branches(recipe, run_dir, level),
        key=lambda number: run_dir.read_level(branch(number), level).finetune_result.best_eval.sort_key,
    )


def is_done(run_dir: RunDir, lineage: str, level: int) -> bool:
    """Whether a level of a lineage is done.

    Raises:
        UserError: The level was made from another parent than the one that is there now.
    """
    has_level = run_dir.has_level(lineage, level)
    if has_level:
        require_parent(run_dir, lineage, level)
    return has_level


def read_parent(run_dir: RunDir, lineage: str, level: int, teacher: PackedTensors | None) -> Snapshot:
    """The snapshot that a level starts from.

    Args:
        run_dir: The run directory.
        lineage: The lineage whose previous level is the parent.
        level: The level, from 1; the parent of level 1 is the dense model.
        teacher: The teacher's weights; None without distillation.
    """
    parent_lineage, key = parent_key(run_dir, lineage, level)
    return Snapshot(
        key, run_dir.read_weights(parent_lineage, level - 1), run_dir.read_optimizer(parent_lineage, level - 1), teacher
    )


def parent_key(run_dir: RunDir, lineage: str, level: int) -> tuple[str, str]:
    """Lineage and snapshot key of a level's parent.

    Args:
        run_dir: The run directory; the previous level must be done.
        lineage: The lineage whose previous level is the parent.
        level: The level, from 1.

    Returns:
        The parent's lineage, and its key: lineage, level and the first 16 digits of the weights' SHA-256.
    """
    parent_lineage = lineage if level > 1 else SEARCH if run_dir.has_level(SEARCH, 0) else DENSE
    weights_hash = run_dir.read_level(parent_lineage, level - 1).files[MODEL]
    return parent_lineage, f"{parent_lineage or 'search'}-{level - 1}-{weights_hash[:16]}"


def require_parent(run_dir: RunDir, lineage: str, level: int) -> None:
    """Check that a finished level was made from the parent that is there now.

    Raises:
        UserError: It was made from another one.
    """
    record = run_dir.read_level(lineage, level)
    parent_lineage = lineage if lineage == IMP else branch(record.winner.candidate.parent_branch)
    if record.parent_key != parent_key(run_dir, parent_lineage, level)[1]:
        raise UserError(
            f"{run_dir.level_uri(lineage, level)}: was made from another parent than the level before it. Delete it to "
            "do the level again"
        )


def require_same_data(setup: SearchSetup, run_dir: RunDir) -> None:
    """Check that the data have not changed since the dense model was trained.

    Raises:
        UserError: They have changed.
    """
    if run_dir.read_level(DENSE, 0).data_fingerprint != setup.context.data.fingerprint():
        raise UserError(
            f"{run_dir.uri}: was started on other data: files, tokenizer or labels have changed since. "
            "Put them back, or choose another directory with --run"
        )
