"""Fits the linear recurrence that a scheduler's trajectory follows, and checks it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.runtime.trajectory import NotLinear, Trajectory

MAX_DEPTH = 3
HISTORIES = ((0, 0), (1, 0), (1, 1), (2, 0), (2, 2), (3, 0), (3, 3))
"""How many past outputs and past samples a step may use, the shallowest history first."""
EXACT = 1e-12
"""Largest deviation, relative to the result, of a scheduler that computes in float64."""
ROUNDING = 2.0**-23
"""Deviation that float32 casts inside a step explain; a deeper history would only fit rounding."""
ALLOWED = 1e-6
"""Deviation beyond which a step is not a linear recurrence."""


def scales_of(trajectory: Trajectory) -> Tensor:
    """[n] float64: the factors of the samples in the network's inputs."""
    inputs, samples = trajectory.inputs, trajectory.samples
    scales = (inputs * samples).sum((0, 2)) / (samples * samples).sum((0, 2))
    misses = (inputs - scales[:, None] * samples).abs().amax((0, 2)) / inputs.abs().amax((0, 2))
    if not (misses <= ALLOWED).all():
        raise NotLinear("scale_model_input does not give a multiple of the sample")
    return scales


@dataclass(frozen=True)
class Fit:
    """Coefficients as in `Table`, at the largest depth, and the deviations they leave."""

    samples: Tensor
    outputs: Tensor
    past_samples: Tensor
    noises: Tensor
    residuals: Tensor
    """[n] largest deviation of each step, relative to its result."""


def fit_steps(x: Tensor, made: Tensor, bound: float) -> Fit:
    """Least squares for every step, with the shallowest history that deviates by at most `bound`.

    Args:
        x: [n, axes] coordinates of the samples before each step; the last 2n axes are the outputs
            and the noises.
        made: [n, axes] coordinates of the samples after each step.
    """
    count, axes = x.shape
    first = axes - 2 * count
    steps, padded = torch.arange(count), torch.cat([x.new_zeros(MAX_DEPTH, axes), x])
    age = steps[:, None] - steps  # [n, n] how old each output is at each step
    a, d, residuals = x.new_zeros(count), x.new_zeros(count), x.new_full((count,), torch.inf)
    b, c = x.new_zeros(count, MAX_DEPTH + 1), x.new_zeros(count, MAX_DEPTH)
    for depth, older in HISTORIES:
        i = steps[residuals > bound]
        past = torch.stack([padded[MAX_DEPTH + i - h] for h in range(older + 1)], dim=2)
        # an output's own coefficient absorbs what the samples leave on its axis
        free = torch.zeros(len(i), axes, dtype=torch.bool)
        free[:, first : first + count] = (age[i] >= 0) & (age[i] <= depth)
        free[:, first + count :] = age[i] == 0
        explained = past.masked_fill(free[..., None], 0)
        norms = explained.norm(dim=1, keepdim=True).clamp(min=1e-300)
        wanted = made[i].masked_fill(free, 0)[..., None]
        solution = torch.linalg.lstsq(explained / norms, wanted).solution / norms.mT
        rest = made[i] - (past @ solution)[..., 0]
        residuals[i] = rest.masked_fill(free, 0).abs().amax(1) / made[i].abs().amax(1)
        a[i], d[i] = solution[:, 0, 0], rest[torch.arange(len(i)), first + count + i]
        b[i], c[i] = 0, 0
        c[i, :older] = solution[:, 1:, 0]
        for h in range(depth + 1):
            rows = i >= h
            b[i[rows], h] = rest[rows, first + i[rows] - h]
    return Fit(a, b, c, d, residuals)


def follow(fit: Fit, trajectory: Trajectory, vectors: Tensor) -> Tensor:
    """[n] deviation of the random samples `vectors` [R, 3n, P] from the table, relative to its
    terms.

    Needed because a scheduler that clips looks linear on small coordinate vectors, and because a
    deep enough history fits anything there.
    """
    count = len(fit.samples)
    samples, results = (
        values[-len(vectors) :] for values in (trajectory.samples, trajectory.results)
    )
    _, outputs, noises = vectors.chunk(3, dim=1)
    terms = [fit.samples[:, None] * samples, fit.noises[:, None] * noises]
    for h in range(MAX_DEPTH + 1):
        terms.append(torch.zeros_like(outputs))
        terms[-1][:, h:] = fit.outputs[h:, h, None] * outputs[:, : max(count - h, 0)]
    for h in range(1, MAX_DEPTH + 1):
        terms.append(torch.zeros_like(outputs))
        terms[-1][:, h:] = fit.past_samples[h:, h - 1, None] * samples[:, : max(count - h, 0)]
    stacked = torch.stack(terms)
    misses = (results - stacked.sum(0)).abs().amax((0, 2))
    return misses / stacked.abs().amax((0, 1, 3))
