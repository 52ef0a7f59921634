"""The spec: what the user asks for, as pure data.

Most defaults are the reference implementation's; docs/method.md lists the exceptions. Pydantic finds the mistakes in a
spec; `config` turns them into one message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from os.path import expanduser
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from raymask.core.functions import get_function, is_import_path
from raymask.core.schedules import SCHEDULES

GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")

QUICKSTART = "quickstart"

DATASET = r"hub/([^:]+)(?::(.+))?"
"""Regular expression of a hub dataset in `task.name`: its id, and its configuration where it has several."""

WIKITEXT = "hub/Salesforce/wikitext:wikitext-2-raw-v1"

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman", "perplexity"]

Kind = Literal["classification", "regression", "causal-lm"]

Score = Literal["loss", "metric", "agreement"]

METRICS: tuple[Metric, ...] = get_args(Metric)

METRICS_BY_KIND: dict[Kind, tuple[Metric, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "causal-lm": ("perplexity",),
}


def power_of_two(value: int) -> int:
    """Return the value if it is 1, 2, 4, 8, ...; raise ValueError otherwise."""
    if value & (value - 1):
        raise ValueError(f"must be 1, 2, 4, 8 or a higher power of two, not {value}")
    return value


Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]

Location = Annotated[Text, AfterValidator(expanduser)]
"""A path, with ~ expanded; a hub id stays as it is."""

# A column or a class: blanks at its ends are part of its name.
Name = Annotated[str, StringConstraints(min_length=1)]

# Strict numbers: 1, true and "1" are different, as in YAML.
Fraction = Annotated[float, Field(gt=0, lt=1, strict=True)]

Positive = Annotated[float, Field(gt=0, strict=True)]

Count = Annotated[int, Field(ge=1, strict=True)]

Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]

PowerOfTwo = Annotated[Count, AfterValidator(power_of_two)]


class Section(BaseModel):
    """One mapping of the spec: frozen; an unknown key is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def expand_name(value: Any) -> Any:
    """Expand `model: NAME` to `model: {name: NAME}`; the same for `task`."""
    return {"name": value} if isinstance(value, str) else value


def expand_text(value: Any) -> Any:
    """Expand `text: COLUMN` to `text: [COLUMN]`."""
    return (value,) if isinstance(value, str) else value


def class_text(value: Any) -> Any:
    """Turn a class that is a whole number into text; refuse what YAML may have read otherwise than it stands there."""
    if isinstance(value, (bool, float)):
        raise ValueError("put the class in quotes: YAML reads yes and no as true and false, and 1.10 as 1.1")
    return str(value) if isinstance(value, int) else value


def expand_levels(value: Any) -> Any:
    """Expand `levels: [0.5, 0.9]` to `levels: {sparsities: [0.5, 0.9]}`; `levels: 0.9` is one level."""
    if isinstance(value, (str, bool)):
        raise ValueError("a list of shares is wanted, such as [0.5, 0.9]")
    if isinstance(value, (int, float)):
        value = [value]
    return {"sparsities": value} if isinstance(value, (list, tuple)) else value


def undo_sexagesimal(value: Any) -> Any:
    """Turn 124 back into "2:4", which YAML reads as a sexagesimal number: two minutes and four seconds."""
    is_sexagesimal = isinstance(value, int) and not isinstance(value, bool) and value >= 60
    return ":".join(map(str, divmod(value, 60))) if is_sexagesimal else value


def require_known(table: Iterable[str], name: str, kind: str) -> str:
    """Return a name if it is known.

    Args:
        table: The known names.
        name: The name to check.
        kind: What it names, for the error.

    Returns:
        The name.

    Raises:
        ValueError: The table does not have it.
    """
    if name not in table:
        raise ValueError(f"no {kind} is called {name!r}; known are {', '.join(table)}")
    return name


NO_IMPORTS = "no imports"
"""Context of a validation that imports no functions: that of a run's spec, where only its report or model is wanted."""


def require_function(table: Mapping[str, Any], name: str, kind: str, info: ValidationInfo) -> str:
    """Return a name if it is a function's.

    Args:
        table: Functions by name.
        name: A name in the table, or an import path.
        kind: What the function is, for the error.
        info: The validation; with NO_IMPORTS as context an import path is not followed.

    Returns:
        The name.

    Raises:
        ValueError: There is no such function.
    """
    if not (info.context == NO_IMPORTS and is_import_path(name)):
        get_function(table, name, kind)
    return name


