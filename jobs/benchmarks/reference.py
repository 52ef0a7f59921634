"""The method written plainly in one process, without regard to speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raymask.core.masking.samplers import votes_from_ratio
from raymask.data.types import TokenizedSplit
from raymask.train.trainer import Autocast

LENGTH = 128  # every batch is padded to it


def tally(weight: Tensor, density: float, exponent: float, draws: int, rng: torch.Generator) -> Tensor:
    """How often each entry of `weight` is among the k drawn without replacement, in `draws` draws; float32."""
    scores = weight.abs().reshape(-1) ** exponent
    probabilities = scores / scores.sum()
    count = int(len(scores) * density)
    votes = torch.zeros(len(scores))
    for _ in range(draws):
        votes[torch.multinomial(probabilities, count, replacement=False, generator=rng)] += 1
    return votes.view(weight.shape)


def voted(weight: Tensor, density: float, exponent: float, ratio: float, rng: torch.Generator) -> Tensor:
    """The method's mask of one matrix, bool: the k entries with most votes."""
    count = int(weight.numel() * density)
    votes = tally(weight, density, exponent, votes_from_ratio(weight.numel(), count, ratio), rng)
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[votes.reshape(-1).topk(count).indices] = True
    return mask.view(weight.shape)


def padded(rows: TokenizedSplit, chosen: np.ndarray, padding: int) -> dict[str, Tensor]:
    """Rows as a batch of LENGTH tokens each."""
    grid = np.full((len(chosen), LENGTH), padding)
    types, inside = np.zeros_like(grid), np.zeros_like(grid)
    for line, row in enumerate(chosen):
        start, end = rows.offsets[row], rows.offsets[row + 1]
        grid[line, : end - start] = rows.ids[start:end]
        inside[line, : end - start] = 1
        if rows.types is not None:
            types[line, : end - start] = rows.types[start:end]
    batch = {"input_ids": grid, "token_type_ids": types, "attention_mask": inside, "labels": rows.labels[chosen]}
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def train(
    module: nn.Module,
    rows: TokenizedSplit,
    *,
    padding: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    warmup: float,
    constant: bool,
    mask: Mapping[str, Tensor],
    autocast: Autocast,
    rng: np.random.Generator,
    look: Callable[[int], None] = lambda step: None,
) -> None:
    """Shuffled batches, all attentions and hidden states asked for, AdamW, and parameters masked one by one."""
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.0)
    warm = warmup * steps

    def pace(step: int) -> float:
        return step / warm if step < warm else 1.0 if constant else (steps - step) / (steps - warm)

    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: pace(step) * learning_rate / optimizer.defaults["lr"]
    )
    order: list[int] = []
    module.train()
    for step in range(1, steps + 1):
        if not order:
            order = list(rng.permutation(len(rows)))
        chosen, order = np.array(order[:batch_size]), order[batch_size:]
        batch = padded(rows, chosen, padding)
        with autocast():
            outputs = module(**batch, output_attentions=True, output_hidden_states=True)
        outputs.loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for name, parameter in module.named_parameters():
            if name in mask:
                parameter.data *= mask[name]
        look(step)
    module.eval()


@torch.no_grad()
def evaluate(
    module: nn.Module, rows: TokenizedSplit, padding: int, autocast: Autocast, batch_size: int = 64
) -> tuple[float, float]:
    """Mean loss and accuracy over rows padded to LENGTH."""
    module.eval()
    loss = right = 0.0
    for start in range(0, len(rows), batch_size):
        batch = padded(rows, np.arange(start, min(start + batch_size, len(rows))), padding)
        with autocast():
            logits = module(**batch, output_attentions=True, output_hidden_states=True).logits.float()
        loss += float(F.cross_entropy(logits, batch["labels"], reduction="sum"))
        right += int((logits.argmax(-1) == batch["labels"]).sum())
    module.train()
    return loss / len(rows), right / len(rows)
