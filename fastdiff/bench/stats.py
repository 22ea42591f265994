"""Ratios that are valid on a busy machine: paired, with intervals, and verdicts on many of them.

There are two ways to measure the ratio of times between two states of a project:

- `across_processes`: pairs of processes, with interleaved rounds in each. Processes differ in speed
(because of their memory addresses: about 1% on two cores), so the unit is the pair, not the round;
- `between_runs`: two runs at different times. If both also timed a yardstick in turn, the ratios to
  it are compared, which do not depend on the machine's speed at the time.

All computations use logarithms: a factor and its inverse are equally far from 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, exp, inf, log
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit
from scipy.stats import bootstrap, false_discovery_control, gmean
from scipy.stats.mstats import mjci

CONFIDENCE = 0.95
RESAMPLES = 9999
LEAST = 5
"""The fewest process pairs, or rounds, for a verdict: with fewer, chance alone often agrees."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of speeds or times, as the caller says, with the ends of its interval."""

    median: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Estimate:
    """The logarithm of a ratio of times, new to base."""

    log: float
    error: float
    """Its standard error."""
    samples: int
    """Independent samples: process pairs, else rounds."""
    trimmed: int = 0
    """How many of the lowest samples were left out, and as many of the highest."""

    def interval(self, alpha: float) -> tuple[float, float]:
        """The ends, as logarithms, of an interval that misses the truth with rate `alpha`."""
        if self.samples < 2:
            return -inf, inf
        # what scipy.stats.t computes, without its checks, which take forty times as long
        half = -float(stdtrit(self.freedom, alpha / 2)) * self.error
        return self.log - half, self.log + half

    @property
    def freedom(self) -> int:
        return self.samples - 2 * self.trimmed - 1


@dataclass(frozen=True)
class Judged:
    """The verdict on whether an estimate shows a change beyond the noise floor."""

    ratio: Ratio
    verdict: Literal["slower", "faster", "same", "inconclusive"]
    missing: int
    """About how many more samples are needed for a verdict; 0 if there is one."""


def speedup(baseline_ms: Sequence[float], samples_ms: Sequence[float]) -> Ratio:
    """The speed of `samples_ms` relative to `baseline_ms`; element i of both is round i.

    A round's two samples are close in time and share the machine's state, so their ratio varies
    less than either. Percentile bootstrap of the median, with a fixed seed. Raises ValueError for
    fewer than two rounds or unequal lengths.
    """
    if len(baseline_ms) != len(samples_ms) or len(samples_ms) < 2:
        got = f"{len(baseline_ms)} and {len(samples_ms)}"
        raise ValueError(f"expected two equally long lists of at least two samples, got {got}")
    ratios = np.asarray(baseline_ms, dtype=float) / np.asarray(samples_ms, dtype=float)
    return _bootstrapped(ratios, np.median)


def mean_ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """The geometric mean of above[i] / below[i], all positive; its interval is speedup's."""
    return _bootstrapped(np.divide(above, below), gmean)


