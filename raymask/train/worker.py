"""What does one worker do, in a Ray actor or in this process?"""

from __future__ import annotations

import copy
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from raymask.core import masks, seeds
from raymask.core.errors import UserError
from raymask.core.recipe import parents_of, probe_stage, resolve
from raymask.core.records import Candidate, Checkpoint, Climb, Evaluation, FineTuned, Point, Settling, Snapshot, Stage
from raymask.core.samplers import Draw
from raymask.core.scorers import BLIND, SCORERS, Calibration
from raymask.core.seeds import derive
from raymask.core.spec import Score, Spec
from raymask.core.tensors import Packed, load, pack
from raymask.train import loop, sharding
from raymask.train.calibration import ROWS, calibrate
from raymask.train.data import Data, Rows
from raymask.train.gang import ALONE, Gang
from raymask.train.metrics import measure, overall
from raymask.train.model import (
    DTYPES,
    Source,
    build,
    checkpoint_activations,
    persistent,
    turned,
    vocabulary,
)
from raymask.train.objectives import OBJECTIVES
from raymask.train.teacher import Teacher
from raymask.train.teacher import memory as teacher_memory


class MachineFault(Exception):  # noqa: N818 - a fault is what it is called everywhere
    """Says nothing about a candidate: no memory, or a broken device. Another worker may well do the same work."""


