"""The method, level by level: draw masks, evaluate early, select, fine-tune."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from raymask.core import seeds
from raymask.core.callbacks import Callback, CallbackList
from raymask.core.lineage import DENSE, IMP, SEARCH, branch, branches
from raymask.core.protocols import Executor
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
from raymask.core.successive_halving import SuccessiveHalving
from raymask.core.tasks import FinetuneTask, Snapshot
from raymask.core.tensors import PackedTensors
from raymask.driver import tasks
from raymask.driver.branches import is_done, parent_branches, read_parent, require_same_data
from raymask.driver.result import build_result
from raymask.driver.setup import SearchSetup, apply_dry_run, load_initial, prepare, require_distinct_splits
from raymask.driver.tasks import PendingFinetune, Selection
from raymask.executor.open import open_executor
from raymask.report.writer import ReportCallback
from raymask.runs.run_dir import RunDir, check_run, open_run, record_errors


def search(
    spec: Spec,
    run: str | Path,
    callbacks: Iterable[Callback] = (),
    *,
    address: str | None = None,
    in_process: bool = False,
) -> Result:
    """Search in a run directory, which is new or resumed.

    Args:
        spec: The spec.
        run: Path or URI of the run directory.
        callbacks: They get progress and messages.
        address: Address of a Ray cluster; None starts a private Ray.
        in_process: Whether to work in this process, without Ray.

    Returns:
        The result; the stored one when the search has finished before.

    Raises:
        UserError: Anything that the user can fix; raised before any training where it can be known.
    """
    require_distinct_splits(spec.task)
    callback = CallbackList(callbacks)
    run_dir = RunDir(run, callback.on_message, "--run")
    check_run(run_dir, spec)
    setup = prepare(spec)
    result = run_dir.read_result()
    if result and run_dir.has_export() and run_dir.has_level(DENSE, 0):
        require_same_data(setup, run_dir)
        callback.on_message("was finished before: nothing is done again")
        return result
    setup = apply_dry_run(setup, callback.on_message)
    report = ReportCallback(run_dir)
    callback.callbacks.append(report)
    with open_executor(setup.context, callback, address, in_process) as executor, open_run(run_dir, spec):
        run_dir.record_start(threads=spec.workers.threads, address=address, in_process=in_process)
        started = time.monotonic()
        with report, record_errors(run_dir):
            LevelLoop(setup, run_dir, executor, callback).run()
            return build_result(setup, run_dir, time.monotonic() - started)


@dataclass(frozen=True)
class LevelLoop:
    """The search's levels, one after the other. What is done is skipped.

    Parents are read back from the run directory, so a resumed search does the same as an uninterrupted one.

    Attributes:
        setup: The search's setup.
        run_dir: The run directory.
        executor: Runs early evaluations and fine-tunings.
        callback: Receives progress.
    """

    setup: SearchSetup
    run_dir: RunDir
    executor: Executor
    callback: Callback

    @property
    def recipe(self) -> Recipe:
        """What was asked, resolved to functions."""
        return self.setup.recipe

    def run(self) -> None:
        """Train the dense model, then draw, evaluate early, select and fine-tune at each level.

        Raises:
            UserError: All candidates of a level failed, a fine-tuning failed, or the data or a parent have changed.
        """
        teacher = self.train_dense()
        for level in range(1, len(self.recipe.densities) + 1):
            # The lists get no names here, so that no parent stays in memory beyond its level.
            self.finetune([*self.select_masks(level, teacher), *self.imp_mask(level, teacher)])

    def train_dense(self) -> PackedTensors | None:
        """Fine-tune the dense model; with dense distillation, also train the parent of level 1.

        Returns:
            The teacher's weights, which are the dense model's; None without distillation.

        Raises:
            UserError: A fine-tuning failed, or the data have changed since the dense model was trained.
        """
        spec, unmasked = self.recipe.spec, tasks.single(deterministic_candidate(self.recipe, 0))
        if not self.run_dir.has_level(DENSE, 0):
            self.finetune([PendingFinetune(DENSE, load_initial(self.setup), dense_config(spec), unmasked)])
        require_same_data(self.setup, self.run_dir)
        teacher = self.run_dir.read_weights(DENSE, 0) if spec.uses_teacher else None
        distillation = dense_distillation_config(spec)
        if distillation and not self.run_dir.has_level(SEARCH, 0):
            assert teacher is not None
            parent = Snapshot("teacher", teacher, None, teacher)
            self.finetune([PendingFinetune(SEARCH, parent, distillation, unmasked)])
        return teacher

    def select_masks(self, level: int, teacher: PackedTensors | None) -> list[PendingFinetune]:
        """The search's fine-tunings at a level that are still to be done, one for each branch.

        Args:
            level: The level, from 1.
            teacher: The teacher's weights; None without distillation.

        Raises:
            UserError: A finished level was made from another parent, or all candidates failed.
        """
        recipe, run_dir = self.recipe, self.run_dir
        open_branches = [lineage for lineage in branches(recipe.spec) if not is_done(run_dir, lineage, level)]
        if not open_branches:
            return []
        parents = {
            number: read_parent(run_dir, branch(number), level, teacher)
            for number in parent_branches(recipe, run_dir, level)
        }
        selection = self.evaluate_and_select(level, parents)
        done = [run_dir.read_level(lineage, level) for lineage in branches(recipe.spec) if lineage not in open_branches]
        return tasks.pending_branches(open_branches, selection, parents, finetune_config(recipe, level), done)

    def imp_mask(self, level: int, teacher: PackedTensors | None) -> list[PendingFinetune]:
        """The IMP baseline's fine-tuning at a level, if it is still to be done. Arguments as in `select_masks`."""
        if not has_baseline(self.recipe.spec) or is_done(self.run_dir, IMP, level):
            return []
        parent = read_parent(self.run_dir, IMP, level, teacher)
        config = finetune_config(self.recipe, level, imp=True)
        return [PendingFinetune(IMP, parent, config, tasks.single(deterministic_candidate(self.recipe, level)))]

    def evaluate_and_select(self, level: int, parents: Mapping[int, Snapshot]) -> Selection:
        """Evaluate a level's candidates early and select the winners. Evaluations in the journal are not repeated.

        A single candidate is selected without an evaluation. Evaluations that ended with a system failure are done
        again.

        Args:
            level: The level, from 1.
            parents: Parent snapshots by branch number.

        Raises:
            UserError: All candidates failed.
        """
        spec, proposed = self.recipe.spec, propose_candidates(self.recipe, level, list(parents))
        if len(proposed) == 1:
            return tasks.single(proposed[0])
        known = [evaluation for evaluation in self.run_dir.evaluations(level) if not evaluation.system_failure]
        seed, early_eval = derive(spec.seed, seeds.CONFIDENCE, level), spec.early_eval
        halving = SuccessiveHalving(proposed, early_eval.rungs, known, repeats=early_eval.repeats, seed=seed)
        phase = f"{tasks.level_label(self.recipe, level)}: early evaluation"
        self.callback.on_phase_begin(phase, level, halving.num_planned, known)
        while eval_tasks := halving.ask():
            evaluation = self.executor.evaluate(parents, eval_tasks)
            self.run_dir.append(evaluation)
            halving.tell(evaluation)
            self.callback.on_evaluation(evaluation)
        self.executor.cancel()  # speculative evaluations may still run
        finalists = halving.finalists()
        winners = self.recipe.select(finalists, spec.select.keep)
        return Selection(winners, finalists, len(proposed), halving.num_failed())

    def finetune(self, pending: list[PendingFinetune]) -> None:
        """Fine-tune the pending masks of one level in parallel; each is saved with its record as it arrives.

        Args:
            pending: The level's pending fine-tunings; may be empty.

        Raises:
            UserError: A fine-tuning failed.
        """
        if not pending:
            return
        level = pending[0].winner.candidate.level
        phase = "distillation" if level == 0 and pending[0].lineage == SEARCH else "fine-tuning"
        self.callback.on_phase_begin(f"{tasks.level_label(self.recipe, level)}: {phase}", level, len(pending))
        finetune_tasks = [
            (item.parent, FinetuneTask(tasks.task_label(item), item.winner.candidate, item.config, item.winner.digest))
            for item in pending
        ]
        for index, checkpoint in self.executor.finetune(finetune_tasks):
            item = pending[index]
            record = tasks.describe_level(self.setup, item, checkpoint)
            self.callback.on_level_end(item.lineage, self.run_dir.write_level(item.lineage, level, checkpoint, record))
