"""How does a dense model become a sparse one? The method, level by level."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raymask.core import masks
from raymask.core.errors import UserError
from raymask.core.recipe import (
    Recipe,
    control,
    dense_stage,
    finetune_stage,
    propose,
    resolve,
    runs_imp,
    warm_stage,
)
from raymask.core.records import (
    Checkpoint,
    Evaluate,
    Evaluation,
    FineTune,
    FineTuned,
    Interval,
    Level,
    Piece,
    Purpose,
    Result,
    Row,
    Settling,
    Snapshot,
    Stage,
    Watch,
)
from raymask.core.seeds import derive
from raymask.core.spec import Spec
from raymask.core.stats import paired_bootstrap, paired_gain
from raymask.core.tensors import Packed
from raymask.driver.export import export
from raymask.report.timeline import by_purpose
from raymask.store import DENSE, IMP, MODEL, SEARCH, RunDir, check_run, open_run
from raymask.train.data import Corpus, load_corpus, tokenize
from raymask.train.metrics import overall
from raymask.train.model import Source, class_names, describe, load_weights, positions, read_config, vocabulary
from raymask.train.worker import Job


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first step: what was asked, the model without its weights, and the data."""

    recipe: Recipe
    source: Source
    corpus: Corpus
    job: Job


def search(
    spec: Spec, run: str | Path, watch: Watch, *, address: str | None = None, in_process: bool = False
) -> Result:
    """Search in a run directory, new or to be continued, and return what was found.

    Raises UserError for whatever the user can mend, before anything is trained where it can be known.
    """
    store = RunDir(run, watch.note)
    check_run(store, spec)
    found = store.read_result()
    if found and store.has_export():
        return found
    plan = prepare(spec)
    with seams(plan.job, watch, address, in_process) as (evaluate, fine_tune, watch), open_run(store, spec):
        store.note_start(threads=spec.workers.threads, address=address, in_process=in_process)
        started = time.monotonic()
        prune(plan, store, evaluate, fine_tune, watch)
        return conclude(plan, store, time.monotonic() - started)


def prepare(spec: Spec) -> Plan:
    """Read the data and the model's configuration; the weights are read when they are needed."""
    config, tokenizer = read_config(spec.model)
    corpus = load_corpus(spec.task, spec.seed, class_names(config) if spec.dense.epochs == 0 else ())
    source = describe(spec.model, config, tokenizer, corpus.classes)
    recipe = resolve(spec)
    require_whole_blocks(source, recipe)
    require_something_kept(source, recipe)
    data = tokenize(corpus, tokenizer, positions(config), vocabulary(config))
    return Plan(recipe, source, corpus, Job(spec, source.config, data, source.prunable, source.sizes.whole))


def require_whole_blocks(source: Source, recipe: Recipe) -> None:
    """Raise UserError when some matrix does not divide as the pattern asks."""
    for name, shape in source.shapes.items():
        if not recipe.pattern.fits(shape):
            raise UserError(
                f"mask.pattern: {recipe.spec.mask.pattern} does not divide {name} of "
                f"{' x '.join(map(str, shape))}: choose another, or leave such matrices out with model.exclude"
            )


def require_something_kept(source: Source, recipe: Recipe) -> None:
    """Raise UserError when the last level would keep nothing of some matrix, or of all that share a budget."""
    density = recipe.densities[-1]
    kept = masks.quotas(source.shapes, density, recipe.allocation, recipe.pattern)
    entries = {names: sum(math.prod(source.shapes[name]) for name in names) for names in kept}
    smallest = min(kept, key=lambda names: (kept[names], entries[names]))
    if kept[smallest] == 0:
        raise UserError(
            f"levels: a sparsity of {1 - density:g} keeps none of the {entries[smallest]:,} weights of "
            f"{', '.join(smallest)}: lower it, or leave small matrices out with model.exclude"
        )


@contextmanager
def seams(job: Job, watch: Watch, address: str | None, in_process: bool) -> Iterator[tuple[Evaluate, FineTune, Watch]]:
    """Workers in this process, or on Ray, whose metrics listen too. Ray is imported only where it is used."""
    opened: AbstractContextManager[tuple[Evaluate, FineTune]]
    if in_process:
        from raymask.driver import local

        opened = local.workers(job, watch)
    else:
        from raymask.driver import metrics, remote

        watch = metrics.Meter(watch, job)
        opened = remote.workers(job, watch, address)
    with opened as (evaluate, fine_tune):
        yield evaluate, fine_tune, watch


