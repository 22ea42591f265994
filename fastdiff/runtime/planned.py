"""What a picture would ask of a GPU for our Triton kernels, found on tensors without memory.

`step` and `coding` make functions to run within `kernels.planned.Planning`.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdiff.kernels.contract import Launch
from fastdiff.kernels.guided_step import guided_step
from fastdiff.kernels.guided_step.spec import HISTORY
from fastdiff.kernels.planned import Planning, distinct
from fastdiff.models.unet import UNet
from fastdiff.models.vae import Decoder, Encoder

N = TypeVar("N")
Run = Callable[[], object]


def without_memory(network: N) -> N:
    """A network (or a part of one) whose weights are on the meta device, in the same strides."""
    part: Any = network
    if isinstance(part, Tensor):
        part = torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device="meta")
    elif isinstance(part, tuple):
        part = tuple(map(without_memory, part))
    elif is_dataclass(part) and not isinstance(part, type):
        own = {field.name: getattr(part, field.name) for field in fields(part) if field.init}
        part = replace(part, **{name: without_memory(value) for name, value in own.items()})
    return part  # type: ignore[no-any-return]


def kernels_of(runs: Iterable[Run], arch: int) -> list[Launch]:
    """A launch of each specialisation that Triton compiles for `runs` on an architecture."""
    with torch.no_grad(), Planning(arch) as planning:
        for run in runs:
            run()
    return distinct(planning.launches)


def step(unet: UNet, dtype: torch.dtype, sides: tuple[int, int], tokens: int) -> Run:
    """What `runtime.loop` repeats for a picture with guidance, on hoisted rows.

    Args:
        unet: without memory.
        dtype: of its weights.
        sides: Y and X of the latents.
        tokens: of the text.
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    latents = empty(1, *sides, unet.conv_in.weight.shape[1])
    # SDXL's halves differ in what is added to the time: they part at the first resnet
    time_rows = empty(1 if unet.added is None else 2, unet.rows.weight.shape[0])
    text = empty(2, tokens, unet.text.weight.shape[0])
    sample = empty(*latents.shape, dtype=torch.float32)
    history = empty(2, 0, *latents.shape, dtype=torch.float32)
    table = empty(1, HISTORY + 1, dtype=torch.float32)
    step = empty(1, dtype=torch.int64)

    def run() -> None:
        output = unet.predict(latents, time_rows, text)
        guided_step(output, sample, history, latents, table, step)

    return run


def coding(coder: Decoder | Encoder, dtype: torch.dtype, sides: tuple[int, int]) -> Run:
    """One picture through a half of an autoencoder without memory, from `sides` Y and X."""
    sample = torch.empty(1, *sides, coder.conv_in.weight.shape[1], dtype=dtype, device="meta")
    return lambda: coder.run(sample)
