"""How is a model trained and measured, with or without a mask, with or without a teacher?"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raymask.core import seeds
from raymask.core.masks import Mask
from raymask.core.records import Stage
from raymask.core.seeds import derive
from raymask.core.spec import Optimizer
from raymask.train.data import Rows
from raymask.train.gang import ALONE, Gang, tree_sum
from raymask.train.kernels import kernels_for
from raymask.train.model import vocabulary
from raymask.train.objectives import NOTHING, Batch, Counts, Objective, counts
from raymask.train.sharding import beside, local

BUCKET = 50  # batches that are sorted by length together: little padding, still a new mix every epoch
EVAL_BATCH = 128
OUTPUTS = 2**28  # bytes of float32 outputs of a batch without training, where they are of every token and word

Autocast = Callable[[], AbstractContextManager[object]]


def steps_in(stage: Stage, rows: int) -> int:
    """Optimizer steps of a stage: its epochs, which may be a fraction, at least one step unless there are none."""
    return max(1, round(stage.epochs * per_epoch(stage, rows))) if stage.epochs > 0 else 0


def per_epoch(stage: Stage, rows: int) -> int:
    """Batches that cover every row once."""
    return math.ceil(rows / stage.batch_size)


def train(
    module: nn.Module,
    rows: Rows,
    stage: Stage,
    *,
    padding: int,
    seed: int,
    mask: Mask,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    autocast: Autocast,
    teacher: Callable[..., Any] | None,
    objective: Objective,
    looks: Container[int],
    look: Callable[[int], None],
    tell: Callable[[float], None],
    steps: tuple[int, int] | None = None,
    gang: Gang = ALONE,
) -> None:
    """Train in place, the mask applied before the first and after every optimizer step.

    `seed` fixes the order of rows and the dropout, so two
    masks see the same of both. After each step in `looks` `look(step)` is called, in evaluation mode; `tell` gets the
    share of them that is done. `steps`: only those after so many, until so many are done. `gang`: who trains the same
    model at the same time; every member ends with the same bits.
    """
    parameters = dict(module.named_parameters())
    pruned = [local(parameters[name]) for name in mask]
    masks = [mask[name].to(weight.dtype) for name, weight in zip(mask, pruned, strict=True)]
    device = next(module.parameters()).device
    total = steps_in(stage, len(rows))
    begin, end = steps or (0, total)
    batches = endless(rows, stage.batch_size, seed, begin)

    def backward(part: np.ndarray, whole: Counts) -> None:
        batch = moved(collate(rows, part, padding), device)
        with autocast(), kernels():
            if teacher:
                loss = distillation(module, teacher, batch, objective, whole)
            else:
                loss = task_loss(module, batch, objective, whole)
        loss.backward()  # type: ignore[no-untyped-call]

    torch.manual_seed(derive(seed, seeds.DROPOUT, *([begin] if begin else [])))
    multiply(pruned, masks)
    module.train()
    kernels = kernels_for(module, device)
    for step in range(begin + 1, end + 1):
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * pace(stage, step, total)
        chosen = next(batches)
        whole = counts(rows.lengths[chosen])
        if gang.cut:  # which sums the gradients as it computes them
            backward(*shard(chosen, whole, gang.rank, gang.size, derive(seed, seeds.DROPOUT, step)))
        elif stage.shards == 1:
            backward(chosen, whole)
        else:
            dropout = derive(seed, seeds.DROPOUT, step)
            sum_of_shards(parameters.values(), backward, chosen, whole, stage.shards, dropout, gang)
        nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        multiply(pruned, masks)
        if step in looks:
            module.eval()
            look(step)
            module.train()
        tell((step - begin) / (end - begin))
    module.eval()


def shard(chosen: np.ndarray, whole: Counts, number: int, shards: int, seed: int) -> tuple[np.ndarray, Counts]:
    """The rows of one of so many shards, and what to divide their sums by; the seed is that of each shard's dropout."""
    torch.manual_seed(derive(seed, seeds.SHARD, number))
    rows = chosen[number::shards]  # each has some of the long ones
    return (rows, whole) if len(rows) else (chosen[:1], NOTHING)


