"""What a compact network is given, where diffusers itself would refuse or convert it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastdiff.models import Trunk, UNet, Unsupported
from fastdiff.runtime.hoist import Conditions


def refuse(**given: Any) -> None:
    """Raise Unsupported where one of the arguments that a network does not take is not None."""
    for name, value in given.items():
        if value is not None:
            raise Unsupported(f"it was given {name}")


def one_text_each(text: Tensor, sample: Tensor, copies: int = 1) -> None:
    """Raise Unsupported unless there are as many texts as `copies` of the latents."""
    if text.shape[0] != copies * sample.shape[0]:
        raise Unsupported(f"{text.shape[0]} texts for {sample.shape[0]} latents")


def fits(name: str, tensor: Tensor, weight: Tensor, channels: int, dim: int) -> None:
    """Raise Unsupported unless a tensor has these channels and dimensions and suits `weight`."""
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


def fit_trunk(network: Trunk, sample: Tensor, given: Conditions) -> None:
    """Raise Unsupported where diffusers itself would refuse a tensor, or convert it."""
    if network.added is not None and (given.text_embeds is None or given.time_ids is None):
        raise Unsupported("text_embeds or time_ids are missing in added_cond_kwargs")
    if given.timestep_cond is not None and network.time.condition is None:
        raise Unsupported("it was given timestep_cond, for which it has no projection")
    weight = network.conv_in.weight
    fits("sample", sample, weight, channels=weight.shape[1], dim=4)
    fits("encoder_hidden_states", given.text, weight, network.text.weight.shape[1], 3)
    if sample.numel() == 0 or given.text.numel() == 0:
        raise Unsupported("it was given an empty tensor")
    if given.timestep_cond is not None and network.time.condition is not None:
        wide = network.time.condition.weight.shape[1]
        fits("timestep_cond", given.timestep_cond, weight, wide, 2)


def fit_images(network: UNet, given: Conditions, images: Sequence[Tensor]) -> None:
    """Raise Unsupported unless IP-Adapters have got as many `image_rows` as there are texts."""
    if network.ip_adapters is not None and not images:
        raise Unsupported("image_embeds are missing in added_cond_kwargs, which IP-Adapters need")
    if any(image.shape[0] != given.text.shape[0] for image in images):
        raise Unsupported("it was given another number of image_embeds than of texts")


def controls_of(
    network: UNet, sample: Tensor, down: Sequence[Tensor] | None, middle: Tensor | None
) -> Sequence[Tensor]:
    """A ControlNet's residuals, the middle one last."""
    if down is None and middle is None:
        return ()
    if down is None or middle is None or len(down) != network.skips:
        raise Unsupported("it was given ControlNet residuals in part")
    _fit_residuals("a ControlNet residual", network, sample, (*down, middle))
    return *down, middle


def inners_of(network: UNet, sample: Tensor, given: Any) -> Sequence[Tensor]:
    """A T2I-Adapter's residuals, as many as the network has places for."""
    if given is None:
        return ()
    if not isinstance(given, list):
        raise Unsupported(f"it was given T2I-Adapter residuals as a {type(given).__name__}")
    used = given[: len(network.downs) + 1]
    _fit_residuals("a T2I-Adapter residual", network, sample, used)
    return used


def _fit_residuals(what: str, network: UNet, sample: Tensor, given: Sequence[Tensor]) -> None:
    for residual in given:
        fits(what, residual, network.conv_in.weight, residual.shape[1], 4)
        if residual.shape[0] not in (1, sample.shape[0]):
            raise Unsupported(f"{what} is for {residual.shape[0]} of {sample.shape[0]} pictures")
