"""Setup of a search: data, model configuration, and the checks that need no weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from raymask.core import seeds
from raymask.core.errors import UserError
from raymask.core.masking import masks
from raymask.core.recipe import Recipe, resolve
from raymask.core.seeds import derive
from raymask.core.spec import Spec, Task
from raymask.core.tasks import Snapshot
from raymask.data.causal_lm import Documents
from raymask.data.task import load_dataset, tokenize_dataset
from raymask.data.types import RawDataset
from raymask.testing import check_allocation, check_sampler, check_score
from raymask.train.context import WorkerContext
from raymask.train.device import free_memory, native_bf16
from raymask.train.dry_run import MAX_BATCH_EFFECT, dry_run, dry_run_memory
from raymask.train.model import ModelInfo, inspect_model, load_weights, read_config


@dataclass(frozen=True)
class SearchSetup:
    """Everything that is known before the first training step.

    Attributes:
        recipe: What was asked, resolved to functions.
        tokenizer: The transformers tokenizer.
        dataset: The raw data.
        context: What every worker needs, tokenized data included.
    """

    recipe: Recipe
    tokenizer: Any
    dataset: RawDataset | Documents
    context: WorkerContext

    @property
    def model_info(self) -> ModelInfo:
        """The model without its weights."""
        return self.context.model


def prepare(spec: Spec, *, test_only: bool = False) -> SearchSetup:
    """Read the data and the model's configuration. Weights are read later, when they are needed.

    Args:
        spec: The spec.
        test_only: Read `test` alone, and leave the other splits without rows: enough to evaluate, not to search.

    Raises:
        UserError: Model or data cannot be read, they do not fit each other, or the masks cannot be made.
    """
    recipe = resolve(spec)
    require_own_functions(recipe)
    config, tokenizer = read_config(spec.model)
    dataset = load_dataset(spec, config, test_only=test_only)
    model_info = inspect_model(
        spec.model, config, dataset.classes, dataset.kind, gradient_checkpointing=spec.gradient_checkpointing
    )
    require_masks(model_info, recipe)
    data = tokenize_dataset(dataset, tokenizer, config)
    return SearchSetup(recipe, tokenizer, dataset, WorkerContext(spec, model_info, data))


def require_own_functions(recipe: Recipe) -> None:
    """Check the functions that the spec names by import path: of a broken one a search would notice late or never.

    Raises:
        UserError: A function breaks a rule, or fails.
    """
    method = recipe.method
    checks = {
        "mask.allocation": partial(check_allocation, method.allocation),
        "mask.score": partial(check_score, method.scorer),
        "candidates.sampler": partial(check_sampler, method.sampler),
    }
    own = recipe.spec.import_paths
    for key in [key for key in checks if key in own]:
        try:
            checks[key]()
        except AssertionError as error:
            raise UserError(f"{key}: {own[key]} breaks a rule. {error}") from None
        except Exception as error:  # noqa: BLE001 - a function of the user's own may raise anything
            raise UserError(f"{key}: {own[key]} fails with {type(error).__name__}: {error}") from None


def apply_dry_run(setup: SearchSetup, say: Callable[[str], None]) -> SearchSetup:
    """Read the model's weights, and try a few steps of everything that the spec asks of it.

    Args:
        setup: The setup.
        say: Called with a line for everything that the user should know.

    Returns:
        The setup, with what a step takes of memory, and with workers that compute in fp32 where the model fails in bf16
        and the spec leaves it open.

    Raises:
        UserError: The weights cannot be used, or the model fails.
    """
    context, name, weights = setup.context, setup.recipe.spec.model.name, load_initial(setup).weights
    needed, free = dry_run_memory(context), free_memory()
    if needed > free:
        say(f"not tried before the search: a few steps take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free here")
        return setup
    found = dry_run(context, weights)
    if found.error:
        say(f"{name} fails in bf16 ({found.error}): it is trained in fp32")
    if found.batch_effect > MAX_BATCH_EFFECT:
        say(
            f"warning: the outputs of {name} for a row depend on the rows beside it in a batch, by up to "
            f"{found.batch_effect:.0%} of the largest output: it does not ignore padding. Its metrics hold for "
            "raymask's batches only; alone, rows may get other answers"
        )
    spec = context.spec.model_copy(update={"precision": found.precision})
    # it was tried in bf16, which takes half as much
    scale = 2 if found.precision == "auto" and not native_bf16(torch.device("cpu")) else 1
    return replace(setup, context=replace(context, spec=spec, activation_bytes=scale * found.activation_bytes))


def require_distinct_splits(task: Task) -> None:
    """Check that no two splits are the same file.

    Raises:
        UserError: Two of `task.train`, `task.validation` and `task.test` are.
    """
    files = {key: path for key in ("train", "validation", "test") if (path := getattr(task, key)) is not None}
    for key, other in combinations(files, 2):
        if Path(files[key]).resolve() == Path(files[other]).resolve():
            what = "trained on" if key == "train" else "chosen by"
            raise UserError(
                f"task.{other}: is the file of task.{key}: give a file with rows that the model is not {what}"
            )


def require_masks(model_info: ModelInfo, recipe: Recipe) -> None:
    """Check that every prunable matrix can have a mask as the recipe asks for.

    Raises:
        UserError: The pattern does not divide a matrix, or the last level keeps none of its weights.
    """
    require_divisible(model_info, recipe)
    require_nonzero_density(model_info, recipe)


def require_divisible(model_info: ModelInfo, recipe: Recipe) -> None:
    """Check that the pattern's blocks divide every prunable matrix.

    Raises:
        UserError: They do not divide some matrix.
    """
    for name, shape in masks.matrix_shapes(model_info.shapes).items():
        if not recipe.method.pattern.divides(shape):
            raise UserError(
                f"mask.pattern: {recipe.spec.mask.pattern} does not divide {name} of "
                f"{' x '.join(map(str, shape))}: choose another, or leave such matrices out with model.exclude"
            )


def require_nonzero_density(model_info: ModelInfo, recipe: Recipe) -> None:
    """Check that the last level keeps weights of every matrix, or of every set of matrices that share a budget.

    Raises:
        UserError: It keeps none of some matrix or set.
    """
    density = recipe.densities[-1]
    shapes = masks.matrix_shapes(model_info.shapes)
    max_kept = masks.max_kept(shapes, density, recipe.method)
    num_weights = {names: sum(math.prod(shapes[name]) for name in names) for names in max_kept}
    smallest = min(max_kept, key=lambda names: (max_kept[names], num_weights[names]))
    if max_kept[smallest] == 0:
        raise UserError(
            f"levels: a sparsity of {1 - density:g} keeps none of the {num_weights[smallest]:,} weights of "
            f"{', '.join(smallest)}: lower it, or leave small matrices out with model.exclude"
        )


def load_initial(setup: SearchSetup) -> Snapshot:
    """The model as the spec names it, before any training.

    Raises:
        UserError: The weights cannot be read.
    """
    spec, model_info = setup.recipe.spec, setup.model_info
    is_finetuned = spec.dense.epochs == 0
    head_seed = derive(spec.seed, seeds.HEAD)
    weights = load_weights(spec.model, model_info.config, head_seed, is_finetuned, model_info.kind)
    return Snapshot("initial", weights)