def sum_of_shards(
    parameters: Collection[nn.Parameter],
    backward: Callable[[np.ndarray, Counts], None],
    chosen: np.ndarray,
    whole: Counts,
    shards: int,
    seed: int,
    gang: Gang,
) -> None:
    """Leave a batch's gradients with the parameters, summed over its shards, those of the gang's others too.

    `backward` gets the rows of one shard and what to divide its sums by.
    """
    used: list[nn.Parameter] = []

    def gradients() -> Iterator[Tensor]:
        for number in gang.mine(shards):
            backward(*shard(chosen, whole, number, shards, seed))
            used[:] = [parameter for parameter in parameters if parameter.grad is not None]
            yield torch.cat([parameter.grad.flatten() for parameter in used if parameter.grad is not None])
            for parameter in used:
                parameter.grad = None

    total = tree_sum(gradients())
    gang.add_up(total)
    sizes = [parameter.numel() for parameter in used]
    for parameter, gradient in zip(used, torch.split(total, sizes), strict=True):
        parameter.grad = gradient.view_as(parameter)


def multiply(weights: list[Tensor], masks: list[Tensor]) -> None:
    """weights *= masks, in one call."""
    if weights:
        torch._foreach_mul_(weights, masks)


def pace(stage: Stage, step: int, total: int) -> float:
    """The share in (0, 1] of the peak learning rate at step 1..total: linear warm-up, then constant or linear decay."""
    warm = round(stage.warmup * total)
    if step <= warm:
        return step / warm
    return 1.0 if stage.schedule == "constant" else (total - step + 1) / (total - warm)


def endless(rows: Rows, size: int, seed: int, begin: int = 0) -> Iterator[np.ndarray]:
    """Rows of the batches after the first `begin`, epoch after epoch, each row once an epoch, like lengths together."""
    epoch, skipped = divmod(begin, math.ceil(len(rows) / size))
    while True:
        rng = np.random.default_rng(derive(seed, seeds.ORDER, epoch))
        yield from order(rows.lengths, size, rng)[skipped:]
        epoch, skipped = epoch + 1, 0


