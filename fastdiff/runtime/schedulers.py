"""Turns any linear diffusers scheduler into a table of coefficients, by running it once.

A scheduler's step is linear in the sample, in the network's outputs so far and in fresh noise. So
it is run once on coordinate vectors: the first sample, the network's output at each step and each
noise have their own axis. The result shows the exact combination; each step becomes

    x[i+1] = a x[i] + sum over h of (b_h eps[i-h] + c_h x[i-h]) + d noise,   input[i] = s[i] x[i]

A scheduler that clips or thresholds its estimate of the clean picture, or whose network predicts
the variance, has a special step in `clipping`. Any other scheduler that is not
linear leaves a residual and is refused, as is one that cannot be run this way. `trajectory` runs
it, `recurrence` fits the coefficients.
"""

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from inspect import signature
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.originals import check_own
from fastdiff.models.watch import Unsupported
from fastdiff.runtime.clipping import Clipped, points, read
from fastdiff.runtime.contents import digest_of
from fastdiff.runtime.recurrence import ALLOWED, fitted, scales_of
from fastdiff.runtime.table import Table
from fastdiff.runtime.trajectory import PICTURE, NotLinear, Trajectory, run

__all__ = ["NotLinear", "Table", "probe", "refuse_foreign"]

SPREAD = 30.0
"""Standard deviation of the random samples that check the table: beyond every clipping range."""
THRESHOLDED = "it thresholds more than its estimate of the clean picture, or keeps that for later"
UNUSUAL = "it learns its variance in a way that no table has"


def probe(
    scheduler: Any,
    step_options: Mapping[str, Any] | None = None,
    timesteps: Tensor | None = None,
) -> Table:
    """The table of a scheduler whose timesteps are set; cached by everything it depends on.

    Args:
        scheduler: a diffusers scheduler after `set_timesteps`; a copy of it runs.
        step_options: further arguments of its `step`, such as `eta`; one that differs from step to
            step (`prev_timestep`) is a `trajectory.PerStep`.
        timesteps: [n] the pipeline's timesteps, if they are not all of `scheduler.timesteps`
            (image to image, `denoising_end`).

    Raises:
        NotLinear: its code is not all diffusers' own (then it is not run), it clips more than its
            estimate of the clean picture, uses more than three past steps, or cannot be run.
    """
    refuse_foreign(scheduler)
    given = step_options or {}
    if "generator" in given and "generator" not in signature(scheduler.step).parameters:
        raise NotLinear(f"{type(scheduler).__name__}: its step takes no generator")
    options = {k: v for k, v in given.items() if k != "generator"}
    if timesteps is None:
        timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or not len(timesteps):
        raise NotLinear(f"{type(scheduler).__name__}: no timesteps, call set_timesteps first")
    timesteps = torch.as_tensor(timesteps, device="cpu").clone()
    key = _key(scheduler, [options, timesteps])
    found = _FOUND.get(key) if key else None
    if found is None:
        elsewhere = torch.get_default_device().type != "cpu"
        try:
            with torch.device("cpu") if elsewhere else nullcontext():
                found = _probe(scheduler, options, timesteps)
        except NotLinear as obstacle:
            found = f"{type(scheduler).__name__}: {obstacle}"
        if key:
            with _LOCK:
                while len(_FOUND) >= 64:
                    _FOUND.pop(next(iter(_FOUND)))
                _FOUND[key] = found
    if isinstance(found, str):
        raise NotLinear(found)
    return found


def refuse_foreign(scheduler: Any) -> None:
    """Raise NotLinear unless all code that a step of `scheduler` runs is diffusers' own: other code
    may keep, log or count what it sees."""
    try:
        check_own(scheduler, (*_STEPS, *_ACCESS))
    except Unsupported as stranger:
        raise NotLinear(f"{type(scheduler).__name__}: {stranger}") from stranger


_STEPS = ("step", "scale_model_input", "add_noise")
_ACCESS = ("__getattribute__", "__getattr__", "__setattr__", "__deepcopy__", "__reduce_ex__")
"""Methods that run implicitly when attributes are read or written, or copies made."""

