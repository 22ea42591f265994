"""Fits the linear recurrence that a scheduler's trajectory follows, and checks it."""

from dataclasses import dataclass
from typing import Any

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


def fitted(trajectory: Trajectory, vectors: Tensor) -> dict[str, Any] | str:
    """The columns of `Table` for a linear recurrence; why there are none, if it is not one.

    Args:
        trajectory: of a scheduler that was run on its coordinate axes, one in each pixel, and then
            on random samples.
        vectors: [R, 3n, *PICTURE] those samples. The samples of the last 4 change in no step.
    """
    count, axes = len(trajectory.draws), vectors.shape[1]
    given, made = (
        values[: -len(vectors)].transpose(0, 1).flatten(1)[:, :axes]
        for values in (trajectory.samples, trajectory.results)
    )
    untouched = torch.cat([torch.arange(1), torch.arange(count, axes)])
    # first a table that also holds if samples change between steps, else one for unchanged samples
    for editable, within, random in ((True, torch.arange(axes), 8), (False, untouched, 4)):
        for bound in (EXACT, ROUNDING):
            fit = fit_steps(given[:, within], made[:, within], bound)
            misses = float(follow(fit, trajectory, vectors[-random:].flatten(2)).max())
            if misses <= 100 * EXACT:
                break
        worst = float(fit.residuals.max())
        if editable and worst <= ALLOWED and misses <= ALLOWED:
            break
    if not worst <= ALLOWED:
        return f"its steps are not a linear recurrence of depth {MAX_DEPTH}"
    if not misses <= ALLOWED:
        return "it clips samples or mixes their pixels"
    used = ((fit.outputs[:, 1:] != 0) | (fit.past_samples != 0)).any(0).nonzero()
    depth = int(used.max()) + 1 if len(used) else 0
    return {
        "samples": fit.samples,
        "outputs": fit.outputs[:, : depth + 1].clone(),
        "past_samples": fit.past_samples[:, :depth].clone(),
        "noises": fit.noises,
        "learned": torch.zeros_like(fit.noises),
        "clips": fit.noises.new_zeros(count, 5),
        "residual": worst,
        "editable": editable,
    }


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