class Model(Section):
    """The model to prune. By default the weights of linear layers and experts inside the repeated blocks are pruned.

    Attributes:
        name: Hub id or folder that `AutoModelForSequenceClassification` loads, for a causal-lm `AutoModelForCausalLM`.
        revision: Revision on the hub, None for the default one.
        trust_remote_code: Whether to run model code from the hub.
        dtype: In what the weights are stored everywhere. In bf16 an update is lost where it is less than about 1/256 of
            its weight, so bf16 is for models that do not fit in fp32.
        include: Shell-style patterns on parameter names that replace the default choice.
        exclude: Shell-style patterns on parameter names to leave dense.
    """

    name: Location
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["fp32", "bf16"] = "fp32"
    include: tuple[Text, ...] = ()
    exclude: tuple[Text, ...] = ()


class Task(Section):
    """The task: its data, splits and metrics. Give either a name or your own files.

    Every choice of the search is made on `validation`: an own file, or else rows that are split off from `train`.

    Attributes:
        name: `glue/<name>`, `quickstart`, or for a causal-lm `hub/<id>:<configuration>`. None for own files.
        folder: Folder with `<name>/<split>.parquet` of a GLUE task, None to load it from the hub.
        train: Own file of training rows. A causal-lm has texts without labels, which may be a .txt file.
        validation: Own file of validation rows; None to split them off from `train`.
        test: Own file of test rows.
        text: Columns of text, one or two.
        label: Column of labels.
        positive: Class that F1 is of, where there are two; None for the last one in the order of the labels.
        kind: Kind of task.
        metrics: Metrics to report, empty for the task's usual ones.
        max_length: Longest input in tokens, None for the task's usual length.
        validation_share: Share of `train` for `validation`, in (0, 0.5].
        validation_rows: Most rows of `validation`.
    """

    name: Text | None = None
    folder: Location | None = None
    train: Location | None = None
    validation: Location | None = None
    test: Location | None = None
    text: Annotated[tuple[Name, ...], BeforeValidator(expand_text), Field(max_length=2)] = ()
    label: Name = "label"
    positive: Annotated[Name | None, BeforeValidator(class_text)] = None
    kind: Kind = "classification"
    metrics: tuple[Metric, ...] = ()
    max_length: Annotated[int, Field(ge=4, strict=True)] | None = None
    validation_share: Annotated[float, Field(gt=0, le=0.5, strict=True)] = 0.1
    validation_rows: Annotated[int, Field(ge=2, strict=True)] = 2000

    @model_validator(mode="after")
    def check_source(self) -> Task:
        """Require a known name or own files, and metrics of the task's kind."""
        mistakes = self.check_files() if self.name is None else self.check_name(self.name)
        known = METRICS_BY_KIND[self.kind]
        if set(self.metrics) - set(known):
            listed = " and ".join(filter(None, [", ".join(known[:-1]), known[-1]]))
            mistakes.append(f"a {self.kind} is measured by {listed}")
        if self.positive is not None and (self.kind != "classification" or self.name is not None):
            mistakes.append("positive goes with a classification of your own files: take it out")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def check_files(self) -> list[str]:
        """Mistakes in a task without a name."""
        has_files = None not in (self.train, self.test)
        if self.kind == "causal-lm":
            missing = f"a causal-lm is either a dataset ({WIKITEXT}) or has the keys train and test"
            return [missing] * (not has_files) + ["a causal-lm reads one column of text"] * (len(self.text) > 1)
        if has_files and self.text:
            return []
        return ["a task is either a name (glue/mrpc) or has the keys train, test and text"]

    def check_name(self, name: str) -> list[str]:
        """Mistakes in a task of this name."""
        mistakes = []
        if self.train or self.validation or self.test or self.text or self.metrics:
            mistakes.append(
                "a task with a name brings its own files and columns: take out train, validation, test, text and "
                "metrics"
            )
        known = (*(f"glue/{task}" for task in GLUE), QUICKSTART)
        dataset = re.fullmatch(DATASET, name)
        if self.kind == "causal-lm" and not dataset:
            mistakes.append(f"a causal-lm reads a dataset of texts, such as {WIKITEXT}, not {name!r}")
        elif self.kind != "causal-lm" and dataset:
            mistakes.append(f"{name} is a dataset of texts: set kind to causal-lm")
        elif not dataset and name not in known:
            mistakes.append(f"no task is called {name!r}; known are {', '.join(known)}")
        if self.folder is not None and name == QUICKSTART:
            mistakes.append("the quickstart's task is generated: take out folder")
        if self.folder is not None and dataset:
            mistakes.append("a dataset comes from the hub: take out folder, or give files as train and test")
        return mistakes


