"""A step that clips the scheduler's estimate of the clean picture, read off the scheduler itself.

    x[i+1] = a x[i] + b eps[i] + d exp(k y[i]) noise + clip(p x[i] + q eps[i], ±r)

DDPM's, DDIM's and LCM's steps have this form with `clip_sample`, whatever the network predicts: the
estimate is a weighted sum of sample and output, and the result is linear in the clipped estimate.
With a variance of `learned_range` the network predicts y, the variance's place between two values,
and the noise's factor is d0^((1 - y) / 2) d1^((1 + y) / 2). Dynamic thresholding clips at ±R, the
h-quantile of the estimate's absolute value over the sample, at least r and at most t, and
multiplies by r / R.

The coefficients follow from the step's values at points where nothing is clipped and at points
where everything is.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.runtime.trajectory import PICTURE, Trajectory

SMALL, LARGE = 2.0**-30, 2.0**17
"""A value that no step clips, and a value that every clipping step clips: the first estimate of a
consistency model has a 25 000th of the sample."""
POINTS = ((SMALL, 0), (0, SMALL), (LARGE, 0), (2 * LARGE, 0), (0, LARGE), (0, 2 * LARGE), (0, 0))
"""The (sample, output) pairs at which each step is evaluated; the last one has a noise of 1. If the
network predicts the variance, one more has a noise and a y of 1."""
NOTHING = 1e-10
"""A limit below this is rounding at the large points: the step does not clip."""


@dataclass(frozen=True)
class Clipped:
    """The coefficients of n steps, [n] float64 each, with the letters above."""

    a: Tensor
    b: Tensor
    d: Tensor
    k: Tensor
    p: Tensor
    q: Tensor
    r: Tensor
    t: Tensor
    h: Tensor
    """Zero, as is t, without dynamic thresholding."""

    def misses(self, trajectory: Trajectory, vectors: Tensor) -> Tensor:
        """[n] the deviation of random samples from these steps, relative to their terms.

        Args:
            trajectory: the result of `trajectory.run`, which ends in those samples.
            vectors: [R, 3n or 4n, P] the last of the `known` that it was run with.
        """
        _, outputs, noises, *variances = vectors.split(len(self.a), dim=1)
        x, results = (
            values[-len(vectors) :] for values in (trajectory.samples, trajectory.results)
        )
        a, b, d, k, p, q, r, t = (
            each[:, None]
            for each in (self.a, self.b, self.d, self.k, self.p, self.q, self.r, self.t)
        )
        factors = d * (k * variances[0]).exp() if variances else d
        clean = p * x + q * outputs
        if self.h.any():
            quantile = clean.abs().quantile(self.h.max(), dim=2, keepdim=True)
            limits = quantile.maximum(r).minimum(t)
            clipped = torch.where(r > 0, clean.clamp(-limits, limits) * (r / limits), 0.0)
        else:
            clipped = clean.clamp(-r, r)
        terms = torch.stack([a * x, b * outputs, factors * noises, clipped])
        found = (results - terms.sum(0)).abs().amax((0, 2))
        return found / terms.abs().amax((0, 1, 3))

    def columns(self) -> dict[str, Any]:
        """The columns of `Table`."""
        return {
            "samples": self.a,
            "outputs": self.b[:, None],
            "past_samples": self.a.new_zeros(len(self.a), 0),
            "noises": self.d,
            "learned": self.k,
            "clips": torch.stack([self.p, self.q, self.r, self.t, self.h], dim=1),
            "residual": 0.0,
            "editable": True,
        }


def points(count: int, learns: bool = False) -> Tensor:
    """[W, 3·count, *PICTURE] the `known` to run a scheduler with, `apart`, for `read`; 4·count if
    the network `learns` the variance."""
    pairs = POINTS + POINTS[-1:] * learns
    known = torch.zeros(len(pairs), 3 + learns, count, *PICTURE, dtype=torch.float64)
    for lane, (sample, output) in enumerate(pairs):
        known[lane, 0], known[lane, 1] = sample, output
    known[len(POINTS) - 1 :, 2] = 1.0
    known[len(POINTS) :, 3:] = 1.0
    return known.flatten(1, 2)


def read(trajectory: Trajectory, threshold: tuple[float, ...] | None = None) -> Clipped:
    """The coefficients of the steps, from the trajectory of `points`.

    threshold: of dynamic thresholding: the largest limit for an estimate whose least limit is 1,
    and the quantile.
    """
    by_sample, by_output, x1, x2, y1, y2, d, *learned = trajectory.results[..., 0]
    a, b = (x2 - x1) / LARGE, (y2 - y1) / LARGE
    p, q = by_sample / SMALL - a, by_output / SMALL - b
    r = torch.maximum((x1 - LARGE * a).abs(), (y1 - LARGE * b).abs())
    clips = r > NOTHING
    zero = torch.zeros_like(r)
    p, q, r = (torch.where(clips, each, zero) for each in (p, q, r))
    a = torch.where(clips, a, by_sample / SMALL)
    b = torch.where(clips, b, by_output / SMALL)
    k = torch.where(d != 0, (learned[0] / d).log(), zero) if learned else zero
    most, quantile = threshold or (0.0, 0.0)
    return Clipped(a, b, d, k, p, q, r, most * r, torch.full_like(r, quantile))
