"""Time to draw a model's masks, compared with a slow reference that must give the same masks."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import reference
import torch
from harness import Finding, options, peak_memory, tell
from torch import Tensor

from raymask.core.masking import masks
from raymask.core.masking.noise import Noise
from raymask.core.masking.patterns import num_kept
from raymask.core.masking.samplers import SampleFn, votes_from_ratio

DENSITY = 1 / 16
NOISE = Noise(exponent=5.0, sampling_ratio=3e-4)
THREADS = 2
DRAWS = 3  # of the slow way, a shape
COPIES = 5  # of the largest matrix, that drawing may take at its peak


def bert(layers: int) -> dict[str, Tensor]:
    """BERT-base's prunable matrices, Gaussian, float32."""
    rng = torch.Generator().manual_seed(0)
    shapes = {
        "q": (768, 768),
        "k": (768, 768),
        "v": (768, 768),
        "o": (768, 768),
        "up": (3072, 768),
        "down": (768, 3072),
    }
    return {
        f"{layer}.{name}": torch.randn(shape, generator=rng).mul_(0.04)
        for layer in range(layers)
        for name, shape in shapes.items()
    }


def llama(layers: int, width: int, inner: int) -> dict[str, Tensor]:
    """A decoder's prunable matrices as in LLaMA 7B, Gaussian, bfloat16."""
    rng = torch.Generator().manual_seed(0)
    shapes = [*((name, (width, width)) for name in "qkvo"), *((name, (inner, width)) for name in ("up", "gate"))]
    shapes.append(("down", (width, inner)))
    return {
        f"{layer}.{name}": torch.randn(shape, generator=rng, dtype=torch.bfloat16).mul_(0.02)
        for layer in range(layers)
        for name, shape in shapes
    }


def seconds_to_draw(weights: Mapping[str, Tensor], index: int, prepared: dict[object, SampleFn]) -> float:
    """Seconds for one candidate's whole mask."""
    started = time.perf_counter()
    masks.draw_mask(weights, DENSITY, seed=index, noise=NOISE, sampler_cache=prepared)
    return time.perf_counter() - started


def seconds_the_slow_way(weights: Mapping[str, Tensor]) -> float:
    """Seconds that the reference needs for one whole mask: a few draws are timed for each shape, and multiplied."""
    by_count: dict[int, list[Tensor]] = {}
    for weight in weights.values():
        by_count.setdefault(weight.numel(), []).append(weight)
    whole = 0.0
    for entries, alike in by_count.items():
        started = time.perf_counter()
        reference.tally(alike[0], DENSITY, NOISE.exponent, DRAWS, torch.Generator().manual_seed(0))
        one = (time.perf_counter() - started) / DRAWS
        whole += len(alike) * votes_from_ratio(entries, num_kept(entries, DENSITY), NOISE.sampling_ratio) * one
    return whole


def compare(layers: int) -> None:
    """One BERT-base mask, the fast way and the slow way."""
    weights = bert(layers)
    prepared: dict[object, SampleFn] = {}
    first = seconds_to_draw(weights, 1, prepared)
    further = min(seconds_to_draw(weights, index, prepared) for index in (2, 3, 4))
    slow = seconds_the_slow_way(weights)
    what = f"drawing a whole BERT-base mask ({len(weights)} matrices, 16x, r = 3e-4), first of a level"
    met = slow / first >= 500 and first <= 5
    tell(Finding(what, "multinomial draws, summed, top-k", first, slow, "s", slow / first, "500x, <= 5 s", met))
    note = "what depends only on the parent is kept"
    what = "the same, a further candidate of the level"
    ratio = first / further
    tell(Finding(what, "its first candidate", further, first, "s", ratio, "much less: 2x", ratio >= 2, note))


def same_masks(size: int, pairs: int) -> None:
    """Distance from the magnitude mask and kept entries by magnitude, fast and slow, of `pairs` masks of a matrix."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(1)).mul_(0.04)
    magnitude = masks.draw_mask({"w": weight}, DENSITY)["w"]
    rank = weight.abs().reshape(-1).argsort(descending=True)
    kept = int(magnitude.sum())
    bands = [
        rank[int(kept * low) : int(kept * high)]
        for low, high in ((0, 0.5), (0.5, 0.9), (0.9, 1.1), (1.1, 1.5), (1.5, 3))
    ]
    found: dict[str, list[list[float]]] = {"fast": [], "slow": []}
    for index in range(pairs):
        rng = torch.Generator().manual_seed(index)
        both = {
            "fast": masks.draw_mask({"w": weight}, DENSITY, seed=index, noise=NOISE)["w"],
            "slow": reference.voted(weight, DENSITY, NOISE.exponent, NOISE.sampling_ratio, rng),
        }
        for side, mask in both.items():
            distance = masks.distance(masks.pack_bits({"w": mask}), masks.pack_bits({"w": magnitude}))
            found[side].append([distance, *(float(mask.reshape(-1)[band].float().mean()) for band in bands)])
    fast, slow = (torch.tensor(found[side]) for side in ("fast", "slow"))
    error = torch.sqrt((fast.var(0) + slow.var(0)) / pairs + 1e-12)
    worst = float(((fast.mean(0) - slow.mean(0)).abs() / error).max())
    bound = 3.5 + 1e-9 if math.isfinite(worst) else 0.0
    tell(
        Finding(
            f"distance from the magnitude mask, {pairs} masks of a {size}x{size} matrix",
            "the slow way's",
            float(fast[:, 0].mean()),
            float(slow[:, 0].mean()),
            "of the kept",
            None,
            "statistically the same",
            worst <= bound,
            f"largest difference of it and of the inclusion rates in 5 bands of magnitude: {worst:.1f} standard errors",
        )
    )


def billion(layers: int, width: int, inner: int) -> None:
    """A decoder's masks: seconds and memory."""
    weights = llama(layers, width, inner)
    entries = sum(weight.numel() for weight in weights.values())
    largest = max(weight.numel() for weight in weights.values())
    before = peak_memory(reset=True)
    started = time.perf_counter()
    bits = masks.draw_mask(weights, DENSITY, seed=1, noise=NOISE)
    seconds = time.perf_counter() - started
    copies = (peak_memory() - before - sum(mask.nbytes for mask in bits.values())) / (4 * largest)
    what = f"the same for {entries / 1e9:.2f} billion bf16 weights (LLaMA 7B's shapes); beside the mask, at its peak "
    what += f"{copies:.1f} float32 copies of the largest matrix"
    against, bar = "refused: multinomial ends at 2^24 entries", f"<= 60 s, <= {COPIES} copies"
    tell(Finding(what, against, seconds, None, "s", None, bar, seconds <= 60 and copies <= COPIES))


if __name__ == "__main__":
    quick = options(__doc__).quick
    torch.set_num_threads(THREADS)
    compare(1 if quick else 12)
    same_masks(*((128, 4) if quick else (768, 12)))
    billion(*((1, 256, 688) if quick else (5, 4096, 11008)))
