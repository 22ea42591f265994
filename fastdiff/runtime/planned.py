"""The Triton kernels that a picture launches, found by running networks on tensors without memory.

`step`, `call` and `coding` return functions to run within `kernels.planned.Planning`.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdiff.kernels.contract import Launch
from fastdiff.kernels.guided_step import guided_step
from fastdiff.kernels.planned import Planning, distinct
from fastdiff.models.vae import Decoder, Encoder
from fastdiff.runtime.buffers import buffers_of, inputs_of
from fastdiff.runtime.loop import Plans
from fastdiff.runtime.network import Network

N = TypeVar("N")
Run = Callable[[], object]
DEPTHS = 4
"""How many depths a scheduler may have: it uses zero to three past steps."""


def without_memory(network: N, dtype: torch.dtype | None = None) -> N:
    """A network (or a part of one) with its weights on the meta device, at the same strides and
    storage offsets; `dtype`: of the copies, if another."""
    part: Any = network
    if isinstance(part, Tensor):
        dtype = dtype if dtype is not None and part.is_floating_point() else part.dtype
        reach = [
            stride * (size - 1) for stride, size in zip(part.stride(), part.shape, strict=True)
        ]
        memory = torch.empty(part.storage_offset() + sum(reach) + 1, dtype=dtype, device="meta")
        part = memory.as_strided(part.shape, part.stride(), part.storage_offset())
    elif isinstance(part, tuple):
        part = tuple(without_memory(value, dtype) for value in part)
    elif is_dataclass(part) and not isinstance(part, type):
        own = {field.name: getattr(part, field.name) for field in fields(part) if field.init}
        given = {name: without_memory(value, dtype) for name, value in own.items()}
        part = replace(part, **given)
    return part  # type: ignore[no-any-return]


def kernels_of(runs: Iterable[Run], arch: int) -> list[Launch]:
    """One launch for each specialisation that Triton compiles for `runs` on an architecture."""
    with torch.no_grad(), Planning(arch) as planning:
        for run in runs:
            run()
    return distinct(planning.launches)


def step(network: Network, given: Any, latents: Tensor) -> Run:
    """The step of a denoising loop, as `runtime.loop` repeats it.

    Args:
        network: one without memory.
        given: its conditions, on the meta device.
        latents: [B, …], on the meta device.
    """
    buffers = buffers_of(*_inputs(network, given, latents), capacity=1, depth=0, noisy=False)
    return partial(Plans(network).advance, *buffers)


def guided_steps(network: Network, given: Any, latents: Tensor, copies: int) -> list[Run]:
    """What follows the network in a step, for every scheduler: each depth, with noise and without;
    with thresholds, as DeepFloyd IF has them, if the network predicts the variance.

    copies: predictions per latent, 2 with guidance; the other arguments as for `step`.
    """
    inputs, own = _inputs(network, given, latents), latents.shape[1]
    wide = getattr(network, "out_channels", own) == 2 * own

    def run(depth: int, noisy: bool, thresholds: bool = False) -> Run:
        of = buffers_of(*inputs, capacity=1, depth=depth, noisy=noisy, thresholds=thresholds)
        batch, *middle, channels = of.x.shape
        output = of.x.new_empty((copies * batch, *middle, channels * (1 + wide)))
        state = (of.sample, of.history, of.x, of.table, of.step, of.noise)
        return lambda: guided_step(output, *state, limits=of.limits)

    runs = [run(depth, noisy) for depth in range(DEPTHS) for noisy in (False, True)]
    return [*runs, run(0, noisy=True, thresholds=True)] if wide else runs


def call(network: Network, given: Any, latents: Tensor) -> Run:
    """A single call of the network; arguments as for `step`."""
    return partial(network.predict, *_inputs(network, given, latents))


def _inputs(network: Network, given: Any, latents: Tensor) -> tuple[Tensor, Any, Any]:
    timesteps = torch.empty(1, 1, device=latents.device)
    with torch.no_grad():
        hoisted = network.hoist(given, timesteps, tuple(latents.shape[2:]))
    return inputs_of(network, latents, hoisted)


def coding(coder: Decoder | Encoder, dtype: torch.dtype, sides: tuple[int, int]) -> Run:
    """One picture through an autoencoder's encoder or decoder without memory; `sides`: Y and X."""
    sample = torch.empty(1, *sides, coder.conv_in.weight.shape[1], dtype=dtype, device="meta")
    return lambda: coder.run(sample)
