"""Turns any linear diffusers scheduler into a table of coefficients, by running it once.

A scheduler's step is linear in the sample, in the network's outputs so far and in fresh noise. So
it is run once on coordinate vectors: the first sample, the network's output at each step and each
noise have an axis of their own. The result shows the exact combination; each step becomes

    x[i+1] = a x[i] + sum over h of (b_h eps[i-h] + c_h x[i-h]) + d noise,   input[i] = s[i] x[i]

A scheduler that clips its estimate of the clean picture has a step of its own in `clipping`. Any
other scheduler that is not linear (thresholding) leaves a residual and is refused, as is one that
cannot be run this way. `trajectory` runs it, `recurrence` fits the coefficients.
"""

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.guided_step.spec import (
    CLIP_SAMPLE,
    GUIDANCE,
    HISTORY,
    KEPT_NOISE,
    KEPT_ORIGINAL,
    LIMIT,
    NEXT_SCALE,
    NOISE,
    PERTURBED,
    RESCALE,
    SAMPLE,
)
from fastdiff.models.originals import check_own
from fastdiff.models.watch import Unsupported
from fastdiff.runtime.clipping import points, read
from fastdiff.runtime.contents import digest_of
from fastdiff.runtime.guidance import Guidance
from fastdiff.runtime.recurrence import (
    ALLOWED,
    EXACT,
    MAX_DEPTH,
    ROUNDING,
    fit_steps,
    follow,
    scales_of,
)
from fastdiff.runtime.trajectory import PICTURE, NotLinear, Trajectory, run

__all__ = ["NotLinear", "Table", "probe", "refuse_foreign"]

UNGUIDED = Guidance()
SPREAD = 30.0
"""Standard deviation of the random samples that check the table: beyond every clipping range."""


@dataclass(frozen=True)
class Table:
    """One row per call of the network. All tensors on the CPU, coefficients in float64."""

    timesteps: Tensor
    """[n] the timesteps that the network receives."""
    scales: Tensor
    """[n] s: factor of the sample in the network's input."""
    samples: Tensor
    """[n] a."""
    outputs: Tensor
    """[n, M+1] b_0..b_M."""
    past_samples: Tensor
    """[n, M] c_1..c_M."""
    noises: Tensor
    """[n] d."""
    clips: Tensor
    """[n, 3] p, q and r of `clipping`; zeros for a step that clips nothing."""
    draws: tuple[bool, ...]
    """Whether the scheduler draws noise in each step, even unused: the generator must advance."""
    noise_dtype: torch.dtype | None
    """The dtype in which noise is drawn; None: the network's."""
    residual: float
    """Largest deviation of a step from the recurrence, relative to its result."""
    states: tuple[Mapping[str, Any], ...]
    """The plain attributes that steps change, such as `_step_index`, with their values after each
    step."""
    keeps: tuple[str, ...]
    """Other attributes that steps change, such as past predictions. If there are none, a callback
    may change the samples between the steps."""
    editable: bool
    """Whether the table also holds if samples change between the steps (inpainting)."""

    @property
    def depth(self) -> int:
        """M: the number of past steps in the recurrence."""
        return self.past_samples.shape[1]

    def rows(self, guidance: Guidance = UNGUIDED, factors: Tensor | None = None) -> Tensor:
        """[n, 13 + 2M] float64: the table that `kernels.guided_step` reads. `factors`: of
        `Inpainting`."""
        count, depth = len(self.timesteps), self.depth
        rows = torch.zeros(count, HISTORY + 1 + 2 * depth, dtype=torch.float64)
        for column, value in zip((GUIDANCE, RESCALE, PERTURBED), guidance, strict=True):
            rows[:, column] = torch.as_tensor(value, dtype=torch.float64, device="cpu")
        if factors is not None:
            rows[:, KEPT_ORIGINAL : KEPT_NOISE + 1] = factors
        rows[:, SAMPLE] = self.samples
        rows[:, NOISE] = self.noises
        rows[:, CLIP_SAMPLE : LIMIT + 1] = self.clips
        rows[:-1, NEXT_SCALE] = self.scales[1:]
        rows[-1, NEXT_SCALE] = 1.0
        rows[:, HISTORY : HISTORY + depth + 1] = self.outputs
        rows[:, HISTORY + depth + 1 :] = self.past_samples
        return rows


