"""What a picture would ask of a GPU for our Triton kernels, found on tensors without memory.

`step` and `coding` make functions to run within `kernels.planned.Planning`.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdiff.kernels.contract import Launch
from fastdiff.kernels.guided_step import guided_step
from fastdiff.kernels.guided_step.spec import HISTORY
from fastdiff.kernels.planned import Planning, distinct
from fastdiff.models.controlnet import ControlNet
from fastdiff.models.unet import UNet
from fastdiff.models.vae import Decoder, Encoder

N = TypeVar("N")
Run = Callable[[], object]
DEPTHS = 4
"""Steps of the past that schedulers look at: none to three."""


def without_memory(network: N, dtype: torch.dtype | None = None) -> N:
    """A network (or a part of one) whose weights are on the meta device, in the same strides and as
    far from the begin of their memory; `dtype`: of theirs, if another."""
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
    """A launch of each specialisation that Triton compiles for `runs` on an architecture."""
    with torch.no_grad(), Planning(arch) as planning:
        for run in runs:
            run()
    return distinct(planning.launches)


def step(
    unet: UNet, dtype: torch.dtype, sides: tuple[int, int], tokens: int, guided: bool = True
) -> Run:
    """What `runtime.loop` repeats for a picture, on hoisted rows.

    Args:
        unet: without memory.
        dtype: of its weights.
        sides: Y and X of the latents.
        tokens: of the text.
        guided: whether there are two texts, the unconditional one first.
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    halves = 2 if guided else 1
    latents = empty(1, *sides, unet.conv_in.weight.shape[1])
    # SDXL's halves differ in what is added to the time: they part at the first resnet
    time_rows = empty(1 if unet.added is None else halves, unet.rows.weight.shape[0])
    text = empty(halves, tokens, unet.text.weight.shape[0])
    sample = empty(*latents.shape, dtype=torch.float32)
    history = empty(2, 0, *latents.shape, dtype=torch.float32)
    table = empty(1, HISTORY + 1, dtype=torch.float32)
    step = empty(1, dtype=torch.int64)

    def run() -> None:
        output = unet.predict(latents, time_rows, text)
        guided_step(output, sample, history, latents, table, step)

    return run


def guided_steps(unet: UNet, sides: tuple[int, int], guided: bool = True) -> list[Run]:
    """What follows the network in a step, for every scheduler: of each depth, drawing noise or not.
    The rest as of `step`."""

    def run(depth: int, noisy: bool) -> None:
        def state(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device="meta")

        shape, dtype = (1, *sides, unet.conv_out.weight.shape[0]), unet.conv_in.weight.dtype
        guided_step(
            state(2 if guided else 1, *shape[1:]).to(dtype),
            state(*shape),
            state(2, depth, *shape),
            state(*shape).to(dtype),
            state(1, HISTORY + 1 + 2 * depth),
            torch.empty(1, dtype=torch.int64, device="meta"),
            state(*shape) if noisy else None,
        )

    return [partial(run, depth, noisy) for depth in range(DEPTHS) for noisy in (False, True)]


def control(net: ControlNet, sides: tuple[int, int], tokens: int) -> Run:
    """What a ControlNet without memory does in a step with guidance; the rest as of `step`."""
    dtype = net.conv_in.weight.dtype

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    latents = empty(2, *sides, net.conv_in.weight.shape[1])
    time_rows = empty(1 if net.added is None else 2, net.rows.weight.shape[0])
    text = empty(2, tokens, net.text.weight.shape[0])
    picture = empty(2, *sides, net.conv_in.weight.shape[0])
    return lambda: net.predict(latents, time_rows, text, picture)


def coding(coder: Decoder | Encoder, dtype: torch.dtype, sides: tuple[int, int]) -> Run:
    """One picture through a half of an autoencoder without memory, from `sides` Y and X."""
    sample = torch.empty(1, *sides, coder.conv_in.weight.shape[1], dtype=dtype, device="meta")
    return lambda: coder.run(sample)