_Key = tuple[type, Any, str]
_FOUND: dict[_Key, Table | str] = {}
"""Tables by key; a string says why there is none."""
_LOCK = threading.Lock()


def _key(scheduler: Any, arguments: list[Any]) -> _Key | None:
    """Everything that a scheduler's steps depend on: its code, options, attributes and state; None
    if some of it cannot be compared."""
    digest = digest_of([vars(scheduler), arguments])
    if digest is None:
        return None
    return type(scheduler), getattr(type(scheduler), "step", None), digest


def _probe(scheduler: Any, step_options: Mapping[str, Any], timesteps: Tensor) -> Table:
    config = getattr(scheduler, "config", None)
    config = config if isinstance(config, Mapping) else {}
    # not of the config, which may have one that the scheduler does not know
    variance, count = vars(scheduler).get("variance_type"), len(timesteps)
    if variance == "learned":
        raise NotLinear("its network says the variance itself, not where it lies in a range")
    learns = variance == "learned_range"
    # another scheduler's config may say so of a scheduler that never does
    thresholds = hasattr(scheduler, "_threshold_sample") and bool(config.get("thresholding"))
    axes = 3 * count  # one each for the changes of the samples, the outputs, the noises
    generator = torch.Generator().manual_seed(0)
    shape = (8, axes + learns * count, *PICTURE)
    vectors = torch.randn(shape, generator=generator, dtype=torch.float64)
    vectors[:, : 2 * count] *= SPREAD
    vectors[4:, 1:count] = 0
    linear: dict[str, Any] | str
    if learns or thresholds:
        trajectory = run(scheduler, timesteps, step_options, vectors)
        linear = THRESHOLDED if thresholds else UNUSUAL
    else:
        lanes = -(-axes // prod(PICTURE))  # every pixel carries one axis
        pixels = torch.eye(axes, lanes * prod(PICTURE), dtype=torch.float64)
        pixels = pixels.view(axes, lanes, *PICTURE).transpose(0, 1)
        trajectory = run(scheduler, timesteps, step_options, torch.cat([pixels, vectors]))
        linear = fitted(trajectory, vectors)
    if isinstance(linear, str) or config.get("clip_sample"):  # it clips, perhaps beyond SPREAD
        names = ("sample_max_value", "dynamic_thresholding_ratio")
        threshold = tuple(config[name] for name in names) if thresholds else None
        clipped = _clipped(scheduler, step_options, timesteps, vectors, trajectory, threshold)
        linear = linear if clipped is None else clipped.columns()
    if isinstance(linear, str):
        raise NotLinear(linear)
    return Table(
        timesteps=timesteps,
        scales=scales_of(trajectory),
        draws=trajectory.draws,
        noise_dtype=trajectory.noise_dtype,
        states=trajectory.states,
        keeps=trajectory.keeps,
        **linear,
    )


def _clipped(
    scheduler: Any,
    step_options: Mapping[str, Any],
    timesteps: Tensor,
    vectors: Tensor,
    trajectory: Trajectory,
    threshold: tuple[float, ...] | None,
) -> Clipped | None:
    """The steps of a scheduler that clips its estimate of the clean picture and keeps nothing
    between steps; None for any other.

    Args:
        vectors: [R, axes, *PICTURE] the random samples at the end of `trajectory`.
        threshold: of dynamic thresholding, as for `clipping.read`.
    """
    count = len(timesteps)
    if trajectory.keeps:
        return None
    known = points(count, learns=vectors.shape[1] > 3 * count)
    step = read(run(scheduler, timesteps, step_options, known, apart=True), threshold)
    # far beyond the clipping range, and about as large as it
    within = vectors[4:].clone()
    within[:, : 2 * count] /= SPREAD
    within = torch.cat([vectors[4:], within])
    for random, made in (
        (vectors, trajectory),
        (within, run(scheduler, timesteps, step_options, within)),
    ):
        if not float(step.misses(made, random.flatten(2)).max()) <= ALLOWED:
            return None
    return step
