"""Checks of a network's inputs, where diffusers itself would refuse or convert them."""

from typing import Any

from torch import Tensor

from fastdiff.models.watch import Unsupported
from fastdiff.tables import plural


def refuse(**given: Any) -> None:
    """Raise Unsupported if one of these arguments, which a network does not take, is not None."""
    for name, value in given.items():
        if value is not None:
            raise Unsupported(f"it was given {name}")


def channel_axis(latents: Tensor) -> int:
    """The axis of the channels: 1 of pictures [B, C, Y, X], the last of tokens [B, L, C]."""
    return 1 if latents.ndim == 4 else latents.ndim - 1


def checked(name: str, tensor: Tensor | None, weight: Tensor, channels: int, dim: int) -> Tensor:
    """`tensor`; Unsupported unless it has these channels and dimensions, and `weight`'s dtype and
    device.

    With four dimensions, channels are the second; otherwise the last.
    """
    if tensor is None:
        raise Unsupported(f"{name} is missing")
    if tensor.ndim != dim or tensor.shape[channel_axis(tensor)] != channels:
        raise Unsupported(
            f"{name} has the shape {list(tensor.shape)}; expected {channels} channels in {dim}"
            " dimensions"
        )
    if tensor.dtype != weight.dtype or tensor.device != weight.device:
        raise Unsupported(
            f"{name} is {tensor.dtype} on {tensor.device}, but the weights are {weight.dtype} on"
            f" {weight.device}"
        )
    if tensor.numel() == 0:
        raise Unsupported(f"{name} is empty")
    return tensor


def check_count(name: str, tensor: Tensor, latents: Tensor, copies: int) -> None:
    """Raise Unsupported unless `name` has `copies` entries for each of the latents."""
    if tensor.shape[0] != copies * latents.shape[0]:
        raise Unsupported(
            f"{name} is for {tensor.shape[0]} pictures; there are {latents.shape[0]} latents"
            + (f" in {copies} copies" if copies > 1 else "")
        )


def check_times(timesteps: Tensor, count: int, what: str = "text") -> None:
    """Raise Unsupported unless the n of timesteps [steps, n] divides `count`, how many of `what`
    there are."""
    times = timesteps.shape[1]
    if times == 0 or count % times != 0:
        raise Unsupported(f"{plural(times, 'timestep')} for {plural(count, what)}")