def order(lengths: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffle, sort by length within buckets, cut into batches, and shuffle the batches."""
    shuffled = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(shuffled), size * BUCKET):
        bucket = shuffled[start : start + size * BUCKET]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def collate(rows: Rows, chosen: np.ndarray, padding: int) -> Batch:
    """Rows as tensors padded to the longest: input_ids, attention_mask (token_type_ids) int64, and labels."""
    lengths = rows.lengths[chosen]
    inside = np.arange(lengths.max()) < lengths[:, None]
    where = (rows.offsets[chosen][:, None] + np.arange(lengths.max()))[inside]

    def padded(values: np.ndarray, filler: int) -> Tensor:
        grid = np.full(inside.shape, filler, np.int64)
        grid[inside] = values[where]
        return torch.from_numpy(grid)

    batch = {
        "input_ids": padded(rows.ids, padding),
        "attention_mask": torch.from_numpy(inside.astype(np.int64)),
        "labels": torch.from_numpy(rows.labels[chosen]),
    }
    if rows.types is not None:
        batch["token_type_ids"] = padded(rows.types, 0)
    return batch


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on its device; to a GPU from pinned memory, so that the host need not wait."""
    if device.type == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def task_loss(module: nn.Module, batch: Batch, objective: Objective, whole: Counts) -> Tensor:
    """The mean loss against the labels; `whole`: the counts of the batch, or of one that it is a part of."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return objective.hard(module(**inputs).logits, batch).sum() / objective.targets(whole)


def distillation(
    module: nn.Module, teacher: Callable[..., Any], batch: Batch, objective: Objective, whole: Counts
) -> Tensor:
    """Sum over layers of MSE of attention probabilities and of hidden states, plus the objective's soft targets.

    A student of half the teacher's layers, a third, ..., is held against every second, third, ... of them.
    Means are over real tokens only, so padding changes nothing; `whole` as in `task_loss`.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    student_out = module(**inputs, output_attentions=True, output_hidden_states=True)
    with torch.no_grad():
        teacher_out = teacher(**inputs, output_attentions=True, output_hidden_states=True)
    real = batch["attention_mask"].float()
    loss = objective.soft(student_out.logits, teacher_out.logits, batch).sum() / objective.targets(whole)
    (words, *states), (their_words, *their_states) = student_out.hidden_states, teacher_out.hidden_states
    for mine, theirs in [(words, their_words), *peers(states, their_states)]:
        loss = loss + ((mine.float() - theirs.float()).square().mean(-1) * real).sum() / whole.tokens
    for mine, theirs in peers(student_out.attentions, teacher_out.attentions):
        error = (mine.float() - theirs.float()).square().sum(-1).mean(1)  # over keys, then heads: (rows, queries)
        loss = loss + (error * real).sum() / whole.pairs
    return loss


def peers(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """A student's layers, each with a teacher's, evenly spaced up to the last. ValueError where they do not divide."""
    apart = len(theirs) // len(mine)
    return zip(mine, theirs[apart - 1 :: apart], strict=True)


@torch.no_grad()
def predict(
    module: nn.Module, rows: Rows, *, padding: int, autocast: Autocast, objective: Objective, gang: Gang = ALONE
) -> Tensor:
    """The objective's answers for all rows, float32 (rows, few), on the CPU and in the rows' order.

    The module is in eval mode. A gang shares the work, and all its members get the same bits.
    """
    device = next(module.parameters()).device
    size = rows_at_once(module, rows, objective)
    batches = np.split(np.argsort(rows.lengths, kind="stable"), range(size, len(rows), size))
    sharing = gang if len(batches) >= gang.size else ALONE
    mine = batches[sharing.rank :: sharing.size]
    missing = -(-len(batches) // sharing.size) - len(mine)  # where a model is cut, all must compute equally often
    found = []
    for chosen in (*mine, *batches[: missing * gang.cut]):
        batch = moved(collate(rows, chosen, padding), device)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with autocast():
            logits = module(**inputs).logits
        found.append(objective.answers(logits, batch))
    answers = torch.zeros(len(rows), found[0].shape[1], device=device)
    answers[torch.from_numpy(np.concatenate(mine)).to(device)] = torch.cat(found[: len(mine)])
    sharing.add_up(answers.view(-1))
    return answers.cpu()


def rows_at_once(module: nn.Module, rows: Rows, objective: Objective) -> int:
    """How many rows a batch without training has: as many as their outputs leave room for, at least one."""
    if not objective.per_token:
        return EVAL_BATCH
    row = 4 * int(rows.lengths.max()) * vocabulary(module.config)
    return max(1, min(EVAL_BATCH, OUTPUTS // row))


def make_optimizer(module: nn.Module, settings: Optimizer, state: Mapping[str, Tensor] | None) -> torch.optim.Optimizer:
    """The spec's optimizer over all parameters, continuing from `state` as `optimizer_state` gives it."""
    optimizer = OPTIMIZERS[settings.name](module.parameters(), weight_decay=settings.weight_decay)
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in (state or {}).items():
        moment, _, name = key.partition("/")
        moments.setdefault(name, {})[moment] = value
    for name, parameter in module.named_parameters():
        if name in moments:  # else it never got a gradient
            mine = moments[""] | moments[name]
            optimizer.state[parameter] = {key: beside(parameter, value) for key, value in mine.items()}
    return optimizer


def adafactor(parameters: Iterable[nn.Parameter], weight_decay: float) -> torch.optim.Optimizer:
    """One tensor after the other, since torch's foreach makes a copy of all of them.

    Gradients count as 1e-12 at least, below which the product of two squares would underflow. Torch's own floor, the
    type's resolution, lies above nearly all of a large model's gradients: with it a step in bf16 is no step.
    """
    return torch.optim.Adafactor(parameters, eps=(1e-12, 1e-3), weight_decay=weight_decay, foreach=False)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adafactor": adafactor,
}


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flat tensors: `step`, 0-d float32, and `<moment>/<parameter>`; empty before a step.

    AdamW's moments are shaped as the parameter; Adafactor's have a last dimension of 1 (row_var), or the one before it
    (col_var), and are shaped as the parameter where that is no matrix (variance).
    """
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            state["step" if moment == "step" else f"{moment}/{name}"] = value
    return state