class Levels(Section):
    """The levels' sparsities: either `sparsities`, or a final `sparsity` reached in `steps` along a `schedule`.

    Attributes:
        sparsities: Sparsity of each level, in (0, 1), increasing.
        sparsity: Sparsity of the last level, in (0, 1).
        steps: Number of levels.
        schedule: Name of the schedule.
    """

    sparsities: tuple[Fraction, ...] | None = None
    sparsity: Fraction | None = None
    steps: Count = 4
    schedule: Text = "cubic"

    @field_validator("schedule")
    @classmethod
    def check_schedule(cls, name: str) -> str:
        """Require a known schedule."""
        return require_known(SCHEDULES, name, "schedule")

    @model_validator(mode="after")
    def check_sparsities(self) -> Levels:
        """Require one way of giving the sparsities, increasing."""
        if (self.sparsities is None) == (self.sparsity is None):
            raise ValueError("give either sparsities, or sparsity (with steps and schedule)")
        if self.sparsities is not None:
            if not self.sparsities:
                raise ValueError("at least one sparsity is needed")
            if any(b <= a for a, b in pairwise(self.sparsities)):
                raise ValueError(f"sparsities must increase from level to level, not {list(self.sparsities)}")
        return self

    def densities(self) -> tuple[float, ...]:
        """Share of the prunable weights that each level keeps, strictly decreasing."""
        if self.sparsities is not None:
            sparsities = self.sparsities
        else:
            assert self.sparsity is not None
            sparsities = SCHEDULES[self.schedule](self.sparsity, self.steps)
        return tuple(1.0 - sparsity for sparsity in sparsities)


class MaskOptions(Section):
    """Which weights a mask keeps.

    Attributes:
        allocation: How the density is distributed over the matrices: a name or an import path.
        pattern: Which shapes a mask may have: `unstructured`, `n:M` (n of each M neighbours along the input dimension;
            the level gives n), or `RxC` (blocks).
        score: How important a weight is: a name or an import path. All but `magnitude` read a sample of the training
            rows.
    """

    allocation: Text = "uniform"
    pattern: Annotated[Text, BeforeValidator(undo_sexagesimal)] = "unstructured"
    score: Text = "magnitude"

    # The tables of known names, here and below, are imported late because they import torch.
    @field_validator("allocation")
    @classmethod
    def check_allocation(cls, name: str, info: ValidationInfo) -> str:
        """Require an allocation."""
        from raymask.core.masking.allocations import ALLOCATIONS

        return require_function(ALLOCATIONS, name, "allocation", info)

    @field_validator("pattern")
    @classmethod
    def check_pattern(cls, name: str) -> str:
        """Require a known pattern."""
        from raymask.core.masking.patterns import parse_pattern

        parse_pattern(name)
        return name

    @field_validator("score")
    @classmethod
    def check_score(cls, name: str, info: ValidationInfo) -> str:
        """Require a score."""
        from raymask.core.masking.scorers import SCORERS

        return require_function(SCORERS, name, "score", info)


