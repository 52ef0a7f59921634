"""Python API: a whole search, and masks for your own training loop."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from raymask.config import load_spec, make_spec
from raymask.core.callbacks import Callback
from raymask.core.functions import get_function
from raymask.core.masking import masks
from raymask.core.masking.allocations import ALLOCATIONS
from raymask.core.masking.masks import Mask, PruningMethod
from raymask.core.masking.noise import Noise
from raymask.core.masking.patterns import parse_pattern
from raymask.core.masking.samplers import SAMPLERS
from raymask.core.records import Result
from raymask.core.spec import Spec, require_whole_groups
from raymask.driver.search import search as run_search
from raymask.train.prunable import find_prunable, matrices, to_module_layout


def search(
    spec: Spec | Mapping[str, Any] | str | Path,
    run: str | Path | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    address: str | None = None,
    in_process: bool = False,
) -> Result:
    """Run a search as `raymask search` does, without output.

    The same call resumes an interrupted search, and returns the result of a finished one.

    Args:
        spec: A Spec, a mapping of its keys, or the path of a YAML file.
        run: Run directory, a path or the URI of remote storage. None for `runs/<spec file's name>`, or for
            `runs/<model>-<task>` where the spec is no file.
        callbacks: They are told what happens.
        address: Ray cluster: "auto", "host" or "host:port". None for the one that this process is connected to, or
            else a private one.
        in_process: Whether to run in this process, without Ray.

    Returns:
        The result.

    Raises:
        UserError: You can correct the error; the message says how.
    """
    if isinstance(spec, (str, Path)):
        name, spec = Path(spec).stem, load_spec(spec)
    else:
        spec = spec if isinstance(spec, Spec) else make_spec(spec)
        name = f"{Path(spec.model.name).name}-{Path(spec.task.name or spec.task.train or '').stem}"
    return run_search(spec, run or f"runs/{name}", callbacks, address=address, in_process=in_process)


def draw_mask(
    module: nn.Module,
    density: float,
    *,
    seed: int | None = None,
    exponent: float = 5.0,
    sampling_ratio: float = 3e-4,
    sampler: str = "voting",
    allocation: str = "uniform",
    pattern: str = "unstructured",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Mask:
    """Draw a mask over the module's prunable matrices.

    Args:
        module: The module. By default the weights of linear layers and experts inside its repeated blocks are pruned.
        density: Share of these weights that is kept, in (0, 1].
        seed: Seed of a random mask near the magnitude mask, in [0, 2^63). None for the magnitude mask.
        exponent: Exponent a > 0 of the scores (docs/method.md, "Random masks").
        sampling_ratio: Sampling ratio r > 0. Larger is nearer to the magnitude mask.
        sampler: As in a spec's `candidates`: a name or an import path.
        allocation: As in a spec's `mask`: a name or an import path.
        pattern: As in a spec's `mask`.
        include: Shell-style patterns on parameter names that replace the default choice.
        exclude: Shell-style patterns on parameter names to leave dense.

    Returns:
        Bool tensors of the parameters' shapes by parameter name, on the parameters' devices; True is kept.

    Raises:
        ValueError: An argument is not valid, a pattern of names matches nothing, nothing can be pruned, a weight is not
            finite, or the pattern does not divide a matrix.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], not {density}")
    method = PruningMethod(
        allocation=get_function(ALLOCATIONS, allocation, "allocation"),
        sampler=get_function(SAMPLERS, sampler, "sampler"),
        pattern=parse_pattern(pattern),
    )
    require_whole_groups(pattern, allocation, [density])
    names = find_prunable(module, tuple(include), tuple(exclude))
    if not names:
        raise ValueError(
            "no matrix of the module can be pruned; name some with include, for instance include=['*.weight']"
        )
    weights = matrices(module, names)
    for name, weight in weights.items():
        if not method.pattern.divides(tuple(weight.shape)):
            raise ValueError(f"{pattern} does not divide {name} of {' x '.join(map(str, weight.shape[-2:]))}")
    noise = None if seed is None else Noise(exponent=exponent, sampling_ratio=sampling_ratio)
    seed = 0 if seed is None else operator.index(seed)  # also of numpy
    mask = masks.draw_mask(weights, float(density), seed=seed, noise=noise, method=method)
    return to_module_layout(module, mask)


def apply_mask(module: nn.Module, mask: Mapping[str, Tensor]) -> None:
    """Zero the pruned weights in place. Call it once before training and after every optimizer step.

    Args:
        module: The module.
        mask: Bool tensors by parameter name, as `draw_mask` returns them, on the parameters' devices.

    Raises:
        ValueError: The module has no such parameter, or one of another shape.
    """
    parameters = {name: parameter.data for name, parameter in module.named_parameters()}
    for name, kept in mask.items():
        if name not in parameters:
            raise ValueError(f"the module has no parameter {name}: is the mask of another model, or packed?")
        if kept.shape != parameters[name].shape:
            raise ValueError(
                f"the mask of {name} has shape {tuple(kept.shape)}, the parameter has {tuple(parameters[name].shape)}"
            )
    masks.apply(parameters, mask)