SYMPTOMS = ("can't allocate memory", "not enough memory", "CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "/gloo/")
"""By which torch's plain RuntimeErrors give a machine's fault away; after one, a CUDA process is of no more use."""


@dataclass(frozen=True)
class Job:
    """What every worker of a search is told once: all but the weights, of which there are `parameters`.

    `teacher`: what fine-tunings are distilled from where it is no dense model of this shape: one of the same width and
    heads, with as many layers or a multiple.
    """

    spec: Spec
    config: Any
    data: Data
    prunable: tuple[str, ...]
    parameters: int
    teacher: Source | None = None

    @property
    def scored(self) -> Rows:
        """The rows of `select` by which candidates are scored."""
        return self.data.select.sample(self.spec.probe.rows, derive(self.spec.seed, seeds.SCORED_ROWS))

    @property
    def model_bytes(self) -> int:
        """Of the weights of one model."""
        return DTYPES[self.spec.model.dtype].itemsize * self.parameters

    @property
    def teacher_bytes(self) -> int:
        """Of the weights of a teacher, if there is one."""
        count = self.teacher.sizes.whole if self.teacher else self.parameters
        return DTYPES[self.spec.model.dtype].itemsize * count

    @property
    def moment_bytes(self) -> int:
        """Of what the optimizer keeps, about: of Adafactor's, next to none."""
        return 2 * self.model_bytes if self.spec.optimizer.name == "adamw" else 0

    def memory(self, *, on_gpu: bool) -> int:
        """Bytes of the machine's memory that one worker needs, about.

        Everywhere Python, torch, and what comes and goes: the best weights and moments, packed. On a CPU also weights,
        gradients, masks, moments, a calibration, a teacher with what is kept of its answers, and as much again for
        activations, which is a quarter with checkpointing; where a model has outputs for every token and word, those of
        a batch, and what is computed of them.
        """
        calibrated = SCORERS[self.spec.mask.score] not in BLIND
        passing = self.model_bytes + self.moment_bytes
        living = 3 * self.model_bytes + self.moment_bytes + 4 * calibrated * self.parameters
        living += self.teacher_bytes * self.spec.distill
        if on_gpu:
            return 2**30 * 3 + passing
        rows = int(self.spec.probe.epochs * len(self.data.train))
        words = vocabulary(self.config) if OBJECTIVES[self.data.kind].per_token else 0
        answers = teacher_memory(rows, self.data.train.lengths, self.config, words) if self.spec.distill else 0
        activations = (passing + living) // (4 if self.spec.checkpointing else 1)
        batch = max(stage.batch_size for stage in (self.spec.dense, self.spec.probe, self.spec.finetune))
        outputs = (4 + 2 * self.spec.distill) * 4 * words * batch * int(self.data.train.lengths.max())
        return 2**29 + passing + living + activations + answers + outputs

    @property
    def shared_memory(self) -> int:
        """Bytes of the object store, about: all lineages' weights and moments, out and back, a teacher, and the
        candidates that pause at a rung."""
        lineages, pausing = self.spec.select.keep + 1, len(self.spec.probe.rungs) > 1
        paused = parents_of(self.spec, 2) * (self.spec.candidates.count + 1) * pausing
        return (2 * lineages + paused) * (self.model_bytes + self.moment_bytes) + self.teacher_bytes


Drawn = tuple[masks.Mask, Packed]
"""A mask, or this process's rows of it, and the packed bits of the whole one."""


@dataclass(frozen=True)
class Shared:
    """What all candidates of one level and parent have in common: computed once a worker."""

    calibration: dict[str, Calibration]
    control: Drawn
    prepared: dict[object, Draw]


class Worker:
    """A model of the job's shape that is reset for every piece of work; nothing else carries over.

    `tell` gets the share in [0, 1] of the present work that is done. `gang`: on whose devices the model lies, when it
    is too big for one; all its processes are told the same, and the first one has the results.
    """

    def __init__(
        self, job: Job, device: str, tell: Callable[[float], None] = lambda share: None, gang: Gang = ALONE
    ) -> None:
        self.job = job
        self.gang = gang
        self.recipe = resolve(job.spec)
        self.objective = OBJECTIVES[job.data.kind]
        self.device = torch.device(device)
        if self.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic cuBLAS asks for
        self.tell = tell
        self.mesh = sharding.mesh(device, gang.size) if gang.cut else None
        # what is multiplied is in bf16 already, without autocast, or becomes it block by block
        unaided = job.spec.model.dtype == "bf16" or gang.cut
        self.autocast = nullcontext if unaided else autocasting(job.spec.precision, self.device)
        with isolated(job.spec, self.device):
            self.module = self.new_module(job.config)
        if job.spec.checkpointing:
            checkpoint_activations(self.module, self.device)
        self.live = persistent(self.module)
        self.teacher: Teacher | None = None
        self.name = describe(self.device, job.spec)
        self.shared: dict[tuple[str, float], Shared] = {}  # by parent and density
        self.scored = job.scored
        self.standard: Tensor | None = None  # the dense model's answers for the rows that are scored

    def new_module(self, config: Any) -> torch.nn.Module:
        spec = self.job.spec
        config = copy.deepcopy(config)
        config.use_cache = False  # nobody generates here
        kind = self.job.data.kind
        with sharding.without_parameters() if self.gang.cut else nullcontext():
            module = build(config, spec.model.trust_remote_code, kind=kind, show_attention=spec.distill)
        if self.mesh is not None:
            lower = spec.model.dtype == "fp32" and computes_bf16(spec.precision, self.device)
            sharding.shard(module, self.mesh, torch.bfloat16 if lower else None)
        return module.to(self.device).eval()

    def probe(
        self, parent: Snapshot, climb: Climb, paused: Snapshot | None = None
    ) -> tuple[Evaluation, Snapshot | None]:
        """Early evaluation of one candidate to a rung, and where it paused when there are rungs above.

        `paused`: where it did on the rung below; without it, all the way from the parent, with the same result. The
        candidate's own failure is a record; the machine's is raised as MachineFault.
        """
        started, began = time.time(), time.perf_counter()
        pause = None
        with isolated(self.job.spec, self.device):
            try:
                with faults_told_apart():
                    found, pause = self.evaluate(parent, climb, paused)
            except MachineFault:
                raise
            except Exception as error:  # whatever a candidate dies of is on record; the search goes on
                if self.gang.cut and not isinstance(error, FloatingPointError):
                    raise MachineFault(f"{type(error).__name__}: {error}") from error  # the others may wait in vain
                problem = f"{type(error).__name__}: {error}"[:2000]
                found = Evaluation(candidate=climb.candidate, rung=climb.rung, order=climb.order, error=problem)
        seconds = time.perf_counter() - began
        return found.model_copy(update={"started": started, "seconds": seconds, "worker": self.name}), pause

    def evaluate(self, parent: Snapshot, climb: Climb, paused: Snapshot | None) -> tuple[Evaluation, Snapshot | None]:
        """Reset, draw, train briefly, and score on `select`."""
        spec, data, candidate = self.job.spec, self.job.data, climb.candidate
        stage = probe_stage(spec)
        total = loop.steps_in(stage, len(data.train))
        ends = [0, *(max(1, round(total * share)) for share in spec.probe.rungs)]
        if parent.teacher is not None and self.standard is None and self.objective.agreement:
            sharding.load(parent.teacher, self.live)
            self.standard = self.answers(self.scored, gang=self.gang)
        mask, bits = self.reset(parent, candidate)
        stray = masks.distance(bits, self.shared[parent.key, candidate.density].control[1])
        if paused is not None:
            sharding.load(paused.weights, self.live)
        optimizer = self.optimizer(paused or parent)
        curve: list[Point] = []
        losses: list[Tensor] = []

        def look(step: int) -> None:
            point, rows = self.look(step, self.scored, self.standard, self.gang)
            if not np.isfinite(point.loss):
                raise FloatingPointError(f"the loss on select is {point.loss} after {step} steps")
            curve.append(point)
            losses.append(rows)

        seed = derive(spec.seed, seeds.EARLY_EVAL, candidate.level, *([climb.order] if climb.order else []))
        for rung in range(climb.rung if paused else 0, climb.rung + 1):
            begin, end = ends[rung : rung + 2]
            whole = range(spec.probe.eval_every, end + 1, spec.probe.eval_every)
            looks = [step for step in whole if step > begin][-spec.probe.last :] if rung == climb.rung else []
            steps = (begin, end)
            self.train(parent, stage, mask, seed, looks, look, optimizer, steps=steps, shared=True, gang=self.gang)
        if not curve:
            look(end)
        pause = None
        if end < total:
            state = loop.optimizer_state(self.module, optimizer)
            weights, moments = self.gathered(self.live), self.gathered(state)
            if weights and moments:
                pause = Snapshot(f"{parent.key}: {candidate.name} after {end} steps", weights, moments)
        evaluation = Evaluation(
            candidate=candidate,
            rung=climb.rung,
            order=climb.order,
            score=float(np.mean([scores(point)[spec.probe.score] for point in curve])),
            curve=tuple(curve),
            row_losses=torch.stack(losses).mean(0).numpy().tobytes(),
            distance=stray,
            digest=masks.digest(bits),
        )
        return evaluation, pause

    def settle(
        self, parent: Snapshot, settling: Settling, gathered: AbstractContextManager[Gang] | None = None
    ) -> Checkpoint | None:
        """Fine-tune one mask from its parent, alone or in a gang; the look with the best metric on `select` is kept.

        Only a gang's first member returns a checkpoint. Raises UserError when the mask is not the one that was scored,
        or when the training diverged, and MachineFault.
        """
        with isolated(self.job.spec, self.device), faults_told_apart(), gathered or nullcontext(self.gang) as gang:
            return self.fine_tune(parent, settling, gang)

    def fine_tune(self, parent: Snapshot, settling: Settling, gang: Gang) -> Checkpoint | None:
        started, began = time.time(), time.perf_counter()
        name, *helpers = (self.name,) if gang.cut else gang.names(self.name, self.device)
        spec, data, stage = self.job.spec, self.job.data, settling.stage
        mask, bits = self.reset(parent, settling.candidate)
        digest = masks.digest(bits)
        if settling.digest is not None and digest != settling.digest:
            raise UserError(
                f"{settling.candidate.name} of level {settling.candidate.level} drew mask {digest} here ({self.name}), "
                f"but mask {settling.digest} was scored: the workers' devices or torch versions differ. Use workers of "
                "one kind"
            )
        total, epoch = loop.steps_in(stage, len(data.train)), loop.per_epoch(stage, len(data.train))
        looks = sorted({*range(epoch, total + 1, epoch), total})
        curve: list[Point] = []
        best: list[Any] = []

        def look(step: int) -> None:
            point, _ = self.look(step, data.select, None, gang)
            curve.append(point)
            if np.isfinite(point.loss) and (not best or point.rank > best[0]):
                best[:] = [point.rank, len(curve) - 1, pack(sharding.parts(self.live)), pack(sharding.parts(moments()))]

        def moments() -> dict[str, Tensor]:
            return {} if optimizer is None else loop.optimizer_state(self.module, optimizer)

        optimizer = None
        if total == 0:
            look(0)
        else:
            optimizer = self.optimizer(parent)
            seed = derive(spec.seed, seeds.FINETUNE, settling.candidate.level)
            self.train(parent, stage, mask, seed, looks, look, optimizer, gang=gang)
        if not best:
            raise UserError(
                f"level {settling.candidate.level}: fine-tuning diverged, the loss on select is {curve[-1].loss}. "
                "Lower finetune.learning_rate (dense.learning_rate at level 0) and start in a new run directory"
            )
        _, index, weights, state = best
        load(weights, sharding.parts(self.live))
        if gang.cut:
            load(state, sharding.parts(moments()))
            weights, state = self.gathered(self.live), self.gathered(moments())
        # without autocast, as whoever loads the export will
        logits = self.answers(data.report, nullcontext, gang)
        if gang.rank > 0:
            return None
        return Checkpoint(
            weights=weights,
            optimizer=state,
            mask=bits,
            digest=digest,
            kept=masks.kept(bits),
            total=sum(math.prod(shape) for _, _, shape, _ in bits.index.values()),
            finetuned=FineTuned(
                curve=tuple(curve),
                best=index,
                started=started,
                seconds=time.perf_counter() - began,
                worker=name,
                helpers=tuple(helpers),
            ),
            logits=logits.numpy(),
        )

    def gathered(self, tensors: dict[str, Tensor]) -> Packed | None:
        """Whole tensors, packed, for the first process of a gang, and for whoever is alone."""
        return sharding.gather(tensors, here=self.gang.rank == 0)

    def reset(self, snapshot: Snapshot, candidate: Candidate) -> Drawn:
        """The snapshot's weights in the live model, and the candidate's mask on them; none for a dense one."""
        sharding.load(snapshot.weights, self.live)
        if candidate.density == 1.0:
            return {}, masks.pack_bits({})
        key = (snapshot.key, candidate.density)
        if key not in self.shared:
            self.shared = {known: value for known, value in self.shared.items() if known[1] == candidate.density}
            calibration = self.calibrate()
            control = self.draw(snapshot, candidate.model_copy(update={"noise": None}), calibration, None)
            self.shared[key] = Shared(calibration, control, {})
        shared = self.shared[key]
        if candidate.is_control:
            return shared.control
        # what is prepared is as large as the whole weights
        return self.draw(snapshot, candidate, shared.calibration, None if self.gang.cut else shared.prepared)

    def calibrate(self) -> dict[str, Calibration]:
        """What the scorer needs to know of the live weights, by name: always from the same training rows."""
        if self.recipe.scorer in BLIND:
            return {}
        data = self.job.data
        rows = data.train.sample(ROWS, derive(self.job.spec.seed, seeds.CALIBRATION))
        return calibrate(self.module, self.job.prunable, rows, padding=data.padding, objective=self.objective)

    def draw(
        self,
        snapshot: Snapshot,
        candidate: Candidate,
        calibration: dict[str, Calibration],
        prepared: dict[object, Draw] | None,
    ) -> Drawn:
        """The candidate's mask on the live weights, which are the snapshot's."""
        live, other = {name: self.live[name] for name in self.job.prunable}, turned(self.module)
        views = snapshot.weights.views() if self.gang.cut else live
        verbs = self.recipe
        return sharding.draw(
            {name: views[name].T if name in other else views[name] for name in live},
            live,
            candidate,
            allocation=verbs.allocation,
            scorer=verbs.scorer,
            sampler=verbs.sampler,
            pattern=verbs.pattern,
            calibration=calibration,
            prepared=prepared,
            turned=other,
        )

    def optimizer(self, snapshot: Snapshot) -> torch.optim.Optimizer:
        """The optimizer as the snapshot left it."""
        state = snapshot.optimizer.views() if snapshot.optimizer else None
        return loop.make_optimizer(self.module, self.job.spec.optimizer, state)

    def train(
        self,
        snapshot: Snapshot,
        stage: Stage,
        mask: masks.Mask,
        seed: int,
        looks: list[int],
        look: Callable[[int], None],
        optimizer: torch.optim.Optimizer,
        *,
        steps: tuple[int, int] | None = None,
        shared: bool = False,
        gang: Gang = ALONE,
    ) -> None:
        """One stage from the snapshot, on the live model, or only some `steps` of it, as `loop.train` takes them.

        `shared`: other candidates will train on the same batches.
        """
        first = steps[0] if steps else 0
        loop.train(
            self.module,
            self.job.data.train,
            stage,
            padding=self.job.data.padding,
            seed=seed,
            mask=mask,
            optimizer=optimizer,
            max_grad_norm=self.job.spec.optimizer.max_grad_norm,
            autocast=self.autocast,
            # what is kept differs between the members of a gang, who must ask equally often
            teacher=self.taught_by(snapshot).begin(seed, first, keep=shared and not gang.cut)
            if stage.distill
            else None,
            objective=self.objective,
            steps=steps,
            gang=gang,
            looks=frozenset(looks),
            look=look,
            tell=self.tell,
        )

    def taught_by(self, snapshot: Snapshot) -> Teacher:
        """The teacher with the snapshot's teacher weights; they are the same for a whole search."""
        assert snapshot.teacher is not None
        if self.teacher is None:
            other = self.job.teacher
            module = self.new_module(other.config if other else self.job.config).requires_grad_(False)
            sharding.load(snapshot.teacher, persistent(module))
            self.teacher = Teacher(module)
        return self.teacher

    def answers(self, rows: Rows, autocast: loop.Autocast | None = None, gang: Gang = ALONE) -> Tensor:
        """The live model's, float32 (rows, few)."""
        padding, how = self.job.data.padding, autocast or self.autocast
        return loop.predict(self.module, rows, padding=padding, autocast=how, objective=self.objective, gang=gang)

    def look(self, step: int, rows: Rows, standard: Tensor | None = None, gang: Gang = ALONE) -> tuple[Point, Tensor]:
        """Measure on rows of `select`: the point, and the loss of every row, float32 (rows,).

        `standard`: the dense model's answers for the rows, float32 (rows, few), to state the agreement with.
        """
        answers, agreement = self.answers(rows, gang=gang), None
        losses = self.objective.losses(answers, torch.from_numpy(rows.labels))
        loss = float(losses.double().mean())
        finite = bool(torch.isfinite(answers).all())
        metric = overall(measure(self.job.data.metrics, answers.numpy(), rows.labels)) if finite else 0.0
        if standard is not None and finite and self.objective.agreement:
            agreement = self.objective.agreement(answers, standard)
        return Point(step=step, loss=loss, metric=metric, agreement=agreement), losses


def scores(point: Point) -> dict[Score, float]:
    """Each kind of score at a look, larger is better; NaN where it is not known."""
    return {
        "loss": -point.loss,
        "metric": point.metric,
        "agreement": math.nan if point.agreement is None else point.agreement,
    }


@contextmanager
def faults_told_apart() -> Iterator[None]:
    """Raise a machine's fault as MachineFault, and let everything else through."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise MachineFault(f"out of memory: {error}") from error
    except dist.DistError as error:
        raise MachineFault(str(error)) from error
    except RuntimeError as error:
        if any(symptom in str(error) for symptom in SYMPTOMS):
            raise MachineFault(str(error)) from error
        raise


def autocasting(precision: str, device: torch.device) -> loop.Autocast:
    """bf16 autocast, or none."""
    enabled = computes_bf16(precision, device)
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def computes_bf16(precision: str, device: torch.device) -> bool:
    """Whether bf16 is asked for; on `auto`, where the device multiplies it natively."""
    return native_bf16(device) if precision == "auto" else precision == "bf16"


def native_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than float32 there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # not in every torch
    return device.type == "cpu" and bool(supported())


def describe(device: torch.device, spec: Spec) -> str:
    """Where a result was computed, in words: host, process, device, threads and precision."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{spec.workers.threads} threads"
    precision = "bf16" if spec.model.dtype == "bf16" or computes_bf16(spec.precision, device) else "fp32"
    return f"{platform.node()}/{os.getpid()} {device.type} {kind} {precision}"


@contextmanager
def isolated(spec: Spec, device: torch.device) -> Iterator[None]:
    """Run with the spec's threads, on a GPU with deterministic kernels, and without a trace in the caller's torch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(spec.workers.threads)
    on_gpu = device.type == "cuda"
    try:
        with torch.random.fork_rng(devices=[device] if on_gpu else []), deterministic() if on_gpu else nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic kernels where there are any; of attention's, only the plain one has a deterministic backward.

    That one may multiply in bf16 as everything else does, and what torch allocates need not be filled first.
    """
    filling: Any = torch.utils.deterministic
    attention: Any = torch.backends.cuda
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, halved = filling.fill_uninitialized_memory, attention.fp16_bf16_reduction_math_sdp_allowed()
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = False
    attention.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        filling.fill_uninitialized_memory = filled
        attention.allow_fp16_bf16_reduction_math_sdp(halved)
