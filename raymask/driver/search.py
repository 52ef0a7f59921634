"""How does a dense model become a sparse one? The method, level by level."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from raymask.core import masks, seeds
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
    CONTROL,
    SELECTED,
    Candidate,
    Checkpoint,
    Evaluate,
    Evaluation,
    FineTune,
    Interval,
    Level,
    Result,
    Row,
    Settling,
    Snapshot,
    Stage,
    Watch,
)
from raymask.core.rungs import Ladder, climbs
from raymask.core.seeds import derive
from raymask.core.spec import Spec, Task
from raymask.core.stats import bootstrap, chances, paired_gain
from raymask.core.tensors import Packed
from raymask.export.hf import export
from raymask.report.live import reporting, write_report
from raymask.report.timeline import by_purpose, worked
from raymask.store import DENSE, IMP, MODEL, SEARCH, RunDir, branch, branches, check_run, open_run
from raymask.train.data import Corpus
from raymask.train.documents import Documents
from raymask.train.metrics import only_answer, overall
from raymask.train.model import Source, describe, load_weights, read_config
from raymask.train.task import read_texts, to_tokens
from raymask.train.worker import Job


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first step: what was asked, the model without its weights, and the data."""

    recipe: Recipe
    source: Source
    corpus: Corpus | Documents
    job: Job


def search(
    spec: Spec, run: str | Path, watch: Watch, *, address: str | None = None, in_process: bool = False
) -> Result:
    """Search in a run directory, new or to be continued, and return what was found.

    Raises UserError for whatever the user can mend, before anything is trained where it can be known.
    """
    require_unseen(spec.task)
    store = RunDir(run, watch.note)
    check_run(store, spec)
    found = store.read_result()
    if found and store.has_export():
        watch.note("was finished before: nothing is done again")
        return found
    plan = prepare(spec)
    with seams(plan.job, watch, address, in_process) as (evaluate, fine_tune, watch), open_run(store, spec):
        store.note_start(threads=spec.workers.threads, address=address, in_process=in_process)
        started = time.monotonic()
        with reporting(watch, store) as watch:
            prune(plan, store, evaluate, fine_tune, watch)
            return conclude(plan, store, time.monotonic() - started)


def prepare(spec: Spec) -> Plan:
    """Read the data and the model's configuration; the weights are read when they are needed."""
    config, tokenizer = read_config(spec.model)
    corpus = read_texts(spec, config)
    source = describe(spec.model, config, tokenizer, corpus.classes, corpus.kind, checkpointing=spec.checkpointing)
    recipe = resolve(spec)
    require_masks(source, recipe)
    data = to_tokens(corpus, tokenizer, config)
    return Plan(recipe, source, corpus, Job(spec, source.config, data, source.prunable, source.sizes.whole))


def require_unseen(task: Task) -> None:
    """Raise UserError when a search would report on what it trains on."""
    if task.train and task.report and Path(task.train).resolve() == Path(task.report).resolve():
        raise UserError("task.report: is the file of task.train: what was trained on says nothing of what is new")


def require_masks(source: Source, recipe: Recipe) -> None:
    """Raise UserError when there is no mask of some matrix as the recipe asks for it."""
    require_whole_blocks(source, recipe)
    require_something_kept(source, recipe)


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
    for level in range(1, len(recipe.densities) + 1):
        # without a name for the work: no parent is kept beyond its level
        settle(plan, store, to_settle(recipe, store, level, teacher, evaluate, watch), fine_tune, watch)


@dataclass(frozen=True)
class Outcome:
    """What a level's early evaluation came to: the winners, those they were up against at the last rung, themselves
    included, and how many candidates were evaluated and failed."""

    winners: Sequence[Evaluation]
    finalists: Sequence[Evaluation] = ()
    evaluated: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Work:
    """One lineage's fine-tuning at one level: its parent, how to train, and the winner of which outcome it is."""

    lineage: str
    parent: Snapshot
    stage: Stage
    outcome: Outcome
    place: int = 0

    @property
    def winner(self) -> Evaluation:
        return self.outcome.winners[self.place]


