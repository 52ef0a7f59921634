"""What did the user ask for?

A spec is pure data; every default is the reference's, except that the probe's score is the loss, and that bf16
is used where it is fast.
Mistakes inside it are pydantic's to find; `config` turns them into one message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from raymask.core.schedules import SCHEDULES

GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")
QUICKSTART = "quickstart"
DATASET = r"hub/([^:]+)(?::(.+))?"
"""How a task names a dataset of the hub: its id, and its configuration where it has several."""
WIKITEXT = "hub/Salesforce/wikitext:wikitext-2-raw-v1"
Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman", "perplexity"]
Kind = Literal["classification", "regression", "causal-lm"]
Score = Literal["loss", "metric", "agreement"]
METRICS: tuple[Metric, ...] = get_args(Metric)
MEASURES: dict[Kind, tuple[Metric, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "causal-lm": ("perplexity",),
}


def power_of_two(value: int) -> int:
    """The value, if it is 1, 2, 4, 8, ..."""
    if value & (value - 1):
        raise ValueError(f"must be 1, 2, 4, 8 or a higher power of two, not {value}")
    return value


Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
# Strict numbers: YAML tells 1, true and "1" apart, and so do we.
Share = Annotated[float, Field(gt=0, lt=1, strict=True)]
Positive = Annotated[float, Field(gt=0, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Shards = Annotated[Count, AfterValidator(power_of_two)]


class Section(BaseModel):
    """One mapping of the spec: frozen, and an unknown key is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def named(value: Any) -> Any:
    """`model: NAME` is short for `model: {name: NAME}`; so for `task`."""
    return {"name": value} if isinstance(value, str) else value


def listed(value: Any) -> Any:
    """`text: COLUMN` is short for `text: [COLUMN]`."""
    return (value,) if isinstance(value, str) else value


