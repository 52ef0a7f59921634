"""The worker: early evaluation and fine-tuning of candidates, in a Ray actor or in this process."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raymask.core import seeds
from raymask.core.errors import UserError
from raymask.core.masking import masks
from raymask.core.masking.samplers import SampleFn
from raymask.core.masking.scorers import DATA_FREE, Calibration
from raymask.core.recipe import early_eval_config, resolve
from raymask.core.records import Candidate, EvalPoint, Evaluation, FinetuneResult, TrainConfig
from raymask.core.seeds import derive
from raymask.core.spec import Score
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


class Worker:
    """One model on one device, reset to a snapshot for every task. Results do not depend on earlier tasks.

    With FSDP the processes of a group share the model. All of them run the same tasks, and rank 0 has the results.

    Args:
        context: The search's data and settings.
        device: The torch device, "cpu" or "cuda".
        tell: Called with the share in [0, 1] of the current task that is done.
        group: The processes that the model is sharded over, if it is.

    Attributes:
        module: The model, in evaluation mode between tasks.
        named_tensors: Its parameters and saved buffers by name.
        name: The worker's name in records.
        dense_predictions: The dense model's predictions for the scored rows, float32 [rows, columns]; None until
            needed.
    """

    def __init__(
        self,
        context: WorkerContext,
        device: str,
        tell: Callable[[float], None] = lambda share: None,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.context = context
        self.group = group
        self.recipe = resolve(context.spec)
        self.task_loss = TASK_LOSSES[context.data.kind]
        self.device = torch.device(device)
        if self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
        self.on_progress = tell
        self.mesh = fsdp.mesh(device, group.size) if group.sharded else None
        # no autocast for weights in bf16, or with FSDP, which converts the weights block by block
        without_autocast = context.spec.model.dtype == "bf16" or group.sharded
        self.autocast = nullcontext if without_autocast else autocast_factory(context.spec.precision, self.device)
        with isolated_torch_state(context.spec, self.device):
            self.module = self.new_module(context.config)
        if context.spec.gradient_checkpointing:
            checkpoint_activations(self.module, self.device)
        self.named_tensors = state_tensors(self.module)
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
                message = f"{type(error).__name__}: {error}"[:2000]
                evaluation = Evaluation(
                    candidate=eval_task.candidate, rung=eval_task.rung, repeat=eval_task.repeat, error=message
                )
        seconds = time.perf_counter() - start_time
        return evaluation.model_copy(update={"started": started, "seconds": seconds, "worker": self.name}), snapshot

    def _evaluate(
        self, parent: Snapshot, eval_task: EvalTask, paused: Snapshot | None
    ) -> tuple[Evaluation, Snapshot | None]:
        """Reset the model, draw the mask, train briefly, and score on `validation`; arguments as in `evaluate_task`.

        Raises:
            FloatingPointError: The loss on `validation` is not finite.
        """
        spec, data, candidate = self.context.spec, self.context.data, eval_task.candidate
        config = early_eval_config(spec)
        total = trainer.num_steps(config, len(data.train))
        rung_steps = [0, *(max(1, round(total * share)) for share in spec.early_eval.rungs)]
        if parent.teacher is not None and self.dense_predictions is None and self.task_loss.agreement:
            fsdp.copy_into_shards(parent.teacher, self.named_tensors)
            self.dense_predictions = self.predictions(self.scored, group=self.group)
        mask, bits = self.reset(parent, candidate)
        distance = masks.distance(bits, self.caches[parent.key, candidate.density].magnitude_mask[1])
        if paused is not None:
            fsdp.copy_into_shards(paused.weights, self.named_tensors)
        optimizer = self.optimizer(paused or parent)
        curve: list[EvalPoint] = []
        losses: list[Tensor] = []

        def on_eval(step: int) -> None:
            """Evaluate on the scored rows."""
            point, row_losses = self.evaluate_model(step, self.scored, self.dense_predictions, self.group)
            if not np.isfinite(point.loss):
                raise FloatingPointError(f"the loss on validation is {point.loss} after {step} steps")
            curve.append(point)
            losses.append(row_losses)

        seed = derive(spec.seed, seeds.EARLY_EVAL, candidate.level, *([eval_task.repeat] if eval_task.repeat else []))
        for rung in range(eval_task.rung if paused else 0, eval_task.rung + 1):
            begin, end = rung_steps[rung : rung + 2]
            all_eval_steps = range(spec.early_eval.eval_steps, end + 1, spec.early_eval.eval_steps)
            eval_steps = (
                [step for step in all_eval_steps if step > begin][-spec.early_eval.score_window :]
                if rung == eval_task.rung
                else []
            )
            self.train(
                parent,
                config,
                mask,
                seed,
                eval_steps,
                on_eval,
                optimizer,
                steps=(begin, end),
                shared=True,
                group=self.group,
            )
        if not curve:
            on_eval(end)
        snapshot = None
        if end < total:
            state = optim.optimizer_state(self.module, optimizer)
            weights, moments = self.gather_full(self.named_tensors), self.gather_full(state)
            if weights and moments:
                snapshot = Snapshot(f"{parent.key}: {candidate.name} after {end} steps", weights, moments)
        evaluation = Evaluation(
            candidate=candidate,
            rung=eval_task.rung,
            repeat=eval_task.repeat,
            score=float(np.mean([eval_scores(point)[spec.early_eval.score] for point in curve])),
            curve=tuple(curve),
            row_losses=torch.stack(losses).mean(0).numpy().tobytes(),
            distance=distance,
            digest=masks.digest(bits),
        )
        return evaluation, snapshot

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
        """`finetune_task` in a connected group."""
        started, start_time = time.time(), time.perf_counter()
        name, *helpers = (self.name,) if group.sharded else group.all_gather_names(self.name, self.device)
        spec, data, config = self.context.spec, self.context.data, finetune_task.config
        candidate = finetune_task.candidate
        mask, bits = self.reset(parent, candidate)
        digest = masks.digest(bits)
        if finetune_task.digest is not None and digest != finetune_task.digest:
            raise UserError(
                f"{candidate.name} of level {candidate.level} drew mask {digest} here ({self.name}), but mask "
                f"{finetune_task.digest} was scored: the workers' devices or torch versions differ. Use workers of one "
                "kind"
            )
        total, epoch = trainer.num_steps(config, len(data.train)), trainer.steps_per_epoch(config, len(data.train))
        eval_steps = sorted({*range(epoch, total + 1, epoch), total})
        curve: list[EvalPoint] = []
        best: list[Any] = []  # sort key, index on the curve, weights, moments

        def on_eval(step: int) -> None:
            """Evaluate on `validation`, and keep the model if it is the best so far."""
            point, _ = self.evaluate_model(step, data.validation, None, group)
            curve.append(point)
            if np.isfinite(point.loss) and (not best or point.sort_key > best[0]):
                best[:] = [
                    point.sort_key,
                    len(curve) - 1,
                    pack(fsdp.local_tensors(self.named_tensors)),
                    pack(fsdp.local_tensors(moments())),
                ]

        def moments() -> dict[str, Tensor]:
            """The optimizer's state; empty without training."""
            return {} if optimizer is None else optim.optimizer_state(self.module, optimizer)

        optimizer = None
        if total == 0:
            on_eval(0)
        else:
            optimizer = self.optimizer(parent)
            seed = derive(spec.seed, seeds.FINETUNE, candidate.level)
            self.train(parent, config, mask, seed, eval_steps, on_eval, optimizer, group=group)
        if not best:
            raise UserError(
                f"level {candidate.level}: fine-tuning diverged, the loss on validation is {curve[-1].loss}. "
                "Lower finetune.learning_rate (dense.learning_rate at level 0) and start in a new run directory"
            )
        _, index, weights, state = best
        copy_into(weights, fsdp.local_tensors(self.named_tensors))
        if group.sharded:
            copy_into(state, fsdp.local_tensors(moments()))
            weights, state = self.gather_full(self.named_tensors), self.gather_full(moments())
        # without autocast, as the exported model computes
        logits = self.predictions(data.test, nullcontext, group)
        if group.rank > 0:
            return None
        return Checkpoint(
            weights=weights,
            optimizer=state,
            mask=bits,
            digest=digest,
            num_kept=masks.num_kept_bits(bits),
            num_prunable=sum(math.prod(shape) for _, _, shape, _ in bits.index.values()),
            finetune_result=FinetuneResult(
                curve=tuple(curve),
                best=index,
                started=started,
                seconds=time.perf_counter() - start_time,
                worker=name,
                helper_workers=tuple(helpers),
            ),
            test_outputs=logits.numpy(),
        )

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
        """
        if self.recipe.scorer in DATA_FREE:
            return {}
        data = self.context.data
        rows = data.train.sample(CALIBRATION_ROWS, derive(self.context.spec.seed, seeds.CALIBRATION))
        return calibrate(self.module, self.context.prunable, rows, padding=data.padding, objective=self.task_loss)

    def draw_mask(
        self,
        snapshot: Snapshot,
        candidate: Candidate,
        calibration: dict[str, Calibration],
        sampler_cache: dict[object, SampleFn] | None,
    ) -> DrawnMask:
        """Draw the candidate's mask on the model's weights, which must be the snapshot's."""
        live, transposed = (
            {name: self.named_tensors[name] for name in self.context.prunable},
            transposed_weights(self.module),
        )
        weights = snapshot.weights.views() if self.group.sharded else live
        recipe = self.recipe
        return fsdp.draw_sharded_mask(
            {name: weights[name].T if name in transposed else weights[name] for name in live},
            live,
            candidate,
            allocation=recipe.allocation,
            scorer=recipe.scorer,
            sampler=recipe.sampler,
            pattern=recipe.pattern,
            calibration=calibration,
            sampler_cache=sampler_cache,
            transposed=transposed,
        )

    def optimizer(self, snapshot: Snapshot) -> torch.optim.Optimizer:
        """The spec's optimizer with the snapshot's state; fresh if the snapshot has none."""
        state = snapshot.optimizer.views() if snapshot.optimizer else None
        return optim.make_optimizer(self.module, self.context.spec.optimizer, state)

    def train(
        self,
        snapshot: Snapshot,
        config: TrainConfig,
        mask: masks.Mask,
        seed: int,
        eval_steps: list[int],
        on_eval: Callable[[int], None],
        optimizer: torch.optim.Optimizer,
        *,
        steps: tuple[int, int] | None = None,
        shared: bool = False,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        """Train the model (`trainer.train`).

        Args:
            snapshot: Gives the teacher's weights; the model's own must be loaded already.
            config: The training.
            mask: Masks by parameter name, this rank's rows if the model is sharded; empty for dense training.
            seed: Fixes the order of rows and the dropout.
            eval_steps: The steps after which to evaluate.
            on_eval: Called with the step after each of these.
            optimizer: The optimizer.
            steps: (begin, end) to run only the steps after `begin`, up to `end`; None for all.
            shared: Other candidates train on the same batches, so the teacher's outputs are cached.
            group: The processes that train together.
        """
        first = steps[0] if steps else 0
        trainer.train(
            self.module,
            self.context.data.train,
            config,
            padding=self.context.data.padding,
            seed=seed,
            mask=mask,
            optimizer=optimizer,
            max_grad_norm=self.context.spec.optimizer.max_grad_norm,
            autocast=self.autocast,
            # no cache for a sharded teacher: all processes must run it equally often, and their caches may differ
            teacher=self.teacher_for(snapshot).start(seed, first, keep=shared and not group.sharded)
            if config.distill
            else None,
            objective=self.task_loss,
            steps=steps,
            group=group,
            eval_steps=frozenset(eval_steps),
            on_eval=on_eval,
            on_progress=self.on_progress,
        )

    def teacher_for(self, snapshot: Snapshot) -> Teacher:
        """The teacher with the snapshot's teacher weights; built once, since they are the same in the whole search."""
        assert snapshot.teacher is not None
        if self.teacher is None:
            info = self.context.teacher
            module = self.new_module(info.config if info else self.context.config).requires_grad_(False)
            fsdp.copy_into_shards(snapshot.teacher, state_tensors(module))
            self.teacher = Teacher(module)
        return self.teacher

    def predictions(
        self, rows: TokenizedSplit, autocast: trainer.Autocast | None = None, group: ProcessGroup = SINGLE_PROCESS
    ) -> Tensor:
        """The model's predictions (`trainer.predict`), float32 [rows, columns], by default in the worker's autocast."""
        return trainer.predict(
            self.module,
            rows,
            padding=self.context.data.padding,
            autocast=autocast or self.autocast,
            objective=self.task_loss,
            group=group,
        )

    def evaluate_model(
        self,
        step: int,
        rows: TokenizedSplit,
        dense_predictions: Tensor | None = None,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> tuple[EvalPoint, Tensor]:
        """Evaluate the model on rows of `validation`.

        Args:
            step: The optimizer steps so far.
            rows: The rows.
            dense_predictions: The dense model's predictions for the rows, float32 [rows, columns]; None to leave the
                agreement out.
            group: The processes that have this model.

        Returns:
            The point on the curve, and the loss of each row, float32 [rows]. The metric is 0 if a prediction is not
            finite.
        """
        predictions, agreement = self.predictions(rows, group=group), None
        losses = self.task_loss.losses(predictions, torch.from_numpy(rows.labels))
        loss = float(losses.double().mean())
        finite = bool(torch.isfinite(predictions).all())
        metric = (
            selection_metric(self.context.data.compute_metrics(predictions.numpy(), rows.labels)) if finite else 0.0
        )
        if dense_predictions is not None and finite and self.task_loss.agreement:
            agreement = self.task_loss.agreement(predictions, dense_predictions)
        return EvalPoint(step=step, loss=loss, metric=metric, agreement=agreement), losses


def eval_scores(point: EvalPoint) -> dict[Score, float]:
    """Scores of one evaluation by kind, larger is better; NaN for an unknown agreement."""
    return {
        "loss": -point.loss,
        "metric": point.metric,
        "agreement": math.nan if point.agreement is None else point.agreement,
    }
