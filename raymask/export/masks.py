"""What does somebody need who retrains elsewhere? The mask, and how to draw it, and those before it, again.

mask.safetensors   the selected mask as packed bits
recipe.json        for each level the candidate that won, its mask's digest, which weights it was drawn from, and
                   what raymask.draw_mask is to be called with on these weights
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from raymask.core.errors import UserError
from raymask.core.masks import digest, pack_bits
from raymask.core.records import Candidate, Level
from raymask.core.spec import Spec
from raymask.export.selected import Selected, megabytes
from raymask.store import MASK, MODEL, SEARCH, flat_bits, level_name, packed_bits, write_tensors
from raymask.version import __version__

RECIPE = "recipe.json"


def write_masks(selected: Selected, folder: Path) -> list[str]:
    """The selected mask, read again and compared, and the recipe of all levels' masks."""
    result, spec = selected.result, selected.spec
    write_tensors(folder / MASK, flat_bits(pack_bits(selected.mask)))
    recipe = {
        "raymask": __version__,
        "model": result.model,
        "task": result.task,
        "mask": spec.mask.model_dump(),
        "levels": [level_recipe(level, spec) for level in result.levels],
    }
    (folder / RECIPE).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    last = result.levels[-1]
    if digest(packed_bits(load_file(folder / MASK))) != last.digest:
        raise UserError(f"{MASK}: is another mask when it is read again")
    redrawn = f"{RECIPE}: how raymask.draw_mask draws every level's mask again"
    if spec.mask.score != "magnitude":
        redrawn = f"{RECIPE}: who won. {spec.mask.score} looks at rows of the task, so only a search draws it again"
    return [
        f"{MASK}: {megabytes((folder / MASK).stat().st_size)}, a bit for each of {last.total:,} weights",
        redrawn,
        f"Checked: read again, the mask has the digest that was selected, {last.digest}",
    ]


def level_recipe(level: Level, spec: Spec) -> dict[str, Any]:
    """How one level's mask is drawn again."""
    return {
        "level": level.level,
        "kept": level.kept,
        "total": level.total,
        "digest": level.digest,
        "candidate": level.winner.candidate.model_dump(),
        "drawn_from": origin(level.parent),
        "draw_mask": draw_mask_options(level.winner.candidate, spec) if spec.mask.score == "magnitude" else None,
    }


def origin(parent: str) -> dict[str, str]:
    """Which file of the run has a level's parent, by the parent's key, and how its SHA-256 begins."""
    lineage, level, contents = parent.rsplit("-", 2)
    return {
        "file": f"{level_name(SEARCH if lineage == 'search' else lineage, int(level))}/{MODEL}",
        "sha256_begins": contents,
    }


def draw_mask_options(candidate: Candidate, spec: Spec) -> dict[str, Any]:
    """What `raymask.draw_mask` takes beside the model, to draw this candidate's mask."""
    noise = candidate.noise
    return {
        "density": candidate.density,
        **({"seed": candidate.seed, "exponent": noise.exponent, "ratio": noise.ratio} if noise else {}),
        "sampler": spec.candidates.sampler,
        "allocation": spec.mask.allocation,
        "pattern": spec.mask.pattern,
        "include": list(spec.model.include),
        "exclude": list(spec.model.exclude),
    }
