"""Any diffusers scheduler as a table of coefficients, found by asking the scheduler itself.

A scheduler's step is linear in the sample, in the network's outputs so far and in fresh noise. So
it is run once on coordinate vectors: the first sample is e_0, the network's output of step i its
own axis, every noise it draws another. What comes back is the exact combination; each step becomes

    x[i+1] = a x[i] + sum over h of (b_h eps[i-h] + c_h x[i-h]) + d noise,   input[i] = s[i] x[i]

A scheduler that is not linear (thresholding, clipping) leaves a residual and is refused.
"""

import copy
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdiff.kernels.guided_step.spec import GUIDANCE, HISTORY, NEXT_SCALE, NOISE, RESCALE, SAMPLE

MAX_DEPTH = 3
EXACT = 1e-12
"""Deviation, relative to the result, of a scheduler that computes in float64."""
ROUNDING = 2.0**-24
"""Deviation that a cast to float32 inside a step explains; a deeper history would only fit it."""
ALLOWED = 1e-6
"""Deviation beyond which it is no recurrence at all."""
SPREAD = 30.0
"""Deviation of the random trajectory that must follow the table: outside every clipping range."""


class NotLinear(ValueError):
    """The scheduler's step is not the linear recurrence of this module; the message says where."""


@dataclass(frozen=True)
class Table:
    """One row per call of the network. All on the CPU, coefficients float64."""

    timesteps: Tensor
    """[n] as the scheduler gives them to the network."""
    scales: Tensor
    """[n] s: what the sample is multiplied by before the network sees it."""
    samples: Tensor
    """[n] a."""
    outputs: Tensor
    """[n, M+1] b_0..b_M."""
    past_samples: Tensor
    """[n, M] c_1..c_M."""
    noises: Tensor
    """[n] d."""
    draws: tuple[bool, ...]
    """Whether the scheduler draws noise in a step, used or not: generators must keep in step."""
    noise_dtype: torch.dtype | None
    """What the noise is drawn in, whatever the network's dtype; None: in the network's dtype."""
    residual: float
    """Largest deviation of a step from the recurrence, relative to its coefficients."""

    @property
    def depth(self) -> int:
        """M: how many past steps the recurrence looks back on."""
        return self.past_samples.shape[1]

    def rows(self, guidance_scale: float, guidance_rescale: float = 0.0) -> Tensor:
        """[n, 6 + 2M] float64, the table that `kernels.guided_step` reads."""
        count, depth = len(self.timesteps), self.depth
        rows = torch.zeros(count, HISTORY + 1 + 2 * depth, dtype=torch.float64)
        rows[:, GUIDANCE] = guidance_scale
        rows[:, RESCALE] = guidance_rescale
        rows[:, SAMPLE] = self.samples
        rows[:, NOISE] = self.noises
        rows[:-1, NEXT_SCALE] = self.scales[1:]
        rows[-1, NEXT_SCALE] = 1.0
        rows[:, HISTORY : HISTORY + depth + 1] = self.outputs
        rows[:, HISTORY + depth + 1 :] = self.past_samples
        return rows


def probe(scheduler: Any, step_options: Mapping[str, Any] | None = None) -> Table:
    """The table of a scheduler whose timesteps are set; remembered by its configuration.

    Args:
        scheduler: a diffusers scheduler after `set_timesteps`; it is copied, not advanced.
        step_options: further arguments of its `step`, such as `eta`.

    Raises:
        NotLinear: it thresholds or clips, or looks back on more than three steps.
    """
    key = _key(scheduler, step_options or {})
    if key not in _TABLES:
        if len(_TABLES) >= 64:
            _TABLES.pop(next(iter(_TABLES)))
        _TABLES[key] = _probe(scheduler, step_options or {})
    return _TABLES[key]


_TABLES: dict[str, Table] = {}


def _key(scheduler: Any, step_options: Mapping[str, Any]) -> str:
    """All that a scheduler's steps depend on: its class, options and every table it keeps."""
    digest = hashlib.sha256(repr((type(scheduler), dict(step_options))).encode())
    for name, value in sorted(vars(scheduler).items()):
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy()
        data = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
        digest.update(name.encode() + b"=" + data)
    return digest.hexdigest()


def _probe(scheduler: Any, step_options: Mapping[str, Any]) -> Table:
    count = len(scheduler.timesteps)
    axes = torch.eye(1 + 2 * count, dtype=torch.float64)
    run = _run(scheduler, step_options, axes[: 1 + count], axes[1 + count :])
    generator = torch.Generator().manual_seed(0)
    vectors = SPREAD * torch.randn(1 + count, 8, generator=generator, dtype=torch.float64)
    noises = torch.randn(count, 8, generator=generator, dtype=torch.float64)
    trajectory = _run(scheduler, step_options, vectors, noises)
    for bound in (EXACT, ROUNDING):
        table = _fit(scheduler.timesteps.cpu(), run, axes, bound)
        miss, step = _follow(table, trajectory, vectors, noises)
        if miss <= 100 * EXACT:
            return table
    if not miss <= ALLOWED:
        raise NotLinear(
            f"step {step} misses its recurrence by {miss:.1e} on a random sample: it thresholds or"
            " clips"
        )
    return table


@dataclass(frozen=True)
class _Run:
    """What a scheduler made of given vectors."""

    samples: list[Tensor]
    inputs: list[Tensor]
    noises: list[int | None]
    """Which noise vector each step drew."""
    noise_dtypes: set[torch.dtype]


