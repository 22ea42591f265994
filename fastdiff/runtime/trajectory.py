"""Runs a scheduler on known vectors, to which `schedulers` fits its table.

`torch.func.vmap` runs the scheduler's Python once for all vectors, each of which is independent. So
no vector can silently influence another; and a step that branches on the sample's values, or draws
noise that we do not see, fails instead of looking linear.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

PICTURE = (1, 4, 1, 2)
"""Shape of one sample. It has several pixels, to detect a step that mixes them, and more than the
three channels that schedulers take from a network that learns its variance."""


class PerStep(tuple[Any, ...]):
    """An argument of a scheduler's `step` that has another value in each step."""


def following(timesteps: Tensor) -> PerStep:
    """The timestep after each of `timesteps` [n], None after the last; some loops pass it on."""
    return PerStep((*timesteps.cpu()[1:], None))


class NotLinear(ValueError):
    """The scheduler's step is not a table's linear recurrence; the message says why."""


@dataclass(frozen=True)
class Trajectory:
    """What a scheduler does with W known samples in n steps. All on the CPU, float64."""

    samples: Tensor
    """[W, n, P]: the sample before each step."""
    results: Tensor
    """[W, n, P]: the sample after each step."""
    inputs: Tensor
    """[W, n, P]: the network's input at each step."""
    draws: tuple[bool, ...]
    """Whether each step drew noise."""
    noise_dtype: torch.dtype | None
    """The dtype in which noise is drawn; None: the network's."""
    states: tuple[Mapping[str, Any], ...]
    """The plain attributes that the steps change, with their values after each step."""
    keeps: tuple[str, ...]
    """The other attributes that the steps change."""


