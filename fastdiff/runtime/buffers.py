"""The memory of a denoising loop's step."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.guided_step.spec import HISTORY
from fastdiff.models.hoisted import Hoisted
from fastdiff.runtime.network import Network
from fastdiff.runtime.recordings import buffer, buffers_for, first_of


class Buffers(NamedTuple):
    """The tensors that a step reads and writes. `S`: float32, or float64 for a float64 network.
    [B, …]: latents as the network packs them."""

    x: Tensor
    """[B, …] the network's next input."""
    row: Any
    """This step's row of `Hoisted.rows`."""
    constants: Any
    """`Hoisted.constants`."""
    sample: Tensor
    """[B, …] S."""
    history: Tensor
    """[2, M, B, …] S."""
    table: Tensor
    """[capacity, columns] S."""
    step: Tensor
    """[1] int64, or [B] if each picture is at its own step."""
    noise: Tensor | None
    """[B, …] S, if the scheduler adds noise."""
    kept: tuple[Tensor, ...]
    """[B, …] S each: what `guided_step` takes after the noise. Empty if all is drawn."""
    limits: Tensor | None
    """[B] S, if the scheduler thresholds."""


def inputs_of(network: Network, latents: Tensor, hoisted: Hoisted) -> tuple[Tensor, Any, Any]:
    """The arguments of the network's `predict` in the first step."""
    x = network.pack(latents).to(network.dtype)
    return x, first_of(hoisted.rows), hoisted.constants


def buffers_of(
    x: Tensor,
    row: Any,
    constants: Any,
    capacity: int,
    depth: int,
    noisy: bool,
    kept: int = 0,
    thresholds: bool = False,
    steps: int = 1,
) -> Buffers:
    """The buffers of a step, all zeros: even noise that a step does not draw is read.

    Args:
        x, row, constants: as `predict` takes them; only their shapes, dtypes and devices count.
        capacity: rows of the table.
        depth: past steps that the scheduler uses.
        noisy: whether it draws noise.
        kept: the number of tensors in `Buffers.kept`.
        thresholds: whether it clips each sample by that sample's own quantile.
        steps: the number of step indices, 1 or B.
    """
    state = torch.float64 if x.dtype == torch.float64 else torch.float32

    def make(*shape: int, dtype: torch.dtype = state) -> Tensor:
        return buffer(shape, dtype, x.device).zero_()

    return Buffers(
        x=make(*x.shape, dtype=x.dtype),
        row=buffers_for(row, x.device),
        constants=buffers_for(constants, x.device),
        sample=make(*x.shape),
        history=make(2, depth, *x.shape),
        table=make(capacity, HISTORY + 1 + 2 * depth),
        step=make(steps, dtype=torch.int64),
        noise=make(*x.shape) if noisy else None,
        kept=tuple(make(*x.shape) for _ in range(kept)),
        limits=make(x.shape[0]) if thresholds else None,
    )