class Candidates(Section):
    """The random masks of a level. The magnitude mask is a candidate besides them.

    Attributes:
        sampler: How a mask is drawn: a name or an import path. `random` keeps any weights, and ignores exponent and
            sampling ratios.
        count: Number of random masks for each parent.
        exponent: Exponent a of the scores.
        sampling_ratios: Sampling ratios r, used in turn.
    """

    sampler: Text = "voting"
    count: Annotated[int, Field(ge=0, strict=True)] = 8
    exponent: Annotated[float, Field(gt=0, le=1000, strict=True)] = 5.0
    sampling_ratios: Annotated[tuple[Annotated[float, Field(gt=0, le=1, strict=True)], ...], Field(min_length=1)] = (
        5e-5,
        1e-4,
        8e-5,
        3e-4,
    )

    @field_validator("sampler")
    @classmethod
    def check_sampler(cls, name: str, info: ValidationInfo) -> str:
        """Require a sampler."""
        from raymask.core.masking.samplers import SAMPLERS

        return require_function(SAMPLERS, name, "sampler", info)


class Dense(Section):
    """Fine-tuning of the dense model on the labels, then dense distillation.

    Attributes:
        epochs: Epochs on the labels; 0 when the model is already fine-tuned.
        distill_epochs: Epochs of dense distillation.
        batch_size: Rows of one batch.
        learning_rate: Peak learning rate.
        warmup: Share of the steps, in [0, 1], over which the learning rate rises.
        data_parallel: As in `finetune`.
    """

    epochs: Annotated[float, Field(ge=0, strict=True)] = 3.0
    distill_epochs: Annotated[float, Field(ge=0, strict=True)] = 1.0
    batch_size: Count = 32
    learning_rate: Positive = 5e-5
    warmup: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.1
    data_parallel: PowerOfTwo = 1


class EarlyEval(Section):
    """The early evaluation (EMEP): a short training that scores each candidate.

    Attributes:
        epochs: Epochs of a full early evaluation.
        batch_size: Rows of one batch.
        learning_rate: Peak learning rate.
        warmup: Share of the steps, in [0, 1], over which the learning rate rises.
        eval_steps: Optimizer steps between two evaluations on `validation`.
        score_window: Number of last evaluations whose mean is the score.
        max_rows: Most rows of `validation` that are evaluated, the same for all candidates.
        rungs: Shares of the epochs in (0, 1], increasing to 1, at which the best candidates continue and the others end
            (successive halving). So many continue that every rung costs about the same.
        repeats: Most evaluations of a candidate at the last rung. Candidates that may be the best are evaluated again,
            each time in another order of rows.
        score: What ranks the candidates.
    """

    epochs: Positive = 1.0
    batch_size: Count = 64
    learning_rate: Positive = 2e-4
    warmup: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.1
    eval_steps: Count = 50
    score_window: Count = 10
    max_rows: Annotated[int, Field(ge=2, strict=True)] = 1000
    rungs: Annotated[tuple[Annotated[float, Field(gt=0, le=1, strict=True)], ...], Field(min_length=1)] = (1.0,)
    repeats: Count = 1
    score: Score = "loss"

    @model_validator(mode="after")
    def check_rungs(self) -> EarlyEval:
        """Require rungs that increase to 1, and repeats only with the loss as score."""
        if self.repeats > 1 and self.score != "loss":
            raise ValueError(f"repeats compares the losses on validation: set score to loss, not {self.score}")
        if self.rungs[-1] != 1.0 or any(b <= a for a, b in pairwise(self.rungs)):
            raise ValueError(f"rungs must increase and end at 1.0, not {list(self.rungs)}")
        return self


class Select(Section):
    """Which of a level's masks are fine-tuned, and which are the next level's parents.

    Attributes:
        rule: Selection rule: a name or an import path. `first` takes the random masks that were drawn first, whatever
            their scores.
        keep: How many masks are fine-tuned side by side.
        beam: Whether each of them is a parent of the next level's candidates; else only the best after fine-tuning is.
    """

    rule: Text = "best"
    keep: Count = 1
    beam: bool = False

    @field_validator("rule")
    @classmethod
    def check_rule(cls, name: str, info: ValidationInfo) -> str:
        """Require a rule."""
        from raymask.core.selection import SELECTIONS

        return require_function(SELECTIONS, name, "rule", info)


