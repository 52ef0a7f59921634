"""The worker: early evaluation and fine-tuning of candidates, in a Ray actor or in this process."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raymask.core import seeds
from raymask.core.errors import UserError
from raymask.core.masking import masks
from raymask.core.masking.samplers import SampleFn
from raymask.core.masking.scorers import DATA_FREE, NEEDS_INPUTS, Calibration
from raymask.core.recipe import early_eval_config, resolve
from raymask.core.records import Candidate, EvalPoint, Evaluation, FinetuneResult, TrainConfig
from raymask.core.seeds import derive
from raymask.core.spec import EarlyEval, Score
from raymask.core.tasks import Checkpoint, EvalTask, FinetuneTask, Snapshot
from raymask.core.tensors import PackedTensors, copy_into, pack
from raymask.data.metrics import selection_metric
from raymask.data.types import TokenizedSplit
from raymask.train import fsdp, optim, trainer
from raymask.train.calibration import CALIBRATION_ROWS, calibrate
from raymask.train.context import WorkerContext
from raymask.train.device import autocast_factory, computes_bf16, isolated_torch_state, worker_name
from raymask.train.failures import SystemFailure, classify_failures
from raymask.train.losses import TASK_LOSSES
from raymask.train.model import build_model, checkpoint_activations, state_tensors
from raymask.train.process_group import SINGLE_PROCESS, ProcessGroup
from raymask.train.prunable import transposed_weights
from raymask.train.teacher import Teacher

DrawnMask = tuple[masks.Mask, PackedTensors]
"""A mask, or this process's rows of it if the model is sharded, and the packed bits of the full mask."""


@dataclass(frozen=True)
class LevelCache:
    """What all candidates of one level and parent share; a worker computes it once.

    Attributes:
        calibration: Calibrations by weight name; empty for a scorer that needs none.
        magnitude_mask: The deterministic mask.
        sampler_cache: The samplers' intermediate results, filled by `masks.draw_mask`.
    """

    calibration: dict[str, Calibration]
    magnitude_mask: DrawnMask
    sampler_cache: dict[object, SampleFn]


@dataclass(frozen=True)
class BestEval:
    """The best evaluation of a fine-tuning.

    Attributes:
        sort_key: What it is compared by, larger is better.
        index: Its index among the evaluations.
        weights: The model's tensors at it; this rank's if the model is sharded.
        moments: The optimizer's state at it, likewise.
    """

    sort_key: tuple[float, float]
    index: int
    weights: PackedTensors
    moments: PackedTensors


