"""Whether a compact network can take what it is given as it is."""

from torch import Tensor

from fastdiff.models.watch import Unsupported


def fits(name: str, tensor: Tensor | None, weight: Tensor, channels: int, dim: int) -> Tensor:
    """The tensor; Unsupported unless it has these channels and dimensions and suits `weight`.

    Four dimensions are a picture's, with the channels at 1; otherwise they come last.
    """
    if tensor is None:
        raise Unsupported(f"it was given no {name}")
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
    if tensor.numel() == 0:
        raise Unsupported(f"{name} is empty")
    return tensor


def one_each(name: str, tensor: Tensor, latents: Tensor, copies: int) -> None:
    """Raise Unsupported unless there are `copies` of `name` for each of the latents."""
    if tensor.shape[0] != copies * latents.shape[0]:
        raise Unsupported(
            f"{name} is for {tensor.shape[0]} pictures; there are {latents.shape[0]} latents"
            + (f" in {copies} copies" if copies > 1 else "")
        )
