"""How is a model trained and measured, with or without a mask, with or without a teacher?"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raymask.core.masks import Mask
from raymask.core.records import Stage
from raymask.core.seeds import derive
from raymask.core.spec import Optimizer
from raymask.train.data import Rows
from raymask.train.kernels import kernels_for
from raymask.train.model import vocabulary
from raymask.train.objectives import Batch, Counts, Objective, counts

BUCKET = 50  # batches that are sorted by length together: little padding, still a new mix every epoch
EVAL_BATCH = 128
OUTPUTS = 2**28  # bytes of float32 outputs of a batch without training, where they are of every token and word
MOMENTS = ("exp_avg", "exp_avg_sq")

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
) -> None:
    """Train in place, the mask applied before the first and after every optimizer step.

    `seed` fixes the order of rows and the dropout, so two
    masks see the same of both. After each step in `looks` `look(step)` is called, in evaluation mode; `tell` gets the
    share of them that is done. `steps`: only those after so many, until so many are done.
    """
    parameters = dict(module.named_parameters())
    pruned = [parameters[name].data for name in mask]
    masks = [mask[name].to(weight.dtype) for name, weight in zip(mask, pruned, strict=True)]
    device = next(module.parameters()).device
    total = steps_in(stage, len(rows))
    begin, end = steps or (0, total)
    batches = endless(rows, stage.batch_size, padding, seed, begin)
    torch.manual_seed(derive(seed, "dropout", *([begin] if begin else [])))
    multiply(pruned, masks)
    module.train()
    kernels = kernels_for(module, device)
    for step in range(begin + 1, end + 1):
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * pace(stage, step, total)
        batch = next(batches)
        whole, batch = counts(batch), moved(batch, device)
        with autocast(), kernels():
            loss = (
                distillation(module, teacher, batch, objective, whole)
                if teacher
                else task_loss(module, batch, objective, whole)
            )
        loss.backward()  # type: ignore[no-untyped-call]
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


def endless(rows: Rows, size: int, padding: int, seed: int, begin: int = 0) -> Iterator[Batch]:
    """Training batches after the first `begin`, epoch after epoch, every row once an epoch, like lengths together."""
    epoch, skipped = divmod(begin, math.ceil(len(rows) / size))
    while True:
        rng = np.random.default_rng(derive(seed, "order", epoch))
        for chosen in order(rows.lengths, size, rng)[skipped:]:
            yield collate(rows, chosen, padding)
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

    Means are over real tokens only, so padding changes nothing; `whole` as in `task_loss`.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    student_out = module(**inputs, output_attentions=True, output_hidden_states=True)
    with torch.no_grad():
        teacher_out = teacher(**inputs, output_attentions=True, output_hidden_states=True)
    real = batch["attention_mask"].float()
    loss = objective.soft(student_out.logits, teacher_out.logits, batch).sum() / objective.targets(whole)
    for mine, theirs in zip(student_out.hidden_states, teacher_out.hidden_states, strict=True):
        loss = loss + ((mine.float() - theirs.float()).square().mean(-1) * real).sum() / whole.tokens
    for mine, theirs in zip(student_out.attentions, teacher_out.attentions, strict=True):
        error = (mine.float() - theirs.float()).square().sum(-1).mean(1)  # over keys, then heads: (rows, queries)
        loss = loss + (error * real).sum() / whole.pairs
    return loss


@torch.no_grad()
def predict(module: nn.Module, rows: Rows, *, padding: int, autocast: Autocast, objective: Objective) -> Tensor:
    """The objective's answers for all rows, float32 (rows, few), on the CPU and in the rows' order; the module is in
    eval mode."""
    device = next(module.parameters()).device
    sorted_rows = np.argsort(rows.lengths, kind="stable")
    size = rows_at_once(module, rows, objective)
    found = []
    for start in range(0, len(rows), size):
        batch = moved(collate(rows, sorted_rows[start : start + size], padding), device)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with autocast():
            logits = module(**inputs).logits
        found.append(objective.answers(logits, batch))
    answers = torch.cat(found).cpu()
    unsorted = torch.empty_like(answers)
    unsorted[torch.from_numpy(sorted_rows)] = answers
    return unsorted


def rows_at_once(module: nn.Module, rows: Rows, objective: Objective) -> int:
    """How many rows a batch without training has: as many as their outputs leave room for, at least one."""
    if not objective.per_token:
        return EVAL_BATCH
    row = 4 * int(rows.lengths.max()) * vocabulary(module.config)
    return max(1, min(EVAL_BATCH, OUTPUTS // row))


def make_optimizer(module: nn.Module, settings: Optimizer, state: Mapping[str, Tensor] | None) -> torch.optim.AdamW:
    """AdamW over all parameters, continuing from `state` as `optimizer_state` gives it."""
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=settings.weight_decay, fused=True)
    if state:
        for name, parameter in module.named_parameters():
            if f"{MOMENTS[0]}/{name}" not in state:
                continue  # it never got a gradient
            mine = {"step": state["step"], **{moment: state[f"{moment}/{name}"] for moment in MOMENTS}}
            optimizer.state[parameter] = {key: value.to(parameter.device, copy=True) for key, value in mine.items()}
    return optimizer


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flat tensors: `step`, 0-d float32, and `<moment>/<parameter>` shaped as the parameter; empty before a step."""
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        known = optimizer.state.get(parameter)
        if known:
            state["step"] = known["step"]
            state.update({f"{moment}/{name}": known[moment] for moment in MOMENTS})
    return state
