"""The method, level by level: draw masks, evaluate early, select, fine-tune."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from raymask.core import seeds
from raymask.core.lineage import DENSE, IMP, SEARCH, branch, branches
from raymask.core.protocols import Callback, Evaluate, FineTune
from raymask.core.recipe import (
    Recipe,
    dense_config,
    dense_distillation_config,
    deterministic_candidate,
    finetune_config,
    has_baseline,
    propose_candidates,
)
from raymask.core.records import Result
from raymask.core.seeds import derive
from raymask.core.spec import Spec
from raymask.core.successive_halving import SuccessiveHalving, num_evaluations
from raymask.core.tasks import FinetuneTask, Snapshot
from raymask.core.tensors import PackedTensors
from raymask.driver.branches import is_done, parent_branches, read_parent, require_same_data
from raymask.driver.result import build_result
from raymask.driver.setup import SearchSetup, apply_dry_run, load_initial, prepare, require_distinct_splits
from raymask.driver.tasks import PendingFinetune, Selection, describe_level, level_label, single, task_label
from raymask.report.writer import report_updates
from raymask.runs.run_dir import RunDir, check_run, open_run
from raymask.train.context import WorkerContext


def search(
    spec: Spec, run: str | Path, callback: Callback, *, address: str | None = None, in_process: bool = False
) -> Result:
    """Search in a run directory, which is new or resumed.

    Args:
        spec: The spec.
        run: Path or URI of the run directory.
        callback: Receives progress and messages.
        address: Address of a Ray cluster; None starts a private Ray.
        in_process: Whether to work in this process, without Ray.

    Returns:
        The result; the stored one when the search has finished before.

    Raises:
        UserError: Anything that the user can fix; raised before any training where it can be known.
    """
    require_distinct_splits(spec.task)
    store = RunDir(run, callback.on_message)
    check_run(store, spec)
    result = store.read_result()
    if result and store.has_export():
        callback.on_message("was finished before: nothing is done again")
        return result
    setup = apply_dry_run(prepare(spec), callback.on_message)
    with (
        open_executor(setup.context, callback, address, in_process) as (evaluate, fine_tune, callback),
        open_run(store, spec),
    ):
        store.record_start(threads=spec.workers.threads, address=address, in_process=in_process)
        started = time.monotonic()
        with report_updates(callback, store) as callback:
            run_levels(setup, store, evaluate, fine_tune, callback)
            return build_result(setup, store, time.monotonic() - started)


@contextmanager
def open_executor(
    context: WorkerContext, callback: Callback, address: str | None, in_process: bool
) -> Iterator[tuple[Evaluate, FineTune, Callback]]:
    """Workers in this process or on Ray, for the block. Ray is imported only when it is used.

    Args:
        context: What every worker needs.
        callback: Receives progress and messages.
        address: Address of a Ray cluster; None starts a private Ray.
        in_process: Whether to work in this process, without Ray.

    Yields:
        The functions that evaluate candidates and fine-tune masks, and the callback to use; on Ray it also updates
        Prometheus metrics.

    Raises:
        UserError: There is no such cluster, or it cannot hold a worker.
    """
    executor: AbstractContextManager[tuple[Evaluate, FineTune]]
    if in_process:
        from raymask.executor import local_executor

        executor = local_executor.workers(context, callback)
    else:
        from raymask.executor import prometheus, ray_executor

        callback = prometheus.PrometheusCallback(callback, context)
        executor = ray_executor.workers(context, callback, address)
    with executor as (evaluate, fine_tune):
        yield evaluate, fine_tune, callback


def run_levels(setup: SearchSetup, store: RunDir, evaluate: Evaluate, fine_tune: FineTune, callback: Callback) -> None:
    """Train the dense model, then draw, evaluate early, select and fine-tune at each level. Skips what is done.

    Parents are read back from the run directory, so a resumed search does the same as an uninterrupted one.

    Args:
        setup: The search's setup.
        store: The run directory.
        evaluate: Runs early evaluations.
        fine_tune: Runs fine-tunings.
        callback: Receives progress.

    Raises:
        UserError: All candidates of a level failed, a fine-tuning failed, or the data or a parent have changed.
    """
    recipe = setup.recipe
    teacher = train_dense(setup, store, fine_tune, callback)
    for level in range(1, len(recipe.densities) + 1):
        # The list gets no name here, so that no parent stays in memory beyond its level.
        finetune_level(
            setup, store, pending_finetunes(recipe, store, level, teacher, evaluate, callback), fine_tune, callback
        )


def pending_finetunes(
    recipe: Recipe, store: RunDir, level: int, teacher: PackedTensors | None, evaluate: Evaluate, callback: Callback
) -> list[PendingFinetune]:
    """A level's fine-tunings that are still to be done, of the search and of the IMP baseline.

    Args:
        recipe: The recipe.
        store: The run directory.
        level: The level, from 1.
        teacher: The teacher's weights; None without distillation.
        evaluate: Runs the early evaluations that are missing.
        callback: Receives progress.

    Raises:
        UserError: A finished level was made from another parent, or all candidates failed.
    """
    pending = pending_branches(recipe, store, level, teacher, evaluate, callback)
    if has_baseline(recipe.spec) and not is_done(store, IMP, level):
        parent = read_parent(store, IMP, level, teacher)
        config = finetune_config(recipe, level, imp=True)
        pending.append(PendingFinetune(IMP, parent, config, single(deterministic_candidate(recipe, level))))
    return pending


def pending_branches(
    recipe: Recipe, store: RunDir, level: int, teacher: PackedTensors | None, evaluate: Evaluate, callback: Callback
) -> list[PendingFinetune]:
    """The search's fine-tunings at a level that are still to be done, one for each branch.

    The arguments and errors are those of `pending_finetunes`.
    """
    open_branches = [lineage for lineage in branches(recipe.spec) if not is_done(store, lineage, level)]
    if not open_branches:
        return []
    parents = {
        number: read_parent(store, branch(number), level, teacher) for number in parent_branches(recipe, store, level)
    }
    selection = evaluate_and_select(recipe, store, level, parents, evaluate, callback)
    config = finetune_config(recipe, level)
    done = [store.read_level(lineage, level) for lineage in branches(recipe.spec) if lineage not in open_branches]
    done_candidates = {record.winner.candidate for record in done}
    open_winners = [index for index, winner in enumerate(selection.winners) if winner.candidate not in done_candidates]
    return [
        PendingFinetune(lineage, parents[selection.winners[index].candidate.parent_branch], config, selection, index)
        for lineage, index in zip(open_branches, open_winners, strict=False)
    ]


def train_dense(setup: SearchSetup, store: RunDir, fine_tune: FineTune, callback: Callback) -> PackedTensors | None:
    """Fine-tune the dense model; with dense distillation, also train the parent of level 1. Skips what is done.

    Args:
        setup: The search's setup.
        store: The run directory.
        fine_tune: Runs fine-tunings.
        callback: Receives progress.

    Returns:
        The teacher's weights, which are the dense model's; None without distillation.

    Raises:
        UserError: A fine-tuning failed, or the data have changed since the dense model was trained.
    """
    spec, unmasked = setup.recipe.spec, single(deterministic_candidate(setup.recipe, 0))
    if not store.has_level(DENSE, 0):
        finetune_level(
            setup,
            store,
            [PendingFinetune(DENSE, load_initial(setup), dense_config(spec), unmasked)],
            fine_tune,
            callback,
        )
    require_same_data(setup, store)
    teacher = store.read_weights(DENSE, 0) if spec.uses_teacher else None
    distillation = dense_distillation_config(spec)
    if distillation and not store.has_level(SEARCH, 0):
        assert teacher is not None
        parent = Snapshot("teacher", teacher, None, teacher)
        finetune_level(setup, store, [PendingFinetune(SEARCH, parent, distillation, unmasked)], fine_tune, callback)
    return teacher


def evaluate_and_select(
    recipe: Recipe, store: RunDir, level: int, parents: Mapping[int, Snapshot], evaluate: Evaluate, callback: Callback
) -> Selection:
    """Evaluate a level's candidates early and select the winners. Evaluations in the journal are not repeated.

    A single candidate is selected without an evaluation. Evaluations that ended with a system failure are done again.

    Args:
        recipe: The recipe.
        store: The run directory; each evaluation is appended to the journal as it arrives.
        level: The level, from 1.
        parents: Parent snapshots by branch number.
        evaluate: Runs early evaluations.
        callback: Receives progress.

    Raises:
        UserError: All candidates failed.
    """
    proposed, rungs = propose_candidates(recipe, level, list(parents)), recipe.spec.early_eval.rungs
    if len(proposed) == 1:
        return single(proposed[0])
    known = [evaluation for evaluation in store.evaluations(level) if not evaluation.system_failure]
    seed = derive(recipe.spec.seed, seeds.CONFIDENCE, level)
    halving = SuccessiveHalving(proposed, rungs, known, repeats=recipe.spec.early_eval.repeats, seed=seed)
    total = num_evaluations(len(proposed) - len(parents), len(parents), rungs)
    callback.on_phase_begin(f"{level_label(recipe, level)}: early evaluation", level, total, known)
    for evaluation in halving.run(evaluate, parents):
        store.append(evaluation)
        callback.on_evaluation(evaluation)
    finalists = halving.finalists()
    winners = recipe.select(finalists, recipe.spec.select.keep)
    return Selection(winners, finalists, len(proposed), halving.num_failed())


def finetune_level(
    setup: SearchSetup, store: RunDir, pending: list[PendingFinetune], fine_tune: FineTune, callback: Callback
) -> None:
    """Fine-tune the pending masks of one level in parallel; each is saved with its record as it arrives.

    Args:
        setup: The search's setup.
        store: The run directory.
        pending: The level's pending fine-tunings; may be empty.
        fine_tune: Runs fine-tunings.
        callback: Receives progress.

    Raises:
        UserError: A fine-tuning failed.
    """
    if not pending:
        return
    level = pending[0].winner.candidate.level
    phase = "distillation" if level == 0 and pending[0].lineage == SEARCH else "fine-tuning"
    callback.on_phase_begin(f"{level_label(setup.recipe, level)}: {phase}", level, len(pending))
    finetune_tasks = [
        (item.parent, FinetuneTask(task_label(item), item.winner.candidate, item.config, item.winner.digest))
        for item in pending
    ]
    for index, checkpoint in fine_tune(finetune_tasks):
        item = pending[index]
        record = describe_level(setup, item, checkpoint)
        callback.on_level_end(item.lineage, store.write_level(item.lineage, level, checkpoint, record))
