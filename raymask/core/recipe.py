"""What does a spec mean? The one place where its names become functions and its numbers become work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raymask.core import patterns, seeds
from raymask.core.allocations import ALLOCATIONS, Allocation
from raymask.core.patterns import Pattern
from raymask.core.records import Candidate, Noise, Stage
from raymask.core.rules import RULES, Rule
from raymask.core.rungs import climbs, cost
from raymask.core.samplers import SAMPLERS, Sampler
from raymask.core.scorers import SCORERS, Scorer
from raymask.core.seeds import derive
from raymask.core.spec import Dense, Finetune, Probe, Spec

IMP_EPOCHS = 1.5  # the reference fine-tunes its baseline for 15 epochs a level, its search for 10


@dataclass(frozen=True)
class Recipe:
    """A spec with its verbs resolved; `densities` of level 1, 2, ... are strictly decreasing."""

    spec: Spec
    densities: tuple[float, ...]
    allocation: Allocation
    scorer: Scorer
    sampler: Sampler
    pattern: Pattern
    rule: Rule


def resolve(spec: Spec) -> Recipe:
    """The verbs that a spec names."""
    return Recipe(
        spec=spec,
        densities=spec.levels.densities(),
        allocation=ALLOCATIONS[spec.mask.allocation],
        scorer=SCORERS[spec.mask.score],
        sampler=SAMPLERS[spec.candidates.sampler],
        pattern=patterns.named(spec.mask.pattern),
        rule=RULES[spec.select.rule],
    )


def control(recipe: Recipe, level: int) -> Candidate:
    """The magnitude mask of a level, counted from 1; level 0 is the dense model, which nothing masks."""
    density = recipe.densities[level - 1] if level else 1.0
    return Candidate(level=level, index=0, seed=derive(recipe.spec.seed, seeds.CANDIDATE, level, 0), density=density)


def propose(recipe: Recipe, level: int, parents: Sequence[int] = (1,)) -> tuple[Candidate, ...]:
    """The level's pool, for each of its `parents`, branches of the level before: the control, then as many random masks
    as asked for, sampling ratios in turn."""
    first, asked = control(recipe, level), recipe.spec.candidates
    found = []
    for index in range(len(parents) * (asked.count + 1)):
        turn, drawn = divmod(index, asked.count + 1)
        noise = Noise(exponent=asked.exponent, ratio=asked.ratios[(drawn - 1) % len(asked.ratios)]) if drawn else None
        seed = derive(recipe.spec.seed, seeds.CANDIDATE, level, index)
        found.append(first.model_copy(update={"index": index, "seed": seed, "noise": noise, "parent": parents[turn]}))
    return tuple(found)


def stage(section: Dense | Probe | Finetune, *, schedule: str = "linear", distill: bool) -> Stage:
    """A section of the spec as a training."""
    return Stage(
        epochs=section.epochs,
        batch_size=section.batch_size,
        shards=1 if isinstance(section, Probe) else section.shards,
        learning_rate=section.learning_rate,
        schedule=schedule,
        warmup=section.warmup,
        distill=distill,
    )


def dense_stage(spec: Spec) -> Stage:
    """Fine-tuning of the dense model on the labels."""
    return stage(spec.dense, distill=False)


def warm_stage(spec: Spec) -> Stage | None:
    """Dense distillation, from which level 1 starts; None when nothing is distilled."""
    if not spec.distill or spec.dense.distill_epochs == 0:
        return None
    return stage(spec.dense, distill=True).model_copy(update={"epochs": spec.dense.distill_epochs})


def probe_stage(spec: Spec) -> Stage:
    """The early evaluation: linear decay after the warm-up."""
    return stage(spec.probe, distill=spec.distill)


def finetune_stage(recipe: Recipe, level: int, *, imp: bool = False) -> Stage:
    """Fine-tuning of a level's mask, for the search or for its baseline: the rate decays at the last level only."""
    spec = recipe.spec
    schedule = "linear" if level == len(recipe.densities) else "constant"
    found = stage(spec.finetune, schedule=schedule, distill=spec.distill)
    return found.model_copy(update={"epochs": spec.imp.epochs or IMP_EPOCHS * found.epochs}) if imp else found


def runs_imp(spec: Spec) -> bool:
    """Whether there is a baseline to run: without random candidates the search itself is one."""
    return spec.imp.run and spec.candidates.count > 0


def parents_of(spec: Spec, level: int) -> int:
    """How many parents a level's candidates are drawn from, at most."""
    return spec.select.keep if spec.select.beam and level > 1 else 1


def probe_epochs(recipe: Recipe, level: int) -> float:
    """Epochs of a level's early evaluations."""
    spec, parents = recipe.spec, parents_of(recipe.spec, level)
    if spec.candidates.count == 0:
        return 0.0
    return spec.probe.epochs * cost(parents * spec.candidates.count, parents, spec.probe.rungs)


def climbs_of(recipe: Recipe, level: int) -> int:
    """How many early evaluations, each from one rung to the next, a level has."""
    spec, parents = recipe.spec, parents_of(recipe.spec, level)
    return climbs(parents * spec.candidates.count, parents, spec.probe.rungs) if spec.candidates.count else 0


def epochs(recipe: Recipe) -> dict[str, float]:
    """Epochs by purpose that the whole search will train."""
    spec, levels = recipe.spec, len(recipe.densities)
    warm = warm_stage(spec)
    probes = sum(probe_epochs(recipe, level) for level in range(1, levels + 1))
    return {
        "dense": spec.dense.epochs + (warm.epochs if warm else 0.0),
        "early evaluation": probes,
        "fine-tuning": levels * spec.select.keep * finetune_stage(recipe, 1).epochs,
        "baseline (IMP)": levels * finetune_stage(recipe, 1, imp=True).epochs if runs_imp(spec) else 0.0,
    }
