"""The model card of an exported checkpoint."""

from __future__ import annotations

from raymask.core.records import Result
from raymask.report.text import blocks, percent, scored_line, verdict
from raymask.train.losses import TASK_LOSSES


def model_card(result: Result) -> str:
    """The card as Markdown: the results, and how they were obtained."""
    last, task_loss = result.levels[-1], TASK_LOSSES[result.kind]
    origin = f"base_model: {result.model}\n" if "/" in result.model else ""  # only hub ids have a slash
    return f"""---
{origin}library_name: transformers
tags: [{task_loss.tag}, pruned, raymask]
---
# {result.model}, pruned to {percent(last.sparsity)} for {result.task}

A plain checkpoint: `{task_loss.auto_class}.from_pretrained(...)` loads it. {last.num_prunable - last.num_kept:,} of
the {last.num_prunable:,} weights in its prunable matrices are exact zeros; `mask.safetensors` holds the mask as packed
bits (`numpy.packbits`, row-major, the shape beside each matrix). Mask digest `{last.digest}`.

## Results

On the task's `test` split, which no choice of the search has used.

{model_table(result)}

{verdict(result)}

## How they were obtained

Randomized mask search (Li et al., Findings of EMNLP 2023, arXiv 2310.13183) with raymask. At every level random masks
near the magnitude mask, and the magnitude mask itself, are trained briefly from the same parent, with the same order of
rows and the same dropout. The best one on the `validation` split, on which nothing is trained, is fine-tuned from the
parent and becomes the next parent. The magnitude mask keeps the weights with the largest scores: magnitudes, unless
`mask` in the run's spec.yaml says otherwise. "IMP" is iterative magnitude pruning: the same code with the magnitude
mask as the only candidate.
{scored_line(result)}

{level_table(result)}
"""


def model_table(result: Result) -> str:
    """The models' test metrics and sparsities as a Markdown table."""
    heads = ["model", *result.metrics, *(f"sparsity: {name}" for name in ("prunable", blocks(result.kind), "whole"))]
    lines = [
        [row.name, *(f"{row.test_metrics[name]:.4f}" for name in result.metrics), *map(percent, row.sparsity.values())]
        for row in result.models
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *lines])


def level_table(result: Result) -> str:
    """How each level's mask was selected, as a Markdown table."""
    heads = (
        "| level | sparsity | candidates | winner | distance from the magnitude mask | loss on validation |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    lines = (
        f"| {level.level} | {percent(level.sparsity)} | {level.num_evaluated} ({level.num_failed} failed) | "
        f"{level.winner.candidate.name} | {format_distance(level.winner.distance)} | "
        f"{level.finetune_result.best_eval.loss:.4f} |"
        for level in result.levels
    )
    return "\n".join([heads, *lines])


def format_distance(share: float | None) -> str:
    """A distance from the magnitude mask as text; empty for None."""
    return "" if share is None else percent(share)
