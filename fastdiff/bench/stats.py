"""Ratios that survive a busy machine: paired within a round, with a bootstrap interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

CONFIDENCE = 0.95
RESAMPLES = 9999


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the baseline: median and the ends of its 95% interval."""

    median: float
    lo: float
    hi: float


def speedup(baseline_ms: Sequence[float], samples_ms: Sequence[float]) -> Ratio:
    """The speed of `samples_ms` over that of `baseline_ms`; element i of both is round i.

    A round's two samples lie close in time and share what the machine was doing, so their
    ratio jitters less than either. Percentile bootstrap of the median, always the same draws.
    Raises ValueError for fewer than two rounds or unequal lengths.
    """
    if len(baseline_ms) != len(samples_ms) or len(samples_ms) < 2:
        got = f"{len(baseline_ms)} and {len(samples_ms)}"
        raise ValueError(f"expected two equally long lists of at least two samples, got {got}")
    ratios = np.asarray(baseline_ms, dtype=float) / np.asarray(samples_ms, dtype=float)
    interval = bootstrap(
        (ratios,),
        np.median,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Ratio(float(np.median(ratios)), float(interval.low), float(interval.high))