def prune(plan: Plan, store: RunDir, evaluate: Evaluate, fine_tune: FineTune, watch: Watch) -> None:
    """The method: a dense model, then level by level draw, evaluate early, select, and fine-tune.

    Parents are read back from the run directory, so that an undisturbed search and a continued one do the same.
    """
    recipe = plan.recipe
    teacher = make_dense(plan, store, fine_tune, watch)
    lineages = [SEARCH, IMP] if runs_imp(recipe.spec) else [SEARCH]
    for level in range(1, len(recipe.densities) + 1):
        work = []
        for lineage in lineages:
            if store.has_level(lineage, level):
                require_parent(store, lineage, level)
            else:
                parent = read_parent(store, lineage, level, teacher)
                chosen = (
                    choose(recipe, store, level, parent, evaluate, watch) if lineage == SEARCH else alone(recipe, level)
                )
                work.append(Work(lineage, parent, finetune_stage(recipe, level, imp=lineage == IMP), chosen))
        settle(plan, store, work, fine_tune, watch)


@dataclass(frozen=True)
class Work:
    """One lineage's fine-tuning at one level: its parent, how to train, and the evaluation that won."""

    lineage: str
    parent: Snapshot
    stage: Stage
    winner: Evaluation


def make_dense(plan: Plan, store: RunDir, fine_tune: FineTune, watch: Watch) -> Packed | None:
    """Fine-tune the dense model, then distil it into the parent of level 1; returns the teacher, if there is one."""
    spec, unmasked = plan.recipe.spec, alone(plan.recipe, 0)
    if not store.has_level(DENSE, 0):
        weights = load_weights(spec.model, plan.source.config, derive(spec.seed, "head"), spec.dense.epochs == 0)
        settle(plan, store, [Work(DENSE, Snapshot("initial", weights), dense_stage(spec), unmasked)], fine_tune, watch)
    require_same_data(plan, store)
    teacher = store.read_weights(DENSE, 0) if spec.distill else None
    warm = warm_stage(spec)
    if warm and not store.has_level(SEARCH, 0):
        parent = Snapshot("teacher", store.read_weights(DENSE, 0), None, teacher)
        settle(plan, store, [Work(SEARCH, parent, warm, unmasked)], fine_tune, watch)
    return teacher


def alone(recipe: Recipe, level: int) -> Evaluation:
    """The control without a competitor: it needs no score."""
    return Evaluation(candidate=control(recipe, level))


def choose(recipe: Recipe, store: RunDir, level: int, parent: Snapshot, evaluate: Evaluate, watch: Watch) -> Evaluation:
    """Evaluate the level's candidates that the journal does not know yet, and let the rule pick the winner."""
    proposed = propose(recipe, level)
    if len(proposed) == 1:
        return alone(recipe, level)
    done = store.evaluations(level)
    known = {evaluation.candidate for evaluation in done if not evaluation.machine}
    done = [evaluation for evaluation in done if evaluation.candidate in known]
    todo = [candidate for candidate in proposed if candidate not in known]
    watch.begins(f"{title(recipe, level)}: early evaluation", level, len(proposed), done)
    for evaluation in evaluate(parent, todo):
        store.append(evaluation)
        done.append(evaluation)
        watch.evaluated(evaluation)
    return recipe.rule(done)


def settle(plan: Plan, store: RunDir, work: list[Work], fine_tune: FineTune, watch: Watch) -> None:
    """Fine-tune the lineages' masks side by side, each saved with its record as it arrives."""
    if not work:
        return
    level = work[0].winner.candidate.level
    watch.begins(f"{title(plan.recipe, level)}: fine-tuning", level, len(work))
    settlings = [
        (item.parent, Settling(name(item), item.winner.candidate, item.stage, item.winner.digest)) for item in work
    ]
    for index, checkpoint in fine_tune(settlings):
        item = work[index]
        pool = store.evaluations(level) if item.lineage == SEARCH and level else []
        record = describe_level(plan, item, pool, checkpoint)
        watch.settled(item.lineage, store.write_level(item.lineage, level, checkpoint, record))


def describe_level(plan: Plan, item: Work, pool: list[Evaluation], checkpoint: Checkpoint) -> Level:
    """The record of a level; `report` is measured here, when nothing is left to choose."""
    data = plan.job.data
    candidate = item.winner.candidate
    return Level(
        level=candidate.level,
        density=candidate.density,
        kept=checkpoint.kept,
        total=checkpoint.total,
        winner=item.winner,
        evaluated=len(pool),
        failed=sum(not evaluation.ok for evaluation in pool),
        gain=gain_on_select(plan.recipe.spec, item.winner, pool),
        finetuned=checkpoint.finetuned,
        report=data.measure_report(checkpoint.logits),
        digest=checkpoint.digest,
        parent=item.parent.key,
        data=data.digest(),
    )


def gain_on_select(spec: Spec, winner: Evaluation, pool: list[Evaluation]) -> Interval | None:
    """The winner's early loss against the control's, row by row; None when there is nothing to compare."""
    rival = next((evaluation for evaluation in pool if evaluation.candidate.is_control and evaluation.ok), None)
    if rival is None or winner.candidate.is_control:
        return None
    return paired_gain(rival.losses(), winner.losses(), derive(spec.seed, "bootstrap", winner.candidate.level))


