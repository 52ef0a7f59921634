"""What does Python code call?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from raymask.config import load_spec, make_spec
from raymask.core import masks, patterns
from raymask.core.allocations import ALLOCATIONS
from raymask.core.masks import Mask
from raymask.core.records import Candidate, Noise, Result
from raymask.core.samplers import SAMPLERS
from raymask.core.spec import Spec, one_of, require_whole_groups
from raymask.driver.search import search as run_search
from raymask.report.terminal import Silent
from raymask.train.model import as_kept, find_prunable, matrices


def search(
    spec: Spec | Mapping[str, Any] | str | Path,
    run: str | Path | None = None,
    *,
    address: str | None = None,
    in_process: bool = False,
) -> Result:
    """Search as `raymask search` does, without output. `spec` is a Spec, its keys as plain data, or a YAML file.

    `run`: the run directory, a path or the URI of remote storage; `runs/<spec file's name>` or `runs/<model>-<task>`
    when not given; the same call continues or returns what is there. `address`: a Ray cluster ("auto",
    "host", "host:port"), else a private Ray is started, or the one that this process is connected to is used.
    `in_process`: without Ray. Raises raymask.UserError for whatever the caller can mend.
    """
    if isinstance(spec, (str, Path)):
        name, spec = Path(spec).stem, load_spec(spec)
    else:
        spec = spec if isinstance(spec, Spec) else make_spec(spec)
        name = f"{Path(spec.model.name).name}-{Path(spec.task.name or spec.task.train or '').stem}"
    return run_search(spec, run or f"runs/{name}", Silent(), address=address, in_process=in_process)


def draw_mask(
    module: nn.Module,
    density: float,
    *,
    seed: int | None = None,
    exponent: float = 5.0,
    ratio: float = 3e-4,
    sampler: str = "votes",
    allocation: str = "uniform",
    pattern: str = "unstructured",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Mask:
    """A mask over the module's prunable matrices: bool tensors by parameter name, on the parameters' devices.

    `density` in (0, 1]: share of these matrices' weights that is kept. Without a `seed` it is the magnitude mask; with
    one a random mask near it, of `exponent` a and sampling `ratio` r (README, "How it works"). `sampler` as in a spec's
    `candidates`, `allocation` and `pattern` as in its `mask`. `include` and `exclude` are shell-style patterns on
    parameter names; by default the linear weights inside the repeated blocks are taken.
    Raises ValueError when nothing can be pruned, a weight is not finite, or the pattern does not fit.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], not {density}")
    form = patterns.named(pattern)
    share = ALLOCATIONS[one_of(ALLOCATIONS, allocation, "allocation")]
    drawn = SAMPLERS[one_of(SAMPLERS, sampler, "sampler")]
    require_whole_groups(pattern, allocation, [density])
    names = find_prunable(module, tuple(include), tuple(exclude))
    if not names:
        raise ValueError(
            "no matrix of the module can be pruned; name some with include, for instance include=['*.weight']"
        )
    weights = matrices(module, names)
    for name, weight in weights.items():
        if not form.fits(tuple(weight.shape)):
            raise ValueError(f"{pattern} does not divide {name} of {' x '.join(map(str, weight.shape))}")
    noise = None if seed is None else Noise(exponent=exponent, ratio=ratio)
    candidate = Candidate(level=1, index=int(noise is not None), seed=seed or 0, density=density, noise=noise)
    return as_kept(module, masks.draw(weights, candidate, allocation=share, sampler=drawn, pattern=form))


def apply_mask(module: nn.Module, mask: Mapping[str, Tensor]) -> None:
    """Zero the pruned weights in place: call it once before training and after every optimizer step."""
    masks.apply({name: parameter.data for name, parameter in module.named_parameters()}, mask)