def to_settle(
    recipe: Recipe, store: RunDir, level: int, teacher: Packed | None, evaluate: Evaluate, watch: Watch
) -> list[Work]:
    """A level's fine-tunings that are still to be done: the search's, and its baseline's."""
    work = selected(recipe, store, level, teacher, evaluate, watch)
    if runs_imp(recipe.spec) and not made(store, IMP, level):
        parent = read_parent(store, IMP, level, teacher)
        work.append(Work(IMP, parent, finetune_stage(recipe, level, imp=True), alone(control(recipe, level))))
    return work


def selected(
    recipe: Recipe, store: RunDir, level: int, teacher: Packed | None, evaluate: Evaluate, watch: Watch
) -> list[Work]:
    """The search's fine-tunings at a level that are still to be done, one a branch."""
    open_branches = [lineage for lineage in branches(recipe.spec) if not made(store, lineage, level)]
    if not open_branches:
        return []
    parents = {number: read_parent(store, branch(number), level, teacher) for number in bearing(recipe, store, level)}
    outcome = choose(recipe, store, level, parents, evaluate, watch)
    stage = finetune_stage(recipe, level)
    done = [store.read_level(lineage, level) for lineage in branches(recipe.spec) if lineage not in open_branches]
    taken = {record.winner.candidate for record in done}
    places = [place for place, winner in enumerate(outcome.winners) if winner.candidate not in taken]
    return [
        Work(lineage, parents[outcome.winners[place].candidate.parent], stage, outcome, place)
        for lineage, place in zip(open_branches, places, strict=False)
    ]


def bearing(recipe: Recipe, store: RunDir, level: int) -> list[int]:
    """The branches of the level before that a level's candidates are drawn from: all in a beam, else the best one."""
    if level == 1:
        return [1]
    if not recipe.spec.select.beam:
        return [best_branch(recipe, store, level - 1)]
    return done_branches(recipe, store, level - 1)


def done_branches(recipe: Recipe, store: RunDir, level: int) -> list[int]:
    """The branches that a level has."""
    return [n for n, lineage in enumerate(branches(recipe.spec), 1) if store.has_level(lineage, level)]


def best_branch(recipe: Recipe, store: RunDir, level: int) -> int:
    """The branch that is best on `select` after fine-tuning; on a tie that with the better early score."""
    # the first of equals
    return max(
        done_branches(recipe, store, level),
        key=lambda number: store.read_level(branch(number), level).finetuned.kept.rank,
    )


def made(store: RunDir, lineage: str, level: int) -> bool:
    """Whether a level of a lineage is done. Raises UserError when it was made from another parent."""
    found = store.has_level(lineage, level)
    if found:
        require_parent(store, lineage, level)
    return found


def make_dense(plan: Plan, store: RunDir, fine_tune: FineTune, watch: Watch) -> Packed | None:
    """Fine-tune the dense model, then distil it into the parent of level 1; returns the teacher, if there is one."""
    spec, unmasked = plan.recipe.spec, alone(control(plan.recipe, 0))
    if not store.has_level(DENSE, 0):
        settle(plan, store, [Work(DENSE, initial(plan), dense_stage(spec), unmasked)], fine_tune, watch)
    require_same_data(plan, store)
    teacher = store.read_weights(DENSE, 0) if spec.taught else None
    warm = warm_stage(spec)
    if warm and not store.has_level(SEARCH, 0):
        assert teacher is not None
        parent = Snapshot("teacher", teacher, None, teacher)
        settle(plan, store, [Work(SEARCH, parent, warm, unmasked)], fine_tune, watch)
    return teacher


def initial(plan: Plan) -> Snapshot:
    """The model as it was asked for."""
    spec = plan.recipe.spec
    fine_tuned, source = spec.dense.epochs == 0, plan.source
    weights = load_weights(spec.model, source.config, derive(spec.seed, seeds.HEAD), fine_tuned, source.kind)
    return Snapshot("initial", weights)


def alone(candidate: Candidate) -> Outcome:
    """A candidate without a competitor: it needs no score."""
    return Outcome([Evaluation(candidate=candidate)])