def read_parent(store: RunDir, lineage: str, level: int, teacher: Packed | None) -> Snapshot:
    """What a level of a lineage starts from: the level before, which for level 1 is the dense model."""
    origin, key = origin_of(store, lineage, level)
    return Snapshot(key, store.read_weights(origin, level - 1), store.read_optimizer(origin, level - 1), teacher)


def origin_of(store: RunDir, lineage: str, level: int) -> tuple[str, str]:
    """The lineage that a level's parent is in, and the parent's key: its lineage, level and contents."""
    origin = lineage if level > 1 else SEARCH if store.has_level(SEARCH, 0) else DENSE
    contents = store.read_level(origin, level - 1).files[MODEL]
    return origin, f"{origin or 'search'}-{level - 1}-{contents[:16]}"


def require_parent(store: RunDir, lineage: str, level: int) -> None:
    """Raise UserError when a finished level was made from another parent than the one that is there."""
    if store.read_level(lineage, level).parent != origin_of(store, lineage, level)[1]:
        raise UserError(
            f"{store.level_uri(lineage, level)}: was made from another parent than the level before it. Delete it to "
            "do the level again"
        )


def require_same_data(plan: Plan, store: RunDir) -> None:
    """Raise UserError when the data changed under a run."""
    if store.read_level(DENSE, 0).data != plan.job.data.digest():
        raise UserError(
            f"{store.uri}: was started on other data: files, tokenizer or labels have changed since. "
            "Put them back, or choose another directory with --run"
        )


def conclude(plan: Plan, store: RunDir, wall: float) -> Result:
    """Put the models side by side on `report`, export the selected one, and write the result."""
    recipe, data = plan.recipe, plan.job.data
    last = len(recipe.densities)
    levels = tuple(store.read_level(SEARCH, level) for level in range(1, last + 1))
    imp = tuple(store.read_level(IMP, level) for level in range(1, last + 1)) if runs_imp(recipe.spec) else ()
    dense = store.read_level(DENSE, 0)
    gain = None
    if imp:
        ours, theirs = store.read_logits(SEARCH, last), store.read_logits(IMP, last)

        def difference(rows: np.ndarray) -> float:
            return overall(data.measure_report(ours, rows)) - overall(data.measure_report(theirs, rows))

        gain = paired_bootstrap(len(data.report), difference, derive(recipe.spec.seed, "bootstrap"))
    named = [("dense", dense), *([("control (IMP)", imp[-1])] if imp else []), ("selected", levels[-1])]
    timeline = worked(store, dense, levels, imp)
    result = Result(
        run=store.uri,
        model=Path(recipe.spec.model.name).name if Path(recipe.spec.model.name).is_dir() else recipe.spec.model.name,
        task=recipe.spec.task.name or str(recipe.spec.task.train),
        metrics=tuple(dense.report),
        rows=tuple(
            Row(name=row, report=level.report, sparsity=plan.source.sizes.sparsities(level.total - level.kept))
            for row, level in named
        ),
        gain=gain,
        levels=levels,
        imp=imp,
        scored=(len(plan.job.scored), len(data.select)),
        seconds={**by_purpose(timeline), "wall": wall},
        timeline=timeline,
        export=store.export_uri,
    )
    export(store, plan.source, result)
    store.write_result(result)
    return result


def worked(store: RunDir, dense: Level, levels: Sequence[Level], imp: Sequence[Level]) -> tuple[Piece, ...]:
    """Every piece of work that a worker has finished, in the order in which they started."""
    warm = [store.read_level(SEARCH, 0)] if store.has_level(SEARCH, 0) else []
    tuned: dict[Purpose, Sequence[Level]] = {"dense": [dense, *warm], "fine-tuning": levels, "baseline (IMP)": imp}
    work: list[tuple[Purpose, int, FineTuned | Evaluation]] = [
        (kind, level.level, level.finetuned) for kind, done in tuned.items() for level in done
    ]
    for level in levels:
        work += [("early evaluation", level.level, found) for found in store.evaluations(level.level) if found.started]
    return tuple(
        Piece(worker=found.worker, kind=kind, level=number, started=found.started, seconds=found.seconds)
        for kind, number, found in sorted(work, key=lambda item: item[2].started)
    )


def title(recipe: Recipe, level: int) -> str:
    """A level's name for people."""
    if level == 0:
        return "dense model"
    return f"level {level}/{len(recipe.densities)}, sparsity {1 - recipe.densities[level - 1]:.2%}"


def name(work: Work) -> str:
    """What a fine-tuning is called while it runs."""
    candidate = work.winner.candidate
    if candidate.level == 0:
        return "dense" if work.lineage == DENSE else "dense distillation"
    return "control (IMP)" if work.lineage == IMP else f"selected ({candidate.name})"
