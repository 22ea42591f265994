"""What a compact network is given, where diffusers itself would refuse or convert it."""

from typing import Any

from torch import Tensor

from fastdiff.models.watch import Unsupported


def refuse(**given: Any) -> None:
    """Raise Unsupported where one of the arguments that a network does not take is not None."""
    for name, value in given.items():
        if value is not None:
            raise Unsupported(f"it was given {name}")


def check_texts(text: Tensor, latents: Tensor, copies: int) -> None:
    """Raise Unsupported unless there are as many texts as `copies` of the latents."""
    if text.shape[0] != copies * latents.shape[0]:
        raise Unsupported(f"{text.shape[0]} texts for {latents.shape[0]} latents")


def check_tensor(name: str, tensor: Tensor, weight: Tensor, channels: int, dim: int) -> None:
    """Raise Unsupported unless a tensor has these channels (its second side where it has four, else
    its last) and dimensions, and `weight`'s dtype and device."""
    at = 1 if dim == 4 else -1
    if tensor.ndim != dim or tensor.shape[at] != channels:
        raise Unsupported(
            f"{name} has the shape {list(tensor.shape)}; expected {channels} channels in {dim}"
            " dimensions"
        )
    if tensor.dtype != weight.dtype or tensor.device != weight.device:
        raise Unsupported(
            f"{name} is {tensor.dtype} on {tensor.device}, the weights are {weight.dtype} on"
            f" {weight.device}"
        )