class Finetune(Section):
    """Fine-tuning of the winner's mask from its parent: constant rate after warm-up, linear decay at the last level.

    Attributes:
        epochs: Epochs of a level.
        batch_size: Rows of one batch.
        learning_rate: Peak learning rate.
        warmup: Share of the steps, in [0, 1], over which the learning rate rises.
        data_parallel: Number of shards, a power of two, that each batch is split into. Idle workers join as
            data-parallel replicas, at most one a shard. The number of shards changes the result, the number of workers
            does not.
    """

    epochs: Positive = 10.0
    batch_size: Count = 64
    learning_rate: Positive = 5e-5
    warmup: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.1
    data_parallel: PowerOfTwo = 1


class Imp(Section):
    """The IMP baseline: iterative magnitude pruning, the same loop with the magnitude mask alone.

    Attributes:
        run: Whether it runs beside the search.
        epochs: Epochs of fine-tuning a level; None for 1.5 times `finetune.epochs`, as in the reference.
    """

    run: bool = True
    epochs: Positive | None = None


class Optimizer(Section):
    """The optimizer of every training.

    Attributes:
        name: `adafactor` stores factored second moments (a row and a column a matrix) and no momentum. Its learning
            rate is relative: a step is at most that share of a tensor's root mean square.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Largest norm of the gradient; larger gradients are scaled down.
    """

    name: Literal["adamw", "adafactor"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0, strict=True)] = 0.0
    max_grad_norm: Positive = 1.0


class Workers(Section):
    """Resources of the workers, and limits for failures (on Ray).

    Attributes:
        count: Number of workers, None for as many as fit.
        cpus: CPUs of one process.
        gpus: GPUs of one process, may be a fraction. None for 1 where there are GPUs.
        timeout: Seconds for one early evaluation, and for each epoch of a fine-tuning.
        max_retries: How often a task is tried again after a system failure.
        scale_up_timeout: Seconds for which an autoscaling cluster may have no room for any worker.
        fsdp: Processes of one worker, a power of two, over which the model is sharded. Each has `cpus` and `gpus`.
    """

    count: Count | None = None
    cpus: Positive = 1.0
    gpus: Annotated[float, Field(ge=0, strict=True)] | None = None
    timeout: Positive = 3600.0
    max_retries: Annotated[int, Field(ge=0, strict=True)] = 3
    scale_up_timeout: Annotated[float, Field(ge=0, strict=True)] = 0.0
    fsdp: PowerOfTwo = 1

    @property
    def threads(self) -> int:
        """Threads of one process: its CPUs, rounded down, at least one."""
        return max(1, int(self.cpus))


