"""Batches of rows: order, collation and transfer to a device."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from raymask.core import seeds
from raymask.core.seeds import derive
from raymask.data.types import TokenizedSplit
from raymask.train.losses import Batch

BUCKET_BATCHES = 50  # batches sorted by length together: little padding, and still new batches every epoch


def batch_stream(rows: TokenizedSplit, size: int, seed: int, begin: int = 0) -> Iterator[np.ndarray]:
    """Endless batches of row indices. Each epoch has every row once; a batch has rows of similar length.

    Args:
        rows: The rows to train on.
        size: Rows a batch.
        seed: With the epoch's number it fixes the order of the rows.
        begin: How many batches to skip.

    Yields:
        int64 [size], or less in one batch of each epoch.
    """
    epoch, skipped = divmod(begin, math.ceil(len(rows) / size))
    while True:
        rng = np.random.default_rng(derive(seed, seeds.ORDER, epoch))
        yield from length_bucketed_batches(rows.lengths, size, rng)[skipped:]
        epoch, skipped = epoch + 1, 0


def length_bucketed_batches(lengths: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Batches of one epoch: shuffle, sort by length within buckets, cut into batches, and shuffle the batches.

    Args:
        lengths: int64 [rows], the tokens of each row.
        size: Rows a batch.
        rng: Draws both shuffles.

    Returns:
        Row indices by batch, int64 [size] or less.
    """
    shuffled = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(shuffled), size * BUCKET_BATCHES):
        bucket = shuffled[start : start + size * BUCKET_BATCHES]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def collate(rows: TokenizedSplit, indices: np.ndarray, padding: int) -> Batch:
    """Collate rows into tensors, padded to the longest of them.

    Args:
        rows: The split.
        indices: The rows of the batch, int64.
        padding: The token id for padding.

    Returns:
        int64 [rows, tokens]: input_ids, attention_mask and, if the split has them, token_type_ids; labels [rows].
    """
    lengths = rows.lengths[indices]
    is_token = np.arange(lengths.max()) < lengths[:, None]
    positions = (rows.offsets[indices][:, None] + np.arange(lengths.max()))[is_token]

    def padded(values: np.ndarray, fill_value: int) -> Tensor:
        grid = np.full(is_token.shape, fill_value, np.int64)
        grid[is_token] = values[positions]
        return torch.from_numpy(grid)

    batch = {
        "input_ids": padded(rows.ids, padding),
        "attention_mask": torch.from_numpy(is_token.astype(np.int64)),
        "labels": torch.from_numpy(rows.labels[indices]),
    }
    if rows.types is not None:
        batch["token_type_ids"] = padded(rows.types, 0)
    return batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to its device. The copy to a GPU is from pinned memory, so that the host does not wait."""
    if device.type == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
