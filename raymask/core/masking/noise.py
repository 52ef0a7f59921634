"""Noise of random masks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How far a random mask may differ from the magnitude mask.

    Candidates hold it, so its field names are part of the on-disk format.

    Attributes:
        exponent: Exponent a > 0 of the scores, 1/temperature. Larger is nearer to the magnitude mask.
        sampling_ratio: Sampling ratio r > 0, which gives the number of votes V = max(1, floor((N - k) r)).
    """

    exponent: float
    sampling_ratio: float
