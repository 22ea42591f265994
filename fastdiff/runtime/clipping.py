"""A step that clips the scheduler's estimate of the clean picture, read off the scheduler itself.

    x[i+1] = a x[i] + b eps[i] + d noise + clip(p x[i] + q eps[i], ±r)

DDPM's, DDIM's and LCM's steps have this form with `clip_sample`, whatever the network predicts: the
estimate is a weighted sum of sample and output, and the result is linear in the clipped estimate.
The coefficients follow from the step's values at points where nothing is clipped and at points
where everything is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.runtime.trajectory import PICTURE, Trajectory

SMALL, LARGE = 2.0**-30, 2.0**14
"""A value that no step clips, and a value that every clipping step clips."""
POINTS = ((SMALL, 0), (0, SMALL), (LARGE, 0), (2 * LARGE, 0), (0, LARGE), (0, 2 * LARGE), (0, 0))
"""The (sample, output) pairs at which each step is evaluated; the last one has a noise of 1."""
NOTHING = 1e-11
"""A limit below this is rounding at the large points: the step does not clip."""


@dataclass(frozen=True)
class Clipped:
    """The coefficients of n steps, [n] float64 each, with the letters above."""

    a: Tensor
    b: Tensor
    d: Tensor
    p: Tensor
    q: Tensor
    r: Tensor

    def misses(self, trajectory: Trajectory, vectors: Tensor) -> Tensor:
        """[n] the deviation of random samples from these steps, relative to their terms.

        Args:
            trajectory: the result of `trajectory.run`, which ends in those samples.
            vectors: [R, 3n, P] the last of the `known` that it was run with.
        """
        _, outputs, noises = vectors.chunk(3, dim=1)
        x, results = (
            values[-len(vectors) :] for values in (trajectory.samples, trajectory.results)
        )
        a, b, d, p, q, r = (
            each[:, None] for each in (self.a, self.b, self.d, self.p, self.q, self.r)
        )
        clipped = (p * x + q * outputs).clamp(-r, r)
        terms = torch.stack([a * x, b * outputs, d * noises, clipped])
        found = (results - terms.sum(0)).abs().amax((0, 2))
        return found / terms.abs().amax((0, 1, 3))


def points(count: int) -> Tensor:
    """[7, 3·count, *PICTURE] the `known` to run a scheduler with, `apart`, for `read`."""
    known = torch.zeros(len(POINTS), 3, count, *PICTURE, dtype=torch.float64)
    for lane, (sample, output) in enumerate(POINTS):
        known[lane, 0], known[lane, 1] = sample, output
    known[-1, 2] = 1.0
    return known.flatten(1, 2)


def read(trajectory: Trajectory) -> Clipped:
    """The coefficients of the steps, from the trajectory of `points`."""
    by_sample, by_output, x1, x2, y1, y2, d = trajectory.results[..., 0]
    a, b = (x2 - x1) / LARGE, (y2 - y1) / LARGE
    p, q = by_sample / SMALL - a, by_output / SMALL - b
    r = torch.maximum((x1 - LARGE * a).abs(), (y1 - LARGE * b).abs())
    clips = r > NOTHING
    zero = torch.zeros_like(r)
    p, q, r = (torch.where(clips, each, zero) for each in (p, q, r))
    a = torch.where(clips, a, by_sample / SMALL)
    b = torch.where(clips, b, by_output / SMALL)
    return Clipped(a, b, d, p, q, r)