def _bootstrapped(ratios: NDArray[np.float64], of: Callable[..., Any]) -> Ratio:
    interval = bootstrap(
        (ratios,),
        of,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Ratio(float(of(ratios, axis=0)), float(interval.low), float(interval.high))


def across_processes(base: Sequence[Sequence[float]], new: Sequence[Sequence[float]]) -> Estimate:
    """From [process pair][round]: Student's t on the median ratio of each pair.

    From ten pairs on, a tenth at either end is left out (Tukey and McLaughlin's t): another program
    may have run beside one of a pair's processes only. With so few units a bootstrap's interval is
    too narrow: for six normal ones its 95% interval holds the truth in 87%.
    """
    units = np.sort([np.median(_logs(b, n)) for b, n in zip(base, new, strict=True)])
    count, cut = len(units), len(units) // 10
    if count < 2:
        return Estimate(float(units.mean()), inf, count)
    kept = units[cut : count - cut]
    spread = np.clip(units, kept[0], kept[-1]).std(ddof=1)  # winsorized
    return Estimate(float(kept.mean()), float(spread * count**0.5 / len(kept)), count, cut)


def between_runs(
    base: Sequence[float],
    new: Sequence[float],
    base_yardstick: Sequence[float] | None = None,
    new_yardstick: Sequence[float] | None = None,
) -> Estimate:
    """From two runs: the ratio of their medians, each relative to its own yardstick if given.

    A yardstick's element i is from the same round as its run's element i.
    """
    runs = ((base, base_yardstick), (new, new_yardstick))
    before, after = (
        _median(np.log(np.asarray(times)) if yardstick is None else _logs(yardstick, times))
        for times, yardstick in runs
    )
    error = float(np.hypot(before.error, after.error))
    return Estimate(after.log - before.log, error, min(before.samples, after.samples))


def judge(
    estimates: Sequence[Estimate], floors: Sequence[float], confidence: float = CONFIDENCE
) -> list[Judged]:
    """Verdicts on many estimates together, each by its interval against 1 ± its floor.

    The more estimates there are, the likelier one looks changed by chance. Benjamini and Hochberg's
    procedure bounds the share of false verdicts among all those of a change by 1 - confidence (so,
    if nothing changed, the probability of any such verdict). Intervals are widened to match, so
    that a verdict and its interval never disagree.
    """
    if not estimates:
        return []
    alpha, edges = 1 - confidence, [log(1 + floor) for floor in floors]
    chances = [_p_value(*pair) for pair in zip(estimates, edges, strict=True)]
    called = int((false_discovery_control(chances) <= alpha).sum())
    alpha *= max(called, 1) / len(estimates)
    return [_judge(*pair, alpha) for pair in zip(estimates, edges, strict=True)]


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """The geometric mean of ratios whose errors may be correlated by a shared yardstick."""
    return Estimate(
        float(np.mean([estimate.log for estimate in estimates])),
        float(np.mean([estimate.error for estimate in estimates])),
        min(estimate.samples for estimate in estimates),
    )


def ratio_of(logarithm: float) -> float:
    """The exponential, limited to a float's range: two pairs can give any value."""
    return exp(min(max(logarithm, -99.0), 99.0))


def _logs(below: Sequence[float], above: Sequence[float]) -> NDArray[np.float64]:
    ratios: NDArray[np.float64] = np.asarray(above, dtype=float) / np.asarray(below, dtype=float)
    return np.log(ratios)


def _median(logs: NDArray[np.float64]) -> Estimate:
    """The median with Maritz and Jarrett's error, as from a bootstrap without its random draws.
    scipy's version is a few percent larger for few samples, and undefined for two."""
    error = inf
    if len(logs) > 2:
        with np.errstate(invalid="ignore"):  # for equal samples rounding makes its square negative
            error = float(np.nan_to_num(mjci(logs, [0.5])[0], nan=0.0))
    return Estimate(float(np.median(logs)), error, len(logs))


def _p_value(estimate: Estimate, edge: float) -> float:
    """The two-sided p-value of a change beyond the floor."""
    if estimate.samples < LEAST:
        return 1.0
    beyond = abs(estimate.log) - edge
    if estimate.error == 0:
        return 0.0 if beyond > 0 else 1.0
    return min(1.0, 2 * float(stdtr(estimate.freedom, -beyond / estimate.error)))


def _judge(estimate: Estimate, edge: float, alpha: float) -> Judged:
    lo, hi = estimate.interval(alpha)
    ratio = Ratio(ratio_of(estimate.log), ratio_of(lo), ratio_of(hi))
    if estimate.samples >= LEAST:
        if lo > edge:
            return Judged(ratio, "slower", 0)
        if hi < -edge:
            return Judged(ratio, "faster", 0)
        if -edge <= lo and hi <= edge:
            return Judged(ratio, "same", 0)
    return Judged(ratio, "inconclusive", _samples_needed(estimate, edge, alpha))


def _samples_needed(estimate: Estimate, edge: float, alpha: float) -> int:
    """Samples until the interval, which narrows with the root of their number, is on one side of
    the floor's edge. For an estimate at the edge itself: until it is a third of the floor."""
    least = max(1, LEAST - estimate.samples)
    lo, hi = estimate.interval(alpha)
    if lo == -inf:
        return least
    distance = abs(abs(estimate.log) - edge)
    wanted = estimate.samples * ((hi - lo) / 2 / max(distance, edge / 3)) ** 2
    return max(least, ceil(wanted) - estimate.samples)
