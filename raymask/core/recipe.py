"""Recipes: the one place where a spec's names become functions and its numbers become tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from raymask.core import seeds
from raymask.core.functions import get_function
from raymask.core.masking.allocations import ALLOCATIONS
from raymask.core.masking.masks import PruningMethod
from raymask.core.masking.noise import Noise
from raymask.core.masking.patterns import parse_pattern
from raymask.core.masking.samplers import SAMPLERS
from raymask.core.masking.scorers import SCORERS
from raymask.core.records import Candidate, TrainConfig
from raymask.core.seeds import derive
from raymask.core.selection import SELECTIONS, SelectFn
from raymask.core.spec import Dense, EarlyEval, Finetune, Spec
from raymask.core.successive_halving import num_evaluations, num_full_evaluations

IMP_EPOCHS = (
    1.5  # times finetune.epochs: the reference fine-tunes its baseline for 15 epochs a level, its search for 10
)


@dataclass(frozen=True)
class Recipe:
    """A spec with its names resolved to functions, each when it is first used: a report needs none of them.

    Attributes:
        spec: The spec.
        densities: Share of the prunable weights that levels 1, 2, ... keep, in (0, 1), strictly decreasing.
    """

    spec: Spec
    densities: tuple[float, ...]

    @cached_property
    def method(self) -> PruningMethod:
        """The functions that make a mask."""
        mask = self.spec.mask
        return PruningMethod(
            allocation=get_function(ALLOCATIONS, mask.allocation, "allocation"),
            scorer=get_function(SCORERS, mask.score, "score"),
            sampler=get_function(SAMPLERS, self.spec.candidates.sampler, "sampler"),
            pattern=parse_pattern(mask.pattern),
        )

    @cached_property
    def select(self) -> SelectFn:
        """The rule that selects the winners of a level."""
        return get_function(SELECTIONS, self.spec.select.rule, "rule")


def resolve(spec: Spec) -> Recipe:
    """Resolve a spec."""
    return Recipe(spec, spec.levels.densities())


def deterministic_candidate(recipe: Recipe, level: int) -> Candidate:
    """The magnitude mask of a level, counted from 1. Level 0 is the dense model, which has no mask: density 1."""
    density = recipe.densities[level - 1] if level else 1.0
    return Candidate(level=level, index=0, seed=derive(recipe.spec.seed, seeds.CANDIDATE, level, 0), density=density)


def propose_candidates(recipe: Recipe, level: int, parents: Sequence[int] = (1,)) -> tuple[Candidate, ...]:
    """Propose the candidates of a level.

    Args:
        recipe: The recipe.
        level: Level, counted from 1.
        parents: Branches of the level before, counted from 1.

    Returns:
        For each parent the magnitude mask, then `candidates.count` random masks with the sampling ratios in turn. The
        index counts on over the parents.
    """
    deterministic, section = deterministic_candidate(recipe, level), recipe.spec.candidates
    candidates = []
    for index in range(len(parents) * (section.count + 1)):
        parent_index, number = divmod(index, section.count + 1)  # number 0 is the magnitude mask
        ratios = section.sampling_ratios
        noise = Noise(exponent=section.exponent, sampling_ratio=ratios[(number - 1) % len(ratios)]) if number else None
        seed = derive(recipe.spec.seed, seeds.CANDIDATE, level, index)
        update = {"index": index, "seed": seed, "noise": noise, "parent_branch": parents[parent_index]}
        candidates.append(deterministic.model_copy(update=update))
    return tuple(candidates)


def train_config(section: Dense | EarlyEval | Finetune, *, schedule: str = "linear", distill: bool) -> TrainConfig:
    """The hyper-parameters that a section of the spec gives.

    Args:
        section: Section of the spec.
        schedule: "linear" or "constant" learning rate after the warm-up.
        distill: Whether to distil from the dense model.

    Returns:
        The configuration. An early evaluation never splits its batches.
    """
    return TrainConfig(
        epochs=section.epochs,
        batch_size=section.batch_size,
        data_parallel=1 if isinstance(section, EarlyEval) else section.data_parallel,
        learning_rate=section.learning_rate,
        schedule=schedule,
        warmup=section.warmup,
        distill=distill,
    )


def dense_config(spec: Spec) -> TrainConfig:
    """Fine-tuning of the dense model on the labels."""
    return train_config(spec.dense, distill=False)


def dense_distillation_config(spec: Spec) -> TrainConfig | None:
    """Dense distillation, from whose result level 1 starts; None when the spec asks for none."""
    if not spec.distill or spec.dense.distill_epochs == 0:
        return None
    return train_config(spec.dense, distill=True).model_copy(update={"epochs": spec.dense.distill_epochs})


def early_eval_config(spec: Spec) -> TrainConfig:
    """The early evaluation: linear decay after the warm-up."""
    return train_config(spec.early_eval, distill=spec.distill)


def finetune_config(recipe: Recipe, level: int, *, imp: bool = False) -> TrainConfig:
    """Fine-tuning of a level's mask: the learning rate decays at the last level only.

    Args:
        recipe: The recipe.
        level: Level, counted from 1.
        imp: Whether it is the IMP baseline's, which may have another number of epochs.

    Returns:
        The configuration.
    """
    spec = recipe.spec
    schedule = "linear" if level == len(recipe.densities) else "constant"
    config = train_config(spec.finetune, schedule=schedule, distill=spec.distill)
    return config.model_copy(update={"epochs": spec.imp.epochs or IMP_EPOCHS * config.epochs}) if imp else config


def has_baseline(spec: Spec) -> bool:
    """Whether the IMP baseline runs beside the search. Without random candidates the search itself is IMP."""
    return spec.imp.run and spec.candidates.count > 0


def num_parents(spec: Spec, level: int) -> int:
    """How many parents a level's candidates are drawn from, at most."""
    return spec.select.keep if spec.select.beam and level > 1 else 1


def early_eval_epochs(recipe: Recipe, level: int) -> float:
    """Epochs that a level's early evaluations train at most, repeats not counted."""
    spec, parents = recipe.spec, num_parents(recipe.spec, level)
    if spec.candidates.count == 0:
        return 0.0
    return spec.early_eval.epochs * num_full_evaluations(
        parents * spec.candidates.count, parents, spec.early_eval.rungs
    )


def level_evaluations(recipe: Recipe, level: int) -> int:
    """How many early evaluations, each from one rung to the next, a level has at most, repeats not counted."""
    spec, parents = recipe.spec, num_parents(recipe.spec, level)
    return (
        num_evaluations(parents * spec.candidates.count, parents, spec.early_eval.rungs) if spec.candidates.count else 0
    )


def planned_epochs(recipe: Recipe) -> dict[str, float]:
    """Epochs by phase that the whole search trains, repeats and speculative evaluations not counted."""
    spec, levels = recipe.spec, len(recipe.densities)
    distillation = dense_distillation_config(spec)
    early_eval = sum(early_eval_epochs(recipe, level) for level in range(1, levels + 1))
    return {
        "dense": spec.dense.epochs + (distillation.epochs if distillation else 0.0),
        "early evaluation": early_eval,
        "fine-tuning": levels * spec.select.keep * finetune_config(recipe, 1).epochs,
        "IMP baseline": levels * finetune_config(recipe, 1, imp=True).epochs if has_baseline(spec) else 0.0,
    }