class Spec(Section):
    """A whole spec. Only `model` and `task` must be given.

    Attributes:
        model: The model to prune.
        task: The task.
        levels: The levels' sparsities.
        mask: Which weights a mask keeps.
        candidates: The random masks of a level.
        dense: Training of the dense model.
        early_eval: The early evaluation of the candidates.
        select: Selection of the winners.
        finetune: Fine-tuning of the winners.
        imp: The IMP baseline.
        distill: Whether masks are trained by distillation from the dense model; else on the labels.
        optimizer: The optimizer.
        precision: Precision of the computations; "auto" is bf16 where that is fast.
        gradient_checkpointing: Whether activations are computed again in the backward pass, to save memory.
        workers: Resources of the workers.
        seed: Seed of all random choices, in [0, 2^63).
    """

    model: Annotated[Model, BeforeValidator(expand_name)]
    task: Annotated[Task, BeforeValidator(expand_name)]
    levels: Annotated[Levels, BeforeValidator(expand_levels)] = Levels(sparsities=(0.54, 0.83, 0.92, 0.9375))
    mask: MaskOptions = MaskOptions()
    candidates: Candidates = Candidates()
    dense: Dense = Dense()
    early_eval: EarlyEval = EarlyEval()
    select: Select = Select()
    finetune: Finetune = Finetune()
    imp: Imp = Imp()
    distill: bool = True
    optimizer: Optimizer = Optimizer()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    workers: Workers = Workers()
    seed: Seed = 0

    @property
    def import_paths(self) -> dict[str, str]:
        """Import paths of the functions that are not raymask's, by key."""
        functions = {
            "mask.allocation": self.mask.allocation,
            "mask.score": self.mask.score,
            "candidates.sampler": self.candidates.sampler,
            "select.rule": self.select.rule,
        }
        return {key: name for key, name in functions.items() if is_import_path(name)}

    @property
    def uses_teacher(self) -> bool:
        """Whether training or scoring needs the dense model's predictions."""
        return self.distill or self.early_eval.score == "agreement"

    @model_validator(mode="after")
    def check_keep(self) -> Spec:
        """Require that a level has enough masks for select.keep, and a beam more than one."""
        if self.select.keep > self.candidates.count + 1:
            raise ValueError(
                f"select.keep: {self.select.keep} is more than the {self.candidates.count + 1} masks of a level "
                "(candidates.count and the magnitude mask)"
            )
        if self.select.beam and self.select.keep == 1:
            raise ValueError("select.beam: one mask makes no beam, set select.keep to 2 or more")
        return self

    @model_validator(mode="after")
    def check_quickstart(self) -> Spec:
        """Require that the quickstart's model and task go together, and that the model is trained."""
        if (self.model.name == QUICKSTART) != (self.task.name == QUICKSTART):
            raise ValueError("the quickstart's model and task go together: set both to 'quickstart', or neither")
        if self.model.name == QUICKSTART and self.dense.epochs == 0:
            raise ValueError("the quickstart's model is built untrained: dense.epochs must be more than 0")
        return self

    @model_validator(mode="after")
    def check_score(self) -> Spec:
        """Require that the agreement is not the score of a causal-lm."""
        if self.early_eval.score == "agreement" and self.task.kind == "causal-lm":
            raise ValueError(
                "early_eval.score: agreement compares the probabilities of classes, a causal-lm has none: "
                "set it to loss or metric"
            )
        return self

    @model_validator(mode="after")
    def check_precision(self) -> Spec:
        """Require a precision that the weights have."""
        if self.model.dtype == "bf16" and self.precision == "fp32":
            raise ValueError(
                "precision: fp32 needs weights in fp32, and model.dtype is bf16: "
                "take precision out, or set model.dtype to fp32"
            )
        return self

    @model_validator(mode="after")
    def check_fsdp(self) -> Spec:
        """Require settings that work with FSDP."""
        if self.workers.fsdp == 1:
            return self
        mistakes = []
        if self.mask.score != "magnitude":
            mistakes.append(f"mask.score: {self.mask.score} needs a model that lies on one device")
        if self.optimizer.name != "adamw":
            mistakes.append("optimizer.name: only the state of adamw can be sharded")
        if self.dense.data_parallel > 1 or self.finetune.data_parallel > 1:
            mistakes.append(
                "dense.data_parallel and finetune.data_parallel: FSDP splits each batch itself, leave them at 1"
            )
        if 0 < (self.workers.gpus or 0) < 1:
            mistakes.append("workers.gpus: give each FSDP process whole GPUs, or 0")
        if mistakes:
            raise ValueError(
                f"workers.fsdp: {self.workers.fsdp} does not go with other settings; {'; '.join(mistakes)}"
            )
        return self

    @model_validator(mode="after")
    def check_pattern(self) -> Spec:
        """Require that the pattern, the allocation and all densities go together."""
        require_whole_groups(self.mask.pattern, self.mask.allocation, self.levels.densities())
        return self


def require_whole_groups(pattern: str, allocation: str, densities: Iterable[float]) -> None:
    """Check that a pattern n:M gives a whole n >= 1 at every density.

    Args:
        pattern: The pattern as a spec writes it.
        allocation: Name of the allocation.
        densities: Densities of the levels, in (0, 1].

    Raises:
        ValueError: The allocation is not uniform, or a density gives no whole n.
    """
    if ":" not in pattern:
        return
    from raymask.core.masking.patterns import parse_pattern

    group = parse_pattern(pattern).group
    assert group is not None, "a colon stands before M"
    if allocation != "uniform":
        raise ValueError(
            f"mask.allocation: {pattern} keeps the same share everywhere: it goes with uniform, not with {allocation}"
        )
    for density in densities:
        num_kept = density * group
        if round(num_kept) < 1 or abs(num_kept - round(num_kept)) > 1e-9:
            raise ValueError(
                f"levels: a sparsity of {1 - density:g} keeps {num_kept:g} of each {group}, and {pattern} needs a "
                f"whole number, 1 at least: write every level as a multiple of 1/{group}"
            )
