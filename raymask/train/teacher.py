"""Teacher forward pass, with its outputs cached for the next candidates of the level.

These train on the same batches in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MAX_CACHE_BYTES = 2**31  # bytes of outputs that a worker caches at most


HIDDEN_STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
ATTENTIONS = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
"""transformers' names of outputs by layer; the last ones are those of models with an encoder and a decoder."""


@dataclass(frozen=True)
class TeacherOutputs:
    """The teacher's outputs for a batch.

    Attributes:
        logits: [rows, outputs], or [rows, tokens, vocabulary] for a language model.
        layers: By names of HIDDEN_STATES and ATTENTIONS, as far as the model has them: hidden states of the embeddings
            and of each layer, [rows, tokens, width], and attention probabilities, [rows, heads, tokens, tokens].
    """

    logits: Tensor
    layers: dict[str, tuple[Tensor, ...]]

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return (self.logits, *(tensor for tensors in self.layers.values() for tensor in tensors))


def layer_outputs(outputs: Any) -> dict[str, tuple[Tensor, ...]]:
    """`TeacherOutputs.layers` of a model's outputs. Layers without attention, such as convolutions, are left out.

    Raises:
        ValueError: The model returns no hidden states.
    """
    if isinstance(outputs, TeacherOutputs):
        return outputs.layers
    layers = {}
    for name in (*HIDDEN_STATES, *ATTENTIONS):
        tensors = tuple(tensor for tensor in getattr(outputs, name, None) or () if tensor is not None)
        if tensors:
            layers[name] = tensors
    if not layers.keys() & set(HIDDEN_STATES):
        raise ValueError("the model returns no hidden states to distil")
    return layers


class Teacher:
    """The dense model as a teacher, with a cache.

    The candidates of a level train on the same batches in the same order. So the outputs are cached for the next
    candidate, from the first batch on until the cache is full. Cached outputs are the same numbers as computed ones.

    Args:
        module: The dense model, in evaluation mode.
        memory: Bytes of outputs to cache at most.
    """

    def __init__(self, module: nn.Module, memory: int = MAX_CACHE_BYTES) -> None:
        self.module = module
        self.memory = memory
        self.batch_order: object = None
        self.cached: list[TeacherOutputs] = []
        self.free_bytes = 0
        self.next_batch = 0

    def start(self, order: object, first: int = 0, *, cache: bool) -> Teacher:
        """Start a training.

        Args:
            order: Identifies the sequence of batches: equal values, equal batches. Another value empties the cache.
            first: The index of the first batch in the sequence.
            cache: Whether to cache outputs; read when the `order` changes.

        Returns:
            The teacher itself.
        """
        if order != self.batch_order:
            self.batch_order, self.cached, self.free_bytes = order, [], self.memory if cache else 0
        self.next_batch = first
        return self

    def __call__(self, **inputs: Any) -> TeacherOutputs:
        """The outputs for the next batch; `inputs` as for the module."""
        index, self.next_batch = self.next_batch, self.next_batch + 1
        if index < len(self.cached):
            return self.cached[index]
        module_outputs = self.module(**inputs)
        layers = layer_outputs(module_outputs)
        outputs = TeacherOutputs(
            to_autocast_dtype(module_outputs.logits),
            {name: tuple(map(to_autocast_dtype, tensors)) for name, tensors in layers.items()},
        )
        size = sum(tensor.nbytes for tensor in outputs.tensors())
        if index == len(self.cached) and size <= self.free_bytes:
            self.cached.append(outputs)
            self.free_bytes -= size
        return outputs


def to_autocast_dtype(values: Tensor) -> Tensor:
    """Convert to the dtype of autocast, if it is on.

    It takes half the memory, and is as exact as the matrix products that the values come from.
    """
    device_type = values.device.type
    return values.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else values


def cache_bytes(rows: int, lengths: Any, config: Any, vocabulary: int = 0) -> int:
    """Estimated bytes of cached outputs, at most MAX_CACHE_BYTES.

    Args:
        rows: The rows of all batches together.
        lengths: int64, tokens of typical rows.
        config: The teacher's transformers configuration. Without layers, width and heads in it, MAX_CACHE_BYTES is
            returned.
        vocabulary: Logits a token; 0 if only rows have logits.
    """
    try:
        layers, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    except AttributeError:
        return MAX_CACHE_BYTES
    tokens, pairs = float(lengths.mean()), float((lengths.astype(float) ** 2).mean())
    return min(MAX_CACHE_BYTES, int(4 * rows * (tokens * (width * (layers + 1) + vocabulary) + pairs * heads * layers)))
