"""Records of a task's rows: as they stand in their files, as texts, and as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from raymask.data.files import Columns
from raymask.data.metrics import compute_metrics


@dataclass(frozen=True)
class RawTask:
    """A classification or regression task as it stands in its files.

    Attributes:
        splits: The tables of "train", "validation" where it has rows of its own, and "test"; one a subset.
        text: One or two text columns.
        label: The label column.
        classes: Class names in the order of their numbers in the rows; empty where the labels alone say them.
        kind: "classification" or "regression".
        subsets: Names of the tables of `test`: "matched" and "mismatched" for MNLI, else one named "".
        metrics: The task's default metrics.
        max_length: The task's default limit, in tokens.
    """

    splits: dict[str, list[Columns]]
    text: Sequence[str]
    label: str
    classes: tuple[str, ...]
    kind: str
    subsets: tuple[str, ...]
    metrics: tuple[str, ...]
    max_length: int


@dataclass(frozen=True)
class Classes:
    """The classes of a classification, in the order of the model's outputs.

    Attributes:
        names: What the model calls them.
        labels: What the rows call them.
        positive: The number of the class that F1 is of, where there are two.
    """

    names: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    positive: int = 1


@dataclass(frozen=True)
class Examples:
    """One split before tokenization.

    Attributes:
        columns: One or two lists of texts, [rows] each.
        labels: [rows], int64 class numbers, or float32 for a regression.
        where: The file or split that the rows come from, for messages.
        rows: Their numbers there from 1, int64 [rows]; None for all rows.
    """

    columns: tuple[list[str], ...]
    labels: np.ndarray
    where: str = ""
    rows: np.ndarray | None = None

    def place(self, index: int) -> str:
        """Where a row comes from, for messages."""
        return f"{self.where}: row {index + 1 if self.rows is None else self.rows[index]}"

    def take(self, indices: np.ndarray) -> Examples:
        """The rows of these indices, int64."""
        return Examples(
            tuple([texts[index] for index in indices] for texts in self.columns),
            self.labels[indices],
            self.where,
            indices + 1 if self.rows is None else self.rows[indices],
        )


@dataclass(frozen=True)
class RawDataset:
    """A classification or regression task before tokenization.

    Attributes:
        train: Training rows.
        validation: Rows for every choice that the search makes.
        test: Rows for the final metrics; no choice depends on them.
        subsets: Named (start, end) row ranges of `test`: "matched" and "mismatched" for MNLI, else one named "".
        classes: Class names in the order of their numbers; empty for a regression.
        metrics: Names of the metrics.
        max_length: The longest row, in tokens.
        class_labels: What the rows call the classes, in the same order; empty for a regression.
        positive: The number of the class that F1 is of, where there are two.
    """

    train: Examples
    validation: Examples
    test: Examples
    subsets: dict[str, tuple[int, int]]
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    max_length: int
    class_labels: tuple[str, ...] = ()
    positive: int = 1

    @property
    def outputs(self) -> int:
        """Outputs of the model's head: one a class, or one for a regression."""
        return len(self.classes) or 1

    @property
    def kind(self) -> str:
        """The spec's task.kind: "classification" or "regression"."""
        return "classification" if self.classes else "regression"


@dataclass(frozen=True)
class TokenizedSplit:
    """One split as token ids. Row i is `ids[offsets[i]:offsets[i + 1]]`.

    Attributes:
        ids: int32 [tokens], the token ids of all rows.
        types: int8 [tokens], the token type ids; None if the tokenizer gives none.
        offsets: int64 [rows + 1], where each row begins, and the end of the last.
        labels: [rows], int64 or float32; all 0 for a language model.
    """

    ids: np.ndarray
    types: np.ndarray | None
    offsets: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.offsets)

    def sample(self, count: int, seed: int) -> TokenizedSplit:
        """At most `count` rows, drawn without replacement from the seed, in their original order."""
        if count >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False)))

    def take(self, indices: np.ndarray) -> TokenizedSplit:
        """The rows of these indices, int64 in ascending order."""
        tokens = np.repeat(np.isin(np.arange(len(self)), indices), self.lengths)
        return TokenizedSplit(
            self.ids[tokens],
            None if self.types is None else self.types[tokens],
            np.concatenate([[0], np.cumsum(self.lengths[indices])]),
            self.labels[indices],
        )


@dataclass(frozen=True)
class TaskData:
    """A task's three splits as token ids, with what training and metrics need.

    Attributes:
        train: Training rows.
        validation: Rows for every choice that the search makes.
        test: Rows for the final metrics; no choice depends on them.
        subsets: Named (start, end) row ranges of `test`: "matched" and "mismatched" for MNLI, else one named "".
        metrics: Names of the metrics.
        kind: The spec's task.kind.
        padding: The token id that pads batches. The default is for models that ignore all padding.
        positive: The number of the class that F1 is of, where there are two.
    """

    train: TokenizedSplit
    validation: TokenizedSplit
    test: TokenizedSplit
    subsets: dict[str, tuple[int, int]]
    metrics: tuple[str, ...]
    kind: str
    padding: int = 0
    positive: int = 1

    def fingerprint(self) -> str:
        """A digest of all token ids, labels and splits (BLAKE2b, 128 bits, hex)."""
        state = blake2b(digest_size=16)
        for rows in (self.train, self.validation, self.test):
            for array in (rows.ids, rows.offsets, rows.labels):
                state.update(np.ascontiguousarray(array).data)
        return state.hexdigest()

    def compute_metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Compute the task's metrics by name; logits and labels of some rows as in `metrics.compute_metrics`."""
        return compute_metrics(self.metrics, logits, labels, self.positive)

    def test_metrics(self, logits: np.ndarray, rows: np.ndarray | None = None) -> dict[str, float]:
        """Compute the task's metrics on `test`.

        Args:
            logits: float32 [rows of `test`, outputs], or [rows of `test`, 2] for a language model (`compute_metrics`).
            rows: Row numbers of a resample, int64; None for all rows.

        Returns:
            Values by metric name, prefixed with the subset's name where it has one.
        """
        rows = np.arange(len(self.test)) if rows is None else rows
        metrics = {}
        for subset, (start, end) in self.subsets.items():
            inside = rows[(rows >= start) & (rows < end)]
            for name, value in self.compute_metrics(logits[inside], self.test.labels[inside]).items():
                metrics[f"{subset} {name}".strip()] = value
        return metrics