class Worker:
    """One model on one device, reset to a snapshot for every task. Results do not depend on earlier tasks.

    With FSDP the processes of a group share the model. All of them run the same tasks, and rank 0 has the results.

    Args:
        context: The search's data and settings.
        device: The torch device, "cpu" or "cuda".
        on_progress: Called with the share in [0, 1] of the current task that is done.
        group: The processes that the model is sharded over, if it is.

    Attributes:
        module: The model, in evaluation mode between tasks.
        trainer: Trains it and predicts with it.
        named_tensors: Its parameters and saved buffers by name.
        name: The worker's name in records.
        dense_predictions: The dense model's predictions for the scored rows, float32 [rows, columns]; None until
            needed.
    """

    def __init__(
        self,
        context: WorkerContext,
        device: str,
        on_progress: Callable[[float], None] = lambda share: None,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.context = context
        self.group = group
        self.method = resolve(context.spec).method
        self.task_loss = TASK_LOSSES[context.data.kind]
        self.device = torch.device(device)
        if self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
        self.on_progress = on_progress
        self.mesh = fsdp.mesh(device, group.size) if group.sharded else None
        # no autocast for weights in bf16, or with FSDP, which converts the weights block by block
        without_autocast = context.spec.model.dtype == "bf16" or group.sharded
        autocast = nullcontext if without_autocast else autocast_factory(context.spec.precision, self.device)
        with isolated_torch_state(context.spec, self.device):
            self.module = self.new_module(context.config)
        if context.spec.gradient_checkpointing:
            checkpoint_activations(self.module, self.device)
        self.named_tensors = state_tensors(self.module)
        self.trainer = trainer.Trainer(
            self.module,
            self.task_loss,
            context.data.padding,
            context.spec.optimizer.max_grad_norm,
            autocast,
            lambda share: self.on_progress(share),
            group,
        )
        self.teacher: Teacher | None = None
        self.name = worker_name(self.device, context.spec)
        self.caches: dict[tuple[str, float], LevelCache] = {}  # by the parent's key and the density
        self.scored = context.scored_rows
        self.dense_predictions: Tensor | None = None

    def new_module(self, config: Any) -> torch.nn.Module:
        """A new model of this configuration on the device, sharded if the group is."""
        spec = self.context.spec
        config = copy.deepcopy(config)
        config.use_cache = False  # the cache is for text generation
        kind = self.context.data.kind
        with fsdp.init_empty_weights() if self.group.sharded else nullcontext():
            module = build_model(config, spec.model.trust_remote_code, kind=kind, show_attention=spec.distill)
        if self.mesh is not None:
            bf16 = spec.model.dtype == "fp32" and computes_bf16(spec.precision, self.device)
            fsdp.apply_fsdp(module, self.mesh, torch.bfloat16 if bf16 else None)
        return module.to(self.device).eval()

    def evaluate(
        self, parent: Snapshot, eval_task: EvalTask, paused: Snapshot | None = None
    ) -> tuple[Evaluation, Snapshot | None]:
        """Run a candidate's early evaluation up to a rung. A failure of the candidate is recorded, not raised.

        Args:
            parent: The snapshot that the candidate starts from.
            eval_task: The candidate, rung and repeat.
            paused: The candidate's snapshot at the rung below. Without it the evaluation runs from the parent, with the
                same result.

        Returns:
            The evaluation, and the candidate's snapshot at the rung. The snapshot is None after the last rung, after a
            failure, and on other ranks than 0.

        Raises:
            SystemFailure: The machine failed, or with FSDP any error that the other processes do not share.
        """
        started, start_time = time.time(), time.perf_counter()
        snapshot = None
        with isolated_torch_state(self.context.spec, self.device):
            try:
                with classify_failures():
                    evaluation, snapshot = self._evaluate(parent, eval_task, paused)
            except SystemFailure:
                raise
            except Exception as error:  # any error of a candidate is recorded, and the search continues
                if self.group.sharded and not isinstance(error, FloatingPointError):
                    # the other processes may not have failed, and would wait for this one
                    raise SystemFailure(f"{type(error).__name__}: {error}") from error
                evaluation = eval_task.failed(f"{type(error).__name__}: {error}"[:2000])
        seconds = time.perf_counter() - start_time
        return evaluation.model_copy(update={"started": started, "seconds": seconds, "worker": self.name}), snapshot

    def _evaluate(
        self, parent: Snapshot, eval_task: EvalTask, paused: Snapshot | None
    ) -> tuple[Evaluation, Snapshot | None]:
        """Reset the model, draw the mask, train briefly, and score on `validation`; arguments as in `evaluate`.

        Raises:
            FloatingPointError: The loss on `validation` is not finite.
        """
        candidate = eval_task.candidate
        self.remember_dense_predictions(parent)
        mask, bits = self.reset(parent, candidate)
        distance = masks.distance(bits, self.caches[parent.key, candidate.density].magnitude_mask[1])
        if paused is not None:
            fsdp.copy_into_shards(paused.weights, self.named_tensors)
        optimizer = self.optimizer(paused or parent)
        curve: list[EvalPoint] = []
        losses: list[Tensor] = []
        first_rung = eval_task.rung if paused else 0
        for step in self.train_to_rung(parent, eval_task, mask, optimizer, first_rung):
            point, row_losses = self.evaluate_model(self.trainer, step, self.scored, self.dense_predictions)
            if not np.isfinite(point.loss):
                raise FloatingPointError(f"the loss on validation is {point.loss} after {step} steps")
            curve.append(point)
            losses.append(row_losses)
        evaluation = Evaluation(
            candidate=candidate,
            rung=eval_task.rung,
            repeat=eval_task.repeat,
            score=float(np.mean([eval_scores(point)[self.context.spec.early_eval.score] for point in curve])),
            curve=tuple(curve),
            row_losses=torch.stack(losses).mean(0).numpy().tobytes(),
            distance=distance,
            digest=masks.digest(bits),
        )
        is_last = eval_task.rung == len(self.context.spec.early_eval.rungs) - 1
        return evaluation, None if is_last else self.pause(parent, eval_task, optimizer)

    def remember_dense_predictions(self, parent: Snapshot) -> None:
        """Compute the dense model's predictions for the scored rows, once, where a candidate's score may need them."""
        if parent.teacher is not None and self.dense_predictions is None and self.task_loss.agreement:
            fsdp.copy_into_shards(parent.teacher, self.named_tensors)
            self.dense_predictions = self.trainer.predict(self.scored)

    def train_to_rung(
        self,
        parent: Snapshot,
        eval_task: EvalTask,
        mask: masks.Mask,
        optimizer: torch.optim.Optimizer,
        first_rung: int,
    ) -> Iterator[int]:
        """Train a candidate, rung by rung, up to the rung of its evaluation.

        Args:
            parent: Gives the teacher's weights.
            eval_task: The candidate, rung and repeat.
            mask: Masks by parameter name, this rank's rows if the model is sharded.
            optimizer: The optimizer.
            first_rung: The rung that the training goes on to first, from 0.

        Yields:
            The steps at which to evaluate: those of the score's window, or the last step of the rung.
        """
        spec, train, candidate = self.context.spec, self.context.data.train, eval_task.candidate
        config = early_eval_config(spec)
        seed = derive(spec.seed, seeds.EARLY_EVAL, candidate.level, *([eval_task.repeat] if eval_task.repeat else []))
        rung_steps = steps_by_rung(trainer.num_steps(config, len(train)), spec.early_eval.rungs)
        for rung in range(first_rung, eval_task.rung + 1):
            begin, end = rung_steps[rung : rung + 2]
            yield from self.trainer.train(
                train,
                config,
                optimizer,
                mask,
                seed=seed,
                # other candidates train on the same batches
                teacher=self.teacher_outputs(parent, config, seed, begin, cache=True),
                steps=(begin, end),
                eval_steps=scored_steps(begin, end, spec.early_eval) if rung == eval_task.rung else (),
            )
        if begin == end:  # so short a training that the rung adds no step
            yield end

    def pause(self, parent: Snapshot, eval_task: EvalTask, optimizer: torch.optim.Optimizer) -> Snapshot | None:
        """The snapshot in which a candidate pauses at its rung; None on other ranks than 0."""
        state = optim.optimizer_state(self.module, optimizer)
        weights, moments = self.gather_full(self.named_tensors), self.gather_full(state)
        if not weights or not moments:
            return None
        return Snapshot(f"{parent.key}: {eval_task.candidate.name} at rung {eval_task.rung}", weights, moments)

    def finetune(
        self,
        parent: Snapshot,
        finetune_task: FinetuneTask,
        group_context: AbstractContextManager[ProcessGroup] | None = None,
    ) -> Checkpoint | None:
        """Fine-tune one mask from its parent, and keep the model with the best metric on `validation`.

        Args:
            parent: The snapshot that the fine-tuning starts from.
            finetune_task: The candidate, the training and the expected digest of the mask.
            group_context: Connects the processes that train together (data parallel); None to train in the worker's own
                group.

        Returns:
            The checkpoint; None on other ranks than 0.

        Raises:
            UserError: The mask is not the one that was evaluated, or the training diverged.
            SystemFailure: The machine failed.
        """
        with (
            isolated_torch_state(self.context.spec, self.device),
            classify_failures(),
            group_context or nullcontext(self.group) as group,
        ):
            return self._finetune(parent, finetune_task, group)

    def _finetune(self, parent: Snapshot, finetune_task: FinetuneTask, group: ProcessGroup) -> Checkpoint | None:
        """`finetune` in a connected group."""
        started, start_time = time.time(), time.perf_counter()
        name, *helpers = (self.name,) if group.sharded else group.all_gather_names(self.name, self.device)
        mask, bits = self.reset(parent, finetune_task.candidate)
        digest = masks.digest(bits)
        require_digest(finetune_task, digest, self.name)
        group_trainer = replace(self.trainer, group=group)
        curve, best = self.train_and_keep_best(parent, finetune_task, mask, group_trainer)
        test_outputs = group_trainer.without_autocast.predict(self.context.data.test)
        if group.rank > 0:
            return None
        return Checkpoint(
            weights=best.weights,
            optimizer=best.moments,
            mask=bits,
            digest=digest,
            num_kept=masks.num_kept_bits(bits),
            num_prunable=sum(math.prod(shape) for _, _, shape, _ in bits.index.values()),
            finetune_result=FinetuneResult(
                curve=tuple(curve),
                best=best.index,
                started=started,
                seconds=time.perf_counter() - start_time,
                worker=name,
                helper_workers=tuple(helpers),
            ),
            test_outputs=test_outputs.numpy(),
        )

    def train_and_keep_best(
        self, parent: Snapshot, finetune_task: FinetuneTask, mask: masks.Mask, group_trainer: trainer.Trainer
    ) -> tuple[list[EvalPoint], BestEval]:
        """Train with evaluations on `validation`, and leave the model as it was at the best of them.

        Args:
            parent: Gives the optimizer's state and the teacher's weights.
            finetune_task: The candidate and the training.
            mask: Masks by parameter name, this rank's rows if the model is sharded.
            group_trainer: Trains together with the other processes.

        Returns:
            The evaluations, and the best one with full tensors.

        Raises:
            UserError: The training diverged.
        """
        data, config, level = self.context.data, finetune_task.config, finetune_task.candidate.level
        total, epoch = trainer.num_steps(config, len(data.train)), trainer.steps_per_epoch(config, len(data.train))
        optimizer = self.optimizer(parent) if total else None
        steps: Iterable[int] = [0]
        if optimizer is not None:
            seed = derive(self.context.spec.seed, seeds.FINETUNE, level)
            teacher = self.teacher_outputs(parent, config, seed, 0, cache=False)
            eval_steps = {*range(epoch, total + 1, epoch), total}
            steps = group_trainer.train(
                data.train, config, optimizer, mask, seed=seed, teacher=teacher, eval_steps=eval_steps
            )
        curve: list[EvalPoint] = []
        best: BestEval | None = None
        for step in steps:
            point, _ = self.evaluate_model(group_trainer, step, data.validation)
            curve.append(point)
            if np.isfinite(point.loss) and (best is None or point.sort_key > best.sort_key):
                local = fsdp.local_tensors(self.named_tensors), fsdp.local_tensors(self.moments(optimizer))
                best = BestEval(point.sort_key, len(curve) - 1, *map(pack, local))
        if best is None:
            raise UserError(
                f"level {level}: fine-tuning diverged, the loss on validation is {curve[-1].loss}. "
                "Lower finetune.learning_rate (dense.learning_rate at level 0) and start in a new run directory"
            )
        copy_into(best.weights, fsdp.local_tensors(self.named_tensors))
        return curve, self.gather_best(best, optimizer) if self.group.sharded else best

    def gather_best(self, best: BestEval, optimizer: torch.optim.Optimizer | None) -> BestEval:
        """The best evaluation of a sharded model with full tensors, which rank 0 has; empty on other ranks."""
        copy_into(best.moments, fsdp.local_tensors(self.moments(optimizer)))
        weights, moments = self.gather_full(self.named_tensors), self.gather_full(self.moments(optimizer))
        return replace(best, weights=weights or pack({}), moments=moments or pack({}))

    def moments(self, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
        """The optimizer's state; empty without training."""
        return {} if optimizer is None else optim.optimizer_state(self.module, optimizer)

    def gather_full(self, tensors: dict[str, Tensor]) -> PackedTensors | None:
        """Full tensors, packed, on rank 0 and without a group; None on other ranks."""
        return fsdp.gather_full(tensors, here=self.group.rank == 0)

    def reset(self, snapshot: Snapshot, candidate: Candidate) -> DrawnMask:
        """Load a snapshot's weights into the model, and draw the candidate's mask on them.

        The mask is returned, not applied. It is empty for a density of 1.
        """
        fsdp.copy_into_shards(snapshot.weights, self.named_tensors)
        if candidate.density == 1.0:
            return {}, masks.pack_bits({})
        key = (snapshot.key, candidate.density)
        if key not in self.caches:
            # drop the caches of other levels
            self.caches = {other: cache for other, cache in self.caches.items() if other[1] == candidate.density}
            calibration = self.calibrate()
            magnitude_mask = self.draw_mask(snapshot, candidate.model_copy(update={"noise": None}), calibration, None)
            self.caches[key] = LevelCache(calibration, magnitude_mask, {})
        cache = self.caches[key]
        if candidate.is_magnitude:
            return cache.magnitude_mask
        # no sampler cache for a sharded model: it is as large as all weights together
        return self.draw_mask(
            snapshot, candidate, cache.calibration, None if self.group.sharded else cache.sampler_cache
        )

    def calibrate(self) -> dict[str, Calibration]:
        """Calibrations of the model's weights by name, from the same training rows every time.

        Empty for a scorer that needs none.

        Raises:
            UserError: The scorer needs the inputs of a weight whose layer is not called.
        """
        if self.method.scorer in DATA_FREE:
            return {}
        data = self.context.data
        rows = data.train.sample(CALIBRATION_ROWS, derive(self.context.spec.seed, seeds.CALIBRATION))
        prunable = self.context.model.prunable
        found = calibrate(self.module, prunable, rows, padding=data.padding, task_loss=self.task_loss)
        unseen = [name for name, calibration in found.items() if calibration.inputs is None]
        if unseen and self.method.scorer in NEEDS_INPUTS:
            raise UserError(
                f"mask.score: {self.context.spec.mask.score} needs the inputs of all weights, and {len(unseen)} have "
                f"none, such as {unseen[0]}, whose layer is never called or is a mixture of experts: leave them out "
                "with model.exclude, or use magnitude or saliency"
            )
        return found

    def draw_mask(
        self,
        snapshot: Snapshot,
        candidate: Candidate,
        calibration: dict[str, Calibration],
        sampler_cache: dict[object, SampleFn] | None,
    ) -> DrawnMask:
        """Draw the candidate's mask on the model's weights, which must be the snapshot's."""
        live, transposed = (
            {name: self.named_tensors[name] for name in self.context.model.prunable},
            transposed_weights(self.module),
        )
        weights = snapshot.weights.views() if self.group.sharded else live
        return fsdp.draw_sharded_mask(
            {name: weights[name].mT if name in transposed else weights[name] for name in live},
            live,
            candidate.density,
            seed=candidate.seed,
            noise=candidate.noise,
            method=self.method,
            calibration=calibration,
            sampler_cache=sampler_cache,
            transposed=transposed,
        )

    def optimizer(self, snapshot: Snapshot) -> torch.optim.Optimizer:
        """The spec's optimizer with the snapshot's state; fresh if the snapshot has none."""
        state = snapshot.optimizer.views() if snapshot.optimizer else None
        return optim.make_optimizer(self.module, self.context.spec.optimizer, state)

    def teacher_outputs(
        self, snapshot: Snapshot, config: TrainConfig, seed: int, first: int, *, cache: bool
    ) -> Teacher | None:
        """The teacher at the start of a training; None if it trains on the labels.

        Args:
            snapshot: Gives the teacher's weights.
            config: The training.
            seed: The seed of its batches.
            first: The index of its first batch.
            cache: Whether others train on the same batches, so that the outputs are worth caching.
        """
        if not config.distill:
            return None
        # no cache for a sharded teacher: all processes must run it equally often, and their caches may differ
        return self.teacher_for(snapshot).start(seed, first, cache=cache and not self.group.sharded)

    def teacher_for(self, snapshot: Snapshot) -> Teacher:
        """The teacher with the snapshot's teacher weights; built once, since they are the same in the whole search."""
        assert snapshot.teacher is not None
        if self.teacher is None:
            info = self.context.teacher
            module = self.new_module(info.config if info else self.context.config).requires_grad_(False)
            fsdp.copy_into_shards(snapshot.teacher, state_tensors(module))
            self.teacher = Teacher(module)
        return self.teacher

    def evaluate_model(
        self,
        group_trainer: trainer.Trainer,
        step: int,
        rows: TokenizedSplit,
        dense_predictions: Tensor | None = None,
    ) -> tuple[EvalPoint, Tensor]:
        """Evaluate the model on rows of `validation`.

        Args:
            group_trainer: Predicts, together with the other processes that have this model.
            step: The optimizer steps so far.
            rows: The rows.
            dense_predictions: The dense model's predictions for the rows, float32 [rows, columns]; None to leave the
                agreement out.

        Returns:
            The point on the curve, and the loss of each row, float32 [rows]. The metric is 0 if a prediction is not
            finite.
        """
        predictions, metric, agreement = group_trainer.predict(rows), 0.0, None
        losses = self.task_loss.losses(predictions, torch.from_numpy(rows.labels))
        if torch.isfinite(predictions).all():
            metric = selection_metric(self.context.data.compute_metrics(predictions.numpy(), rows.labels))
            if dense_predictions is not None and self.task_loss.agreement:
                agreement = self.task_loss.agreement(predictions, dense_predictions)
        loss = float(losses.double().mean())
        return EvalPoint(step=step, loss=loss, metric=metric, agreement=agreement), losses


def steps_by_rung(total: int, rungs: Sequence[float]) -> list[int]:
    """The optimizer steps at which an early evaluation of `total` steps begins, and at which each rung ends.

    Args:
        total: All optimizer steps of a full early evaluation.
        rungs: Shares of it in (0, 1], increasing.
    """
    return [0, *(max(1, round(total * share)) for share in rungs)]


def scored_steps(begin: int, end: int, early_eval: EarlyEval) -> Sequence[int]:
    """The steps of a rung whose evaluations count for the score.

    Args:
        begin: The step before the rung.
        end: The last step of the rung.
        early_eval: The spec's section.

    Returns:
        The last `score_window` multiples of `eval_steps`; `end` if there are none.
    """
    multiples = range(early_eval.eval_steps, end + 1, early_eval.eval_steps)
    return [step for step in multiples if step > begin][-early_eval.score_window :] or [end]


def require_digest(finetune_task: FinetuneTask, digest: str, worker: str) -> None:
    """Check that a mask is the one that was evaluated.

    Args:
        finetune_task: Gives the expected digest; None where the mask was not evaluated.
        digest: The mask's digest.
        worker: Name of this worker.

    Raises:
        UserError: It is another mask.
    """
    if finetune_task.digest not in (None, digest):
        candidate = finetune_task.candidate
        raise UserError(
            f"{candidate.name} of level {candidate.level} drew mask {digest} here ({worker}), but mask "
            f"{finetune_task.digest} was scored: the workers' devices or torch versions differ. Use workers of one "
            "kind"
        )


def eval_scores(point: EvalPoint) -> dict[Score, float]:
    """Scores of one evaluation by kind, larger is better; NaN for an unknown agreement."""
    return {
        "loss": -point.loss,
        "metric": point.metric,
        "agreement": math.nan if point.agreement is None else point.agreement,
    }