def _run(scheduler: Any, step_options: Mapping[str, Any], vectors: Tensor, noises: Tensor) -> _Run:
    """Run a copy of the scheduler: `vectors` [1 + n, A] are the first sample and the outputs."""
    scheduler = copy.deepcopy(scheduler)
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = None  # from its beginning, wherever it stands
    options = dict(step_options)
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = None
    run = _Run([vectors[0]], [], [], set())
    with torch.no_grad(), _Noise(noises) as noise:
        for i, timestep in enumerate(scheduler.timesteps):
            sample = run.samples[-1][:, None, None, None]  # an axis is a picture of one pixel
            output = vectors[1 + i][:, None, None, None]
            scale = getattr(scheduler, "scale_model_input", lambda sample, _: sample)
            run.inputs.append(scale(sample, timestep).to(torch.float64).flatten())
            before = noise.drawn
            moved = scheduler.step(output, timestep, sample, return_dict=False, **options)[0]
            if noise.drawn > before + 1:
                raise NotLinear(f"step {i} draws noise {noise.drawn - before} times")
            run.noises.append(before if noise.drawn > before else None)
            run.samples.append(moved.to(torch.float64).flatten())
    run.noise_dtypes.update(noise.dtypes)
    return run


class _Noise(TorchFunctionMode):
    """Answers `torch.randn` with the next of the given vectors, as many pictures of one pixel."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self._vectors, self.drawn = vectors, 0
        self.dtypes: set[torch.dtype] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is not torch.randn:
            return function(*args, **(kwargs or {}))
        self.drawn += 1
        self.dtypes.add((kwargs or {}).get("dtype") or torch.get_default_dtype())
        return self._vectors[min(self.drawn, len(self._vectors)) - 1][:, None, None, None]


def _fit(timesteps: Tensor, run: _Run, axes: Tensor, bound: float) -> Table:
    """Least squares for every step: the shallowest history that deviates by `bound` at most."""
    count = len(timesteps)
    x = torch.stack(run.samples).numpy()
    outputs, noises = axes[1 : 1 + count].numpy(), axes[1 + count :].numpy()
    scales = np.array([_multiple(run.inputs[i].numpy(), x[i], i) for i in range(count)])
    a, d = np.zeros(count), np.zeros(count)
    b, c = np.zeros((count, MAX_DEPTH + 1)), np.zeros((count, MAX_DEPTH))
    worst = 0.0
    for i in range(count):
        drawn = run.noises[i]
        for depth in range(min(MAX_DEPTH, i) + 1):
            for older in (0, depth) if depth else (0,):
                basis = [x[i], *outputs[i - depth : i + 1][::-1], *x[i - older : i][::-1]]
                if drawn is not None:
                    basis.append(noises[drawn])
                solution, residual = _solve(basis, x[i + 1])
                if residual <= bound:
                    break
            if residual <= bound:
                break
        worst = max(worst, residual)
        a[i], b[i, : depth + 1] = solution[0], solution[1 : depth + 2]
        c[i, :older] = solution[depth + 2 : depth + 2 + older]
        if drawn is not None:
            d[i] = solution[-1]
    if worst > ALLOWED:
        raise NotLinear(f"steps miss a linear recurrence of depth {MAX_DEPTH} by {worst:.1e}")
    used = np.nonzero((b[:, 1:] != 0) | (c != 0))[1]
    depth = int(used.max()) + 1 if used.size else 0
    return Table(
        timesteps=timesteps,
        scales=torch.from_numpy(scales),
        samples=torch.from_numpy(a),
        outputs=torch.from_numpy(b[:, : depth + 1].copy()),
        past_samples=torch.from_numpy(c[:, :depth].copy()),
        noises=torch.from_numpy(d),
        draws=tuple(n is not None for n in run.noises),
        noise_dtype=next(iter(run.noise_dtypes - {torch.float64}), None),
        residual=worst,
    )


def _solve(
    basis: Sequence[NDArray[np.float64]], target: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Coefficients on the basis, and the largest deviation relative to the target."""
    matrix = np.stack(basis, axis=1)
    norms = np.maximum(np.linalg.norm(matrix, axis=0), 1e-300)
    solution = np.linalg.lstsq(matrix / norms, target, rcond=None)[0] / norms
    return solution, float(np.abs(matrix @ solution - target).max() / np.abs(target).max())


def _multiple(scaled: NDArray[np.float64], sample: NDArray[np.float64], index: int) -> float:
    at = int(np.abs(sample).argmax())
    scale = float(scaled[at] / sample[at])
    if not np.abs(scaled - scale * sample).max() <= ALLOWED * np.abs(scaled).max():
        raise NotLinear(f"scale_model_input of step {index} is not a multiple of the sample")
    return scale


def _follow(table: Table, run: _Run, vectors: Tensor, noises: Tensor) -> tuple[float, int]:
    """Largest deviation of the table from a random trajectory, relative to its terms, and its step.

    What clips is linear on small coordinate vectors, and a deep enough history fits anything there.
    """
    worst = (0.0, 0)
    for i in range(len(table.timesteps)):
        back = min(table.depth, i)
        terms = [table.samples[i] * run.samples[i]]
        terms += [table.outputs[i, h] * vectors[1 + i - h] for h in range(back + 1)]
        terms += [table.past_samples[i, h - 1] * run.samples[i - h] for h in range(1, back + 1)]
        drawn = run.noises[i]
        if drawn is not None:
            terms.append(table.noises[i] * noises[drawn])
        stacked = torch.stack(terms)
        miss = (run.samples[i + 1] - stacked.sum(dim=0)).abs().max() / stacked.abs().max()
        if not float(miss) <= worst[0]:  # a NaN is the worst
            worst = (float(miss), i)
    return worst