def run(
    scheduler: Any,
    timesteps: Tensor,
    step_options: Mapping[str, Any],
    known: Tensor,
    apart: bool = False,
) -> Trajectory:
    """Run a copy of the scheduler, from its present state, as a pipeline does.

    Args:
        scheduler: a diffusers scheduler after `set_timesteps`.
        timesteps: [n] the timesteps to run it through.
        step_options: further arguments of its `step`, without a generator; some may be `PerStep`.
        known: [W, 3n, *PICTURE] float64: first, for each step, what is added to its sample (the
            initial sample at the first, then as a callback may change it), then the network's
            outputs, then the noises. With 4n, the last are the network's outputs for the variance,
            in channels beside the outputs.
        apart: give each step only what is added, without the result of the step before.

    Raises:
        NotLinear: a step fails on these vectors, or gives numbers that are not finite.
    """
    count, options = len(timesteps), {**step_options, "return_dict": False}
    drawn: dict[int, torch.dtype] = {}
    changes = _Changes()
    at = 0

    def whole(known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal at
        parts: list[tuple[Tensor, ...]] = [part.unbind() for part in known.split(count)]
        edits, outputs, noises, *variances = parts

        def draw(shape: Any, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Tensor:
            if at in drawn or tuple(shape) != PICTURE:
                raise NotLinear("it draws noise twice, or not of the sample's shape")
            drawn[at] = dtype or torch.get_default_dtype()
            return noises[at].clone()

        own = _copy(scheduler, draw)
        scale = getattr(own, "scale_model_input", lambda sample, _: sample)
        samples, inputs = [], []
        results: list[Tensor] = []
        changes.note(own)
        for at, timestep in enumerate(timesteps):
            samples.append(edits[at] if apart or not at else results[-1] + edits[at])
            # clones: the scheduler may work in place
            inputs.append(scale(samples[-1].clone(), timestep))
            given = {k: v[at] if isinstance(v, PerStep) else v for k, v in options.items()}
            # the network's channels; a copy even of one part
            output = torch.cat([outputs[at], *(part[at] for part in variances)], dim=1)
            moved = own.step(output, timestep, samples[-1].clone(), **given)
            if moved[0].shape != PICTURE:
                raise NotLinear(f"it turns {tuple(PICTURE)} into {tuple(moved[0].shape)}")
            results.append(moved[0])
            changes.note(own)
        return torch.stack(samples), torch.stack(inputs), torch.stack(results)

    try:
        with torch.inference_mode(), warnings.catch_warnings():
            # of quantiles, which torch computes one by one
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            samples, inputs, results = torch.func.vmap(whole)(known)
    except Exception as error:  # foreign code; if it matters, diffusers' own loop raises it
        raise NotLinear(f"it cannot be followed: {_reason(error, scheduler)}") from error
    states, keeps = changes.states()
    finite = results.isfinite().flatten(2).all(2).all(0)
    if not finite.all():
        raise NotLinear("it gives numbers that are not finite")
    dtypes = set(drawn.values())
    if len(dtypes) > 1:
        raise NotLinear(f"its steps draw noise in several dtypes: {dtypes}")
    return Trajectory(
        samples=samples.double().flatten(2),
        results=results.double().flatten(2),
        inputs=inputs.double().flatten(2),
        draws=tuple(i in drawn for i in range(count)),
        noise_dtype=next(iter(dtypes - {known.dtype}), None),
        states=states,
        keeps=keeps,
    )


_PLAIN = (bool, int, float, str, type(None))


class _Changes:
    """Collects the scheduler's attributes that its steps change."""

    def __init__(self) -> None:
        self._noted: list[dict[str, Any]] = []

    def note(self, scheduler: Any) -> None:
        """Note the present attributes; lists are copied, since they change in place."""
        self._noted.append({name: _frozen(value) for name, value in vars(scheduler).items()})

    def states(self) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
        """`Trajectory.states` and `Trajectory.keeps`."""
        first, *later = self._noted
        pairs = zip(self._noted, later, strict=False)
        names = {
            name
            for before, after in pairs
            for name in after
            if name not in before or not _same(before[name], after[name])
        }
        keeps = {
            name
            for name in names
            for noted in later
            if name in noted and not isinstance(noted[name], _PLAIN)
        }
        plain = sorted(names - keeps)
        states = tuple({name: noted[name] for name in plain if name in noted} for noted in later)
        return states, tuple(sorted(keeps))


def _frozen(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple(value), tuple(map(_frozen, value.values()))
    return value


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, tuple) and isinstance(after, tuple):
        return len(before) == len(after) and all(map(_same, before, after))
    if isinstance(before, _PLAIN) and isinstance(after, _PLAIN):
        return type(before) is type(after) and before == after
    return before is after


def _reason(error: Exception, scheduler: Any) -> str:
    """The error in one clause; vmap's own messages explain how to change a program, which is
    not ours to change."""
    if isinstance(error, NotLinear):
        return str(error)
    text = (str(error).splitlines() or [""])[0].split(". ")[0]
    if text.startswith("vmap: called random"):
        return "it draws noise other than by `randn_tensor` in its own step"
    if text.startswith("vmap:"):
        return "it depends on the sample's values"
    if getattr(scheduler, "_step_index", None) or getattr(scheduler, "counter", None):
        return "it is in the middle of a run; call set_timesteps first"
    return f"{type(error).__name__}: {text}"


def _copy(scheduler: Any, draw: Callable[..., Tensor]) -> Any:
    """A copy on the CPU that takes its noise from `draw`; nothing outside the copy changes."""
    own = copy.deepcopy(scheduler)
    for name, value in vars(own).items():
        if isinstance(value, Tensor):
            setattr(own, name, value.cpu())
    step = type(own).step
    if isinstance(step, FunctionType) and "randn_tensor" in step.__globals__:
        names = {**step.__globals__, "randn_tensor": draw}
        ours = FunctionType(step.__code__, names, "step", step.__defaults__, step.__closure__)
        ours.__kwdefaults__ = step.__kwdefaults__
        own.step = MethodType(ours, own)
    if hasattr(own, "get_lms_coefficient"):
        # Its integrals use tensors of one number: 110 ms in 50 steps. numpy's numbers give the same
        # bits in 5 ms.
        numbers = copy.copy(own)
        numbers.sigmas = own.sigmas.numpy()
        own.get_lms_coefficient = numbers.get_lms_coefficient
    return own