def choose(
    recipe: Recipe, store: RunDir, level: int, parents: Mapping[int, Snapshot], evaluate: Evaluate, watch: Watch
) -> Outcome:
    """Evaluate the level's candidates where the journal does not know them yet, and let the rule pick the winners."""
    proposed, rungs = propose(recipe, level, list(parents)), recipe.spec.probe.rungs
    if len(proposed) == 1:
        return alone(proposed[0])
    known = [evaluation for evaluation in store.evaluations(level) if not evaluation.machine]
    seed = derive(recipe.spec.seed, seeds.CONFIDENCE, level)
    ladder = Ladder(proposed, rungs, known, repeats=recipe.spec.probe.repeats, seed=seed)
    total = climbs(len(proposed) - len(parents), len(parents), rungs)
    watch.begins(f"{title(recipe, level)}: early evaluation", level, total, known)
    for evaluation in ladder.climb(evaluate, parents):
        store.append(evaluation)
        watch.evaluated(evaluation)
    finalists = ladder.finalists()
    winners = recipe.rule(finalists, recipe.spec.select.keep)
    return Outcome(winners, finalists, len(proposed), ladder.failed())


def settle(plan: Plan, store: RunDir, work: list[Work], fine_tune: FineTune, watch: Watch) -> None:
    """Fine-tune the lineages' masks side by side, each saved with its record as it arrives."""
    if not work:
        return
    level = work[0].winner.candidate.level
    stage = "distillation" if level == 0 and work[0].lineage == SEARCH else "fine-tuning"
    watch.begins(f"{title(plan.recipe, level)}: {stage}", level, len(work))
    settlings = [
        (item.parent, Settling(name(item), item.winner.candidate, item.stage, item.winner.digest)) for item in work
    ]
    for index, checkpoint in fine_tune(settlings):
        item = work[index]
        record = describe_level(plan, item, checkpoint)
        watch.settled(item.lineage, store.write_level(item.lineage, level, checkpoint, record))


def describe_level(plan: Plan, item: Work, checkpoint: Checkpoint) -> Level:
    """The record of a level; `report` is measured here, and no choice looks at it."""
    data, seed = plan.job.data, plan.recipe.spec.seed
    candidate = item.winner.candidate
    return Level(
        level=candidate.level,
        density=candidate.density,
        kept=checkpoint.kept,
        total=checkpoint.total,
        winner=item.winner,
        evaluated=item.outcome.evaluated,
        failed=item.outcome.failed,
        gain=gain_on_select(item.winner, item.outcome.finalists, derive(seed, seeds.BOOTSTRAP, candidate.level)),
        confidence=confidence_of(item.winner, item.outcome.finalists, derive(seed, seeds.CONFIDENCE, candidate.level)),
        finetuned=checkpoint.finetuned,
        report=data.measure_report(checkpoint.logits),
        digest=checkpoint.digest,
        parent=item.parent.key,
        data=data.digest(),
    )


def gain_on_select(winner: Evaluation, finalists: Sequence[Evaluation], seed: int) -> Interval | None:
    """The winner's early loss against its control's, row by row; None when there is nothing to compare."""
    controls = [each for each in finalists if each.candidate.is_control and each.ok]
    rival = next((each for each in controls if each.candidate.parent == winner.candidate.parent), None)
    if rival is None or winner.candidate.is_control:
        return None
    return paired_gain(rival.losses(), winner.losses(), seed)


def confidence_of(winner: Evaluation, finalists: Sequence[Evaluation], seed: int) -> float | None:
    """How sure it is that no finalist's early loss is below the winner's; None when there is nothing to compare."""
    alive = [evaluation for evaluation in finalists if evaluation.ok]
    if len(alive) < 2:
        return None
    return float(chances(np.stack([evaluation.losses() for evaluation in alive]), seed)[alive.index(winner)])