def sparsities(value: Any) -> Any:
    """`levels: [0.5, 0.9]` is short for `levels: {sparsities: [0.5, 0.9]}`, `levels: 0.9` for one of them."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = [value]
    return {"sparsities": value} if isinstance(value, (list, tuple)) else value


def unclocked(value: Any) -> Any:
    """YAML reads 2:4 as two minutes and four seconds."""
    clock = isinstance(value, int) and not isinstance(value, bool) and value >= 60
    return ":".join(map(str, divmod(value, 60))) if clock else value


def one_of(table: Iterable[str], name: str, kind: str) -> str:
    """The name, if the table has it."""
    if name not in table:
        raise ValueError(f"no {kind} is called {name!r}; known are {', '.join(table)}")
    return name


class Model(Section):
    """A hub id or a folder that `AutoModelForSequenceClassification` loads, for a causal-lm `AutoModelForCausalLM`.

    Its linear weights inside the repeated blocks are pruned; `include` replaces that choice by shell-style patterns on
    parameter names, `exclude` takes away from either. `dtype`: what the weights are kept in everywhere. In bf16 what a
    step adds to a weight is lost where it is less than about 1/256 of it, so that bf16 is for models that do not fit in
    fp32.
    """

    name: Text
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["fp32", "bf16"] = "fp32"
    include: tuple[Text, ...] = ()
    exclude: tuple[Text, ...] = ()


class Task(Section):
    """`glue/<name>` (from the hub, or from `<folder>/<name>/<split>.parquet`), the quickstart's own, or own files.

    A `causal-lm` has texts without labels: own files, .txt among them, or `hub/<id>:<configuration>`.
    `select_share` of `train`, at most `select_rows` rows, is carved out for every choice that the search makes.
    """

    name: Text | None = None
    folder: Text | None = None
    train: Text | None = None
    report: Text | None = None
    text: Annotated[tuple[Text, ...], BeforeValidator(listed), Field(max_length=2)] = ()
    label: Text = "label"
    kind: Kind = "classification"
    metrics: tuple[Metric, ...] = ()
    max_length: Annotated[int, Field(ge=4, strict=True)] | None = None
    select_share: Annotated[float, Field(gt=0, le=0.5, strict=True)] = 0.1
    select_rows: Annotated[int, Field(ge=2, strict=True)] = 2000

    @model_validator(mode="after")
    def one_source(self) -> Task:
        mistakes = self.wrong_files() if self.name is None else self.wrong_name(self.name)
        known = MEASURES[self.kind]
        if set(self.metrics) - set(known):
            listed = " and ".join(filter(None, [", ".join(known[:-1]), known[-1]]))
            mistakes.append(f"a {self.kind} is measured by {listed}")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def wrong_files(self) -> list[str]:
        """What is wrong with a task without a name."""
        given = None not in (self.train, self.report)
        if self.kind == "causal-lm":
            missing = f"a causal-lm is either a dataset ({WIKITEXT}) or has the keys train and report"
            return [missing] * (not given) + ["a causal-lm reads one column of text"] * (len(self.text) > 1)
        if given and self.text:
            return []
        return ["a task is either a name (glue/mrpc) or has the keys train, report and text"]

    def wrong_name(self, name: str) -> list[str]:
        """What is wrong with a task of this name."""
        mistakes = []
        if self.train or self.report or self.text or self.metrics:
            mistakes.append(
                "a task with a name brings its own files and columns: take out train, report, text and metrics"
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
            mistakes.append("a dataset comes from the hub: take out folder, or give files as train and report")
        return mistakes


class Levels(Section):
    """Either the `sparsities` themselves, or a final `sparsity` reached in `steps` along a `schedule`."""

    sparsities: tuple[Share, ...] | None = None
    sparsity: Share | None = None
    steps: Count = 4
    schedule: Text = "cubic"

    @field_validator("schedule")
    @classmethod
    def a_known_schedule(cls, name: str) -> str:
        return one_of(SCHEDULES, name, "schedule")

    @model_validator(mode="after")
    def one_way(self) -> Levels:
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
            found = self.sparsities
        else:
            assert self.sparsity is not None
            found = SCHEDULES[self.schedule](self.sparsity, self.steps)
        return tuple(1.0 - sparsity for sparsity in found)


class Mask(Section):
    """Where sparsity goes: `allocation` among matrices, the `pattern` inside one, by which `score` of a weight.

    The pattern is `unstructured`, `n:M` (n of each M neighbours along the input dimension, n as the level says), or
    `RxC` (blocks). `wanda` and `saliency` look at a sample of the training rows.
    """

    allocation: Text = "uniform"
    pattern: Annotated[Text, BeforeValidator(unclocked)] = "unstructured"
    score: Text = "magnitude"

    # What is known is said by the tables, here and below, which are read when somebody asks: they import torch.
    @field_validator("allocation")
    @classmethod
    def a_known_allocation(cls, name: str) -> str:
        from raymask.core.allocations import ALLOCATIONS

        return one_of(ALLOCATIONS, name, "allocation")

    @field_validator("pattern")
    @classmethod
    def a_known_pattern(cls, name: str) -> str:
        from raymask.core.patterns import named

        named(name)
        return name

    @field_validator("score")
    @classmethod
    def a_known_score(cls, name: str) -> str:
        from raymask.core.scorers import SCORERS

        return one_of(SCORERS, name, "score")


class Candidates(Section):
    """How many random masks a level draws beside the control, and how: exponent a, sampling ratios r in turn.

    The `sampler` `uniform` heeds neither, and keeps any weights.
    """

    sampler: Text = "votes"
    count: Annotated[int, Field(ge=0, strict=True)] = 8
    exponent: Annotated[float, Field(gt=0, le=1000, strict=True)] = 5.0
    ratios: Annotated[tuple[Annotated[float, Field(gt=0, le=1, strict=True)], ...], Field(min_length=1)] = (
        5e-5,
        1e-4,
        8e-5,
        3e-4,
    )

    @field_validator("sampler")
    @classmethod
    def a_known_sampler(cls, name: str) -> str:
        from raymask.core.samplers import SAMPLERS

        return one_of(SAMPLERS, name, "sampler")


class Dense(Section):
    """Fine-tuning of the dense model (`epochs: 0` when it is already fine-tuned), then dense distillation.

    `shards`: as in `finetune`.
    """

    epochs: Annotated[float, Field(ge=0, strict=True)] = 3.0
    distill_epochs: Annotated[float, Field(ge=0, strict=True)] = 1.0
    batch_size: Count = 32
    learning_rate: Positive = 5e-5
    warmup: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.1
    shards: Shards = 1


class Probe(Section):
    """The early evaluation (EMEP). The score is the mean of the `last` looks, one every `eval_every` steps.

    A look is at `rows` rows of `select` at most, the same for all candidates. `rungs`: shares of the epochs at which
    the best go on and the others end (successive halving), as many that every rung costs about the same. `repeats`: how
    often at most those at the top are evaluated that may well be the best, each time in another order of rows.
    """

    epochs: Positive = 1.0
    batch_size: Count = 64
    learning_rate: Positive = 2e-4
    warmup: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.1
    eval_every: Count = 50
    last: Count = 10
    rows: Annotated[int, Field(ge=2, strict=True)] = 1000
    rungs: Annotated[tuple[Annotated[float, Field(gt=0, le=1, strict=True)], ...], Field(min_length=1)] = (1.0,)
    repeats: Count = 1
    score: Score = "loss"

    @model_validator(mode="after")
    def rungs_rise_to_one(self) -> Probe:
        if self.repeats > 1 and self.score != "loss":
            raise ValueError(
                f"repeats go where the losses on select leave a doubt: score must be loss, not {self.score}"
            )
        if self.rungs[-1] != 1.0 or any(b <= a for a, b in pairwise(self.rungs)):
            raise ValueError(f"rungs must increase and end at 1.0, not {list(self.rungs)}")
        return self


class Select(Section):
    """How many of a level's masks are fine-tuned side by side, and what comes of them.

    The best of the `keep` after fine-tuning is the parent of the next level's candidates; with `beam` each of them is.
    The `rule` `first` takes the random masks that were drawn first, whatever their scores.
    """

    rule: Text = "best"
    keep: Count = 1
    beam: bool = False

    @field_validator("rule")
    @classmethod
    def a_known_rule(cls, name: str) -> str:
        from raymask.core.rules import RULES

        return one_of(RULES, name, "rule")


class Finetune(Section):
    """Training of the winner's mask from the parent: constant rate after warm-up, linear decay at the last level.

    `shards`: parts of each batch, a power of two. As many workers as there are shards, or fewer, train one model
    together where they would stand idle; how many do changes no bit of the result, the number of shards does.
    """

    epochs: Positive = 10.0
    batch_size: Count = 64
    learning_rate: Positive = 5e-5
    warmup: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.1
    shards: Shards = 1


class Imp(Section):
    """The baseline: iterative magnitude pruning, the same loop with the control alone.

    `epochs` of fine-tuning a level; by default half as many again as `finetune.epochs`, as in the reference.
    """

    run: bool = True
    epochs: Positive | None = None


class Optimizer(Section):
    """The same in every stage. `adafactor` keeps a row and a column of second moments of a matrix, and no first ones.

    Its learning rate is relative: a step is at most that share of a tensor's root mean square.
    """

    name: Literal["adamw", "adafactor"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0, strict=True)] = 0.0
    max_grad_norm: Positive = 1.0


class Workers(Section):
    """What one worker holds, how many there are (as many as fit, when not said), and when to give up.

    `gpus` may be a fraction; when not said, one a worker where there are any. `deadline`: seconds for one candidate's
    probe, and for each epoch of a fine-tuning (on Ray); `retries`: how often a job is tried again when its machine
    failed. `wait`: seconds for which a cluster that grows by itself may stay without room for any worker. `gang`:
    processes of one worker, a power of two, each with these CPUs and GPUs, among which a model is cut (FSDP).
    """

    count: Count | None = None
    cpus: Positive = 1.0
    gpus: Annotated[float, Field(ge=0, strict=True)] | None = None
    deadline: Positive = 3600.0
    retries: Annotated[int, Field(ge=0, strict=True)] = 3
    wait: Annotated[float, Field(ge=0, strict=True)] = 0.0
    gang: Shards = 1

    @property
    def threads(self) -> int:
        """Threads of one worker: its CPUs, rounded down, at least one."""
        return max(1, int(self.cpus))


class Spec(Section):
    """The whole request. `model` and `task` are all that must be given."""

    model: Annotated[Model, BeforeValidator(named)]
    task: Annotated[Task, BeforeValidator(named)]
    levels: Annotated[Levels, BeforeValidator(sparsities)] = Levels(sparsities=(0.54, 0.83, 0.92, 0.9375))
    mask: Mask = Mask()
    candidates: Candidates = Candidates()
    dense: Dense = Dense()
    probe: Probe = Probe()
    select: Select = Select()
    finetune: Finetune = Finetune()
    imp: Imp = Imp()
    distill: bool = True
    optimizer: Optimizer = Optimizer()
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpointing: bool = False
    workers: Workers = Workers()
    seed: Seed = 0

    @property
    def taught(self) -> bool:
        """Whether candidates are held against the dense model."""
        return self.distill or self.probe.score == "agreement"

    @model_validator(mode="after")
    def there_are_as_many_as_are_kept(self) -> Spec:
        if self.select.keep > self.candidates.count + 1:
            raise ValueError(
                f"select.keep: {self.select.keep} is more than the {self.candidates.count + 1} masks of a level "
                "(candidates.count and the control)"
            )
        if self.select.beam and self.select.keep == 1:
            raise ValueError("select.beam: one mask makes no beam, set select.keep to 2 or more")
        return self

    @model_validator(mode="after")
    def quickstart_is_whole(self) -> Spec:
        if (self.model.name == QUICKSTART) != (self.task.name == QUICKSTART):
            raise ValueError("the quickstart's model and task go together: set both to 'quickstart', or neither")
        if self.model.name == QUICKSTART and self.dense.epochs == 0:
            raise ValueError("the quickstart's model is built untrained: dense.epochs must be more than 0")
        return self

    @model_validator(mode="after")
    def the_score_is_known(self) -> Spec:
        if self.probe.score == "agreement" and self.task.kind == "causal-lm":
            raise ValueError(
                "probe.score: agreement compares the probabilities of classes, a causal-lm has none: set it to loss or "
                "metric"
            )
        return self

    @model_validator(mode="after")
    def precision_suits_the_weights(self) -> Spec:
        if self.model.dtype == "bf16" and self.precision == "fp32":
            raise ValueError(
                "precision: fp32 is not to be had from weights in bf16: take it out, or set model.dtype to fp32"
            )
        return self

    @model_validator(mode="after")
    def what_a_gang_can_do(self) -> Spec:
        if self.workers.gang == 1:
            return self
        mistakes = []
        if self.mask.score != "magnitude":
            mistakes.append(f"mask.score: {self.mask.score} needs a model that lies on one device")
        if self.optimizer.name != "adamw":
            mistakes.append("optimizer.name: adamw is the one whose state a gang can cut")
        if self.dense.shards > 1 or self.finetune.shards > 1:
            mistakes.append("dense.shards and finetune.shards: a gang cuts batches by itself, leave them at 1")
        if 0 < (self.workers.gpus or 0) < 1:
            mistakes.append("workers.gpus: each process of a gang has a GPU, or none has")
        if mistakes:
            raise ValueError(
                f"workers.gang: {self.workers.gang} does not go with other settings; {'; '.join(mistakes)}"
            )
        return self

    @model_validator(mode="after")
    def levels_suit_the_pattern(self) -> Spec:
        require_whole_groups(self.mask.pattern, self.mask.allocation, self.levels.densities())
        return self


def require_whole_groups(pattern: str, allocation: str, densities: Iterable[float]) -> None:
    """Raise ValueError when a pattern n:M meets an allocation or a density in (0, 1] that leaves no whole n."""
    if ":" not in pattern:
        return
    from raymask.core.patterns import named

    group = named(pattern).group
    assert group is not None, "a colon stands before M"
    if allocation != "uniform":
        raise ValueError(
            f"mask.allocation: {pattern} keeps the same share everywhere: it goes with uniform, not with {allocation}"
        )
    for density in densities:
        places = density * group
        if round(places) < 1 or abs(places - round(places)) > 1e-9:
            raise ValueError(
                f"levels: a sparsity of {1 - density:g} keeps {places:g} of each {group}, and {pattern} needs a whole "
                f"number, 1 at least: write every level as a multiple of 1/{group}"
            )


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "levels": {"sparsities": [0.54, 0.83, 0.92, 0.9375]},
        "mask": {"allocation": "uniform", "pattern": "unstructured", "score": "magnitude"},
        "candidates": {"count": 8, "exponent": 5.0, "ratios": [5e-5, 1e-4, 8e-5, 3e-4]},
        "probe": {
            "epochs": 1.0,
            "batch_size": 64,
            "learning_rate": 2e-4,
            "warmup": 0.1,
            "eval_every": 50,
            "last": 10,
            "rows": 2000,
            "rungs": [1.0],
            "repeats": 1,
            "score": "metric",
        },
        "select": {"keep": 1, "beam": False},
        "finetune": {"epochs": 10.0, "batch_size": 64, "learning_rate": 5e-5, "warmup": 0.1},
        "imp": {"run": True, "epochs": 15.0},
        "dense": {"distill_epochs": 1.0},
        "distill": True,
        "precision": "fp32",
    },
}
"""Settings by name, under a spec's own. `paper`: the reference's to the letter, the task metric as score included;
raymask's control is in the pool beside its 8 masks all the same, and `select` is carved out of train."""

FREE = tuple(("workers", key) for key in ("count", "deadline", "retries", "wait"))
"""Keys that a resumed search may change: they decide how long it takes, never what it finds."""


def identity(spec: Spec) -> dict[str, Any]:
    """The spec as flat `section.key` -> JSON value, without the keys that cannot change the result."""
    flat: dict[str, Any] = {}

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, (*path, key))
        elif path not in FREE:
            flat[".".join(path)] = value

    walk(spec.model_dump(mode="json"), ())
    return flat
