"""What does the exported model's card say?"""

from __future__ import annotations

from raymask.core.records import Result
from raymask.report.words import blocks, percent, scored_line, verdict
from raymask.train.objectives import OBJECTIVES


def model_card(result: Result) -> str:
    """Markdown with the figures and how they were obtained."""
    last, objective = result.levels[-1], OBJECTIVES[result.kind]
    heads = ["model", *result.metrics, *(f"sparsity: {name}" for name in ("prunable", blocks(result.kind), "whole"))]
    lines = [
        [row.name, *(f"{row.report[name]:.4f}" for name in result.metrics), *map(percent, row.sparsity.values())]
        for row in result.rows
    ]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *lines])
    levels = "\n".join(
        f"| {level.level} | {percent(level.sparsity)} | {level.evaluated} ({level.failed} failed) | "
        f"{level.winner.candidate.name} | {distance(level.winner.distance)} | {level.finetuned.kept.loss:.4f} |"
        for level in result.levels
    )
    origin = f"base_model: {result.model}\n" if "/" in result.model else ""  # else it is no hub id
    return f"""---
{origin}library_name: transformers
tags: [{objective.tag}, pruned, raymask]
---
# {result.model}, pruned to {percent(last.sparsity)} for {result.task}

A plain checkpoint: `{objective.auto_class}.from_pretrained(...)` loads it. {last.total - last.kept:,} of
the {last.total:,} weights in its prunable matrices are exact zeros; `mask.safetensors` has the same as packed bits
(`numpy.packbits`, row-major, the shape beside each matrix). Mask digest `{last.digest}`.

## Figures

On the task's `report` split, which no choice of the search has seen.

{table}

{verdict(result)}

## How they were obtained

Randomized mask search (Li et al., Findings of EMNLP 2023, arXiv 2310.13183) with raymask: at every level random masks
near the control, and the control itself, are trained for a short while from the same parent, with the same order of
rows and the same dropout; the best by the `select` split, which is carved out of train, is fine-tuned from the parent
and becomes the next one. The control keeps the largest scores: magnitudes, unless `mask` in the run's spec.yaml says
otherwise. "control (IMP)" is iterative pruning by it through the same code.
{scored_line(result)}

| level | sparsity | candidates | winner | kept entries that the control prunes | loss on select |
| --- | --- | --- | --- | --- | --- |
{levels}
"""


def distance(share: float | None) -> str:
    """A distance from the control, empty where none was measured."""
    return "" if share is None else percent(share)