def read_parent(store: RunDir, lineage: str, level: int, teacher: Packed | None) -> Snapshot:
    """What a level starts from: the one before of a lineage, which for level 1 is the dense model."""
    origin, key = origin_of(store, lineage, level)
    return Snapshot(key, store.read_weights(origin, level - 1), store.read_optimizer(origin, level - 1), teacher)


def origin_of(store: RunDir, lineage: str, level: int) -> tuple[str, str]:
    """Where the level before of a lineage is, and its key: where it is, level and contents."""
    origin = lineage if level > 1 else SEARCH if store.has_level(SEARCH, 0) else DENSE
    contents = store.read_level(origin, level - 1).files[MODEL]
    return origin, f"{origin or 'search'}-{level - 1}-{contents[:16]}"


def require_parent(store: RunDir, lineage: str, level: int) -> None:
    """Raise UserError when a finished level was made from another parent than the one that is there."""
    record = store.read_level(lineage, level)
    above = lineage if lineage == IMP else branch(record.winner.candidate.parent)
    if record.parent != origin_of(store, above, level)[1]:
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
    tree = {
        (lineage, level): store.read_level(lineage, level)
        for level in range(1, last + 1)
        for lineage in branches(recipe.spec)
        if store.has_level(lineage, level)
    }
    chosen = [branch(best_branch(recipe, store, last))]
    for level in range(last, 1, -1):
        chosen.insert(0, branch(tree[chosen[0], level].winner.candidate.parent))
    levels = tuple(tree.pop((lineage, level)) for level, lineage in enumerate(chosen, 1))
    others = tuple(tree.values())
    imp = tuple(store.read_level(IMP, level) for level in range(1, last + 1)) if runs_imp(recipe.spec) else ()
    dense = store.read_level(DENSE, 0)
    baseline = [(CONTROL, IMP, imp[-1])] if imp else []
    rows, gain = compare(plan, store, [("dense", DENSE, dense), *baseline, (SELECTED, chosen[-1], levels[-1])])
    timeline = worked(store.finished(), [found for level in range(1, last + 1) for found in store.evaluations(level)])
    result = Result(
        run=store.uri,
        model=Path(recipe.spec.model.name).name if Path(recipe.spec.model.name).is_dir() else recipe.spec.model.name,
        task=recipe.spec.task.name or str(recipe.spec.task.train),
        kind=data.kind,
        metrics=tuple(dense.report),
        rows=rows,
        sizes=asdict(plan.source.sizes),
        gain=gain,
        levels=levels,
        others=others,
        imp=imp,
        scored=(len(plan.job.scored), len(data.select)),
        seconds={**by_purpose(timeline), "wall": wall},
        timeline=timeline,
        export=store.export_uri,
    )
    files = export(store, plan.source, result, chosen[-1], recipe.spec.model.trust_remote_code)
    done = result.model_copy(update={"files": files})
    write_report(store, "finished", done)
    store.write_result(done)  # last: it exists, so all is done
    return done


def compare(
    plan: Plan, store: RunDir, models: Sequence[tuple[str, str, Level]]
) -> tuple[tuple[Row, ...], Interval | None]:
    """The table's rows of models, each a name, lineage and level, and by how much the last is better than the baseline
    before it, on the same resamples of `report`."""
    data = plan.job.data
    logits = [store.read_logits(lineage, record.level) for _, lineage, record in models]

    def measure(rows: np.ndarray) -> list[float]:
        found = [data.measure_report(one, rows) for one in logits]
        return [*chain(*(each.values() for each in found)), overall(found[-1]) - overall(found[-2])]

    *figures, gain = bootstrap(len(data.report), measure, derive(plan.recipe.spec.seed, seeds.BOOTSTRAP))
    following = iter(figures)
    rows = tuple(
        Row(
            name=name,
            report=record.report,
            intervals=dict(zip(record.report, following, strict=False)),
            sparsity=plan.source.sizes.sparsities(record.total - record.kept),
            always=only_answer(plan.corpus.classes, answers),
        )
        for (name, _, record), answers in zip(models, logits, strict=True)
    )
    return rows, gain if len(models) > 2 else None


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
    return CONTROL if work.lineage == IMP else f"selected ({candidate.name})"
