"""What does the teacher say of a batch, and for whom else is it kept?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MEMORY = 2**31  # bytes of outputs that a worker keeps at most


@dataclass(frozen=True)
class Lesson:
    """The teacher's outputs for a batch, by transformers' names: logits, and a tensor a layer of the others."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.logits, *self.hidden_states, *self.attentions)


class Teacher:
    """The dense model, which answers the batches of one training after another.

    Candidates of a level meet the same batches in the same order, so the answers are kept for the next candidate, from
    the first batch on for as long as `memory` bytes last. Kept or not, they are the same numbers.
    """

    def __init__(self, module: nn.Module, memory: int = MEMORY) -> None:
        self.module = module
        self.memory = memory
        self.order: object = None
        self.kept: list[Lesson] = []
        self.room = 0
        self.next = 0

    def begin(self, order: object, first: int = 0, *, keep: bool) -> Teacher:
        """Start after the `first` batches of an `order`, for which equal values stand for equal batches."""
        if order != self.order:
            self.order, self.kept, self.room = order, [], self.memory if keep else 0
        self.next = first
        return self

    def __call__(self, **inputs: Any) -> Lesson:
        index, self.next = self.next, self.next + 1
        if index < len(self.kept):
            return self.kept[index]
        found = self.module(**inputs)
        lesson = Lesson(
            rounded(found.logits), tuple(map(rounded, found.hidden_states)), tuple(map(rounded, found.attentions))
        )
        size = sum(tensor.nbytes for tensor in lesson.tensors())
        if index == len(self.kept) and size <= self.room:
            self.kept.append(lesson)
            self.room -= size
        return lesson


def rounded(values: Tensor) -> Tensor:
    """Under autocast, in its type: half the memory, and no less exact than the products that they come from."""
    kind = values.device.type
    return values.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else values


def memory(rows: int, lengths: Any, config: Any, words: int = 0) -> int:
    """Bytes that the answers to batches of `rows` rows in all take, about, at most MEMORY; `lengths` of such rows,
    `words`: logits of a token, where each has its own."""
    try:
        layers, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    except AttributeError:
        return MEMORY
    tokens, pairs = float(lengths.mean()), float((lengths.astype(float) ** 2).mean())
    return min(MEMORY, int(4 * rows * (tokens * (width * (layers + 1) + words) + pairs * heads * layers)))
