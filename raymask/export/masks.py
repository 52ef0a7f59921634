"""Export of the selected mask, and of the recipe that draws every level's mask again.

mask.safetensors   the selected mask as packed bits
recipe.json        for each level: the winning candidate, its mask's digest, the weights that the mask was drawn from,
                   and the arguments with which raymask.draw_mask draws it from these weights
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from raymask.core.errors import UserError
from raymask.core.lineage import SEARCH
from raymask.core.masking.masks import digest, pack_bits
from raymask.core.records import Candidate, LevelRecord
from raymask.core.spec import Spec
from raymask.export.selected import SelectedModel, megabytes
from raymask.runs.run_dir import MASK, MODEL, bits_to_tensors, level_name, tensors_to_bits, write_tensors
from raymask.version import __version__

RECIPE = "recipe.json"


def write_masks(selected: SelectedModel, folder: Path) -> list[str]:
    """Write the selected mask and the recipe of all levels' masks.

    Args:
        selected: The selected model.
        folder: The folder to fill.

    Returns:
        Lines about what was written and checked.

    Raises:
        UserError: When the written mask has another digest than the selected one.
    """
    result, spec = selected.result, selected.spec
    write_tensors(folder / MASK, bits_to_tensors(pack_bits(selected.mask)))
    recipe = {
        "raymask": __version__,
        "model": result.model,
        "task": result.task,
        "mask": spec.mask.model_dump(),
        "levels": [level_recipe(level, spec) for level in result.levels],
    }
    (folder / RECIPE).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    last = result.levels[-1]
    if digest(tensors_to_bits(load_file(folder / MASK))) != last.digest:
        raise UserError(f"{MASK}: the file does not hold the mask that was written")
    recipe_line = f"{RECIPE}: the arguments with which raymask.draw_mask draws every level's mask again"
    if spec.mask.score != "magnitude":
        recipe_line = (
            f"{RECIPE}: the winners. {spec.mask.score} needs rows of the task, so only a search draws them again"
        )
    return [
        f"{MASK}: {megabytes((folder / MASK).stat().st_size)}, one bit for each of {last.num_prunable:,} weights",
        recipe_line,
        f"Checked: the mask in the file has the selected mask's digest, {last.digest}",
    ]


def level_recipe(level: LevelRecord, spec: Spec) -> dict[str, Any]:
    """A level's entry in the recipe. `draw_mask` is None for scores that need rows of the task."""
    return {
        "level": level.level,
        "kept": level.num_kept,
        "total": level.num_prunable,
        "digest": level.digest,
        "candidate": level.winner.candidate.model_dump(),
        "drawn_from": parent_file(level.parent_key),
        "draw_mask": draw_mask_options(level.winner.candidate, spec) if spec.mask.score == "magnitude" else None,
    }


def parent_file(parent: str) -> dict[str, str]:
    """The run's file with a level's parent weights and the first digits of its SHA-256, from the parent's key."""
    lineage, level, contents = parent.rsplit("-", 2)
    return {
        "file": f"{level_name(SEARCH if lineage == 'search' else lineage, int(level))}/{MODEL}",
        "sha256_begins": contents,
    }


def draw_mask_options(candidate: Candidate, spec: Spec) -> dict[str, Any]:
    """The arguments of `raymask.draw_mask`, apart from the model, that draw this candidate's mask."""
    noise = candidate.noise
    return {
        "density": candidate.density,
        **(
            {"seed": candidate.seed, "exponent": noise.exponent, "sampling_ratio": noise.sampling_ratio}
            if noise
            else {}
        ),
        "sampler": spec.candidates.sampler,
        "allocation": spec.mask.allocation,
        "pattern": spec.mask.pattern,
        "include": list(spec.model.include),
        "exclude": list(spec.model.exclude),
    }