def probe(
    scheduler: Any,
    step_options: Mapping[str, Any] | None = None,
    timesteps: Tensor | None = None,
) -> Table:
    """The table of a scheduler whose timesteps are set; cached by everything it depends on.

    Args:
        scheduler: a diffusers scheduler after `set_timesteps`; a copy of it runs.
        step_options: further arguments of its `step`, such as `eta`.
        timesteps: [n] the pipeline's timesteps, if they are not all of `scheduler.timesteps`
            (image to image, `denoising_end`).

    Raises:
        NotLinear: its code is not all diffusers' own (then it is not run), it thresholds, clips
            more than its estimate of the clean picture, uses more than three past steps, or cannot
            be run.
    """
    refuse_foreign(scheduler)
    options = {k: v for k, v in (step_options or {}).items() if k != "generator"}
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
    if config.get("thresholding"):
        raise NotLinear("it thresholds every sample by its own quantile")
    count = len(timesteps)
    axes = 3 * count  # one each for the changes of the samples, the outputs, the noises
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(8, axes, *PICTURE, generator=generator, dtype=torch.float64)
    vectors[:, : 2 * count] *= SPREAD
    vectors[4:, 1:count] = 0
    lanes = -(-axes // prod(PICTURE))  # every pixel carries one axis
    pixels = torch.eye(axes, lanes * prod(PICTURE), dtype=torch.float64)
    known = torch.cat([pixels.view(axes, lanes, *PICTURE).transpose(0, 1), vectors])
    trajectory = run(scheduler, timesteps, step_options, known)
    scales = scales_of(trajectory)
    given, made = (
        values[:lanes].transpose(0, 1).flatten(1)[:, :axes]
        for values in (trajectory.samples, trajectory.results)
    )
    untouched = torch.cat([torch.arange(1), torch.arange(count, axes)])
    # first a table that also holds if samples change between steps, else one for unchanged samples
    for editable, within, random in ((True, torch.arange(axes), 8), (False, untouched, 4)):
        for bound in (EXACT, ROUNDING):
            fit = fit_steps(given[:, within], made[:, within], bound)
            misses = follow(fit, trajectory, vectors[-random:].flatten(2))
            if float(misses.max()) <= 100 * EXACT:
                break
        worst = float(fit.residuals.max())
        if editable and worst <= ALLOWED and float(misses.max()) <= ALLOWED:
            break
    linear = worst <= ALLOWED and float(misses.max()) <= ALLOWED
    if not linear or config.get("clip_sample"):  # perhaps beyond SPREAD
        clipped = _clipped(scheduler, step_options, timesteps, vectors, trajectory)
        if clipped is not None:
            return clipped
    if not worst <= ALLOWED:
        raise NotLinear(f"its steps are not a linear recurrence of depth {MAX_DEPTH}")
    if not linear:
        raise NotLinear("it clips samples or mixes their pixels")
    used = ((fit.outputs[:, 1:] != 0) | (fit.past_samples != 0)).any(0).nonzero()
    depth = int(used.max()) + 1 if len(used) else 0
    return Table(
        timesteps=timesteps,
        scales=scales,
        samples=fit.samples,
        outputs=fit.outputs[:, : depth + 1].clone(),
        past_samples=fit.past_samples[:, :depth].clone(),
        noises=fit.noises,
        clips=torch.zeros(count, 3, dtype=torch.float64),
        draws=trajectory.draws,
        noise_dtype=trajectory.noise_dtype,
        residual=worst,
        states=trajectory.states,
        keeps=trajectory.keeps,
        editable=editable,
    )


def _clipped(
    scheduler: Any,
    step_options: Mapping[str, Any],
    timesteps: Tensor,
    vectors: Tensor,
    trajectory: Trajectory,
) -> Table | None:
    """The table of a scheduler that clips its estimate of the clean picture and keeps nothing
    between steps; None for any other.

    vectors: [R, 3n, *PICTURE] the random samples at the end of `trajectory`.
    """
    count = len(timesteps)
    if trajectory.keeps:
        return None
    step = read(run(scheduler, timesteps, step_options, points(count), apart=True))
    # far beyond the clipping range, and about as large as it
    within = torch.cat([vectors[4:], vectors[4:] / SPREAD])
    for known, made in (
        (vectors, trajectory),
        (within, run(scheduler, timesteps, step_options, within)),
    ):
        if not float(step.misses(made, known.flatten(2)).max()) <= ALLOWED:
            return None
    return Table(
        timesteps=timesteps,
        scales=scales_of(trajectory),
        samples=step.a,
        outputs=step.b[:, None],
        past_samples=step.a.new_zeros(count, 0),
        noises=step.d,
        clips=torch.stack([step.p, step.q, step.r], dim=1),
        draws=trajectory.draws,
        noise_dtype=trajectory.noise_dtype,
        residual=0.0,
        states=trajectory.states,
        keeps=trajectory.keeps,
        editable=True,
    )
