"""What fastdiff knows about diffusers: which pipelines, which components, how they are called."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from fastdiff.compiler.slot import Kind
from fastdiff.models import (
    Loan,
    UNet,
    Unsupported,
    borrow_decoder,
    borrow_encoder,
    borrow_unet,
)
from fastdiff.runtime.tape import Tapes

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)
"""Pipelines whose U-Net and autoencoder this runtime computes, inside their own denoising loop."""

EAGER_PARTS = {
    "text_encoder": "once per prompt",
    "text_encoder_2": "once per prompt",
    "image_encoder": "once per picture",
    "safety_checker": "once per picture",
    "scheduler": "diffusers' own step, a few numbers per step",
    "vae.quant_conv": "a 1×1 convolution of a few channels",
    "vae.post_quant_conv": "a 1×1 convolution of a few channels",
}
"""What is left to diffusers on purpose, and why."""


def parts(target: Any) -> dict[str, tuple[nn.Module, Kind]]:
    """The modules of a pipeline or a bare model that can be taken over, by dotted name.

    Raises:
        ValueError: `target` is neither a known pipeline nor a known model.
    """
    if isinstance(target, UNet2DConditionModel):
        return _unet(target)
    if isinstance(target, AutoencoderKL):
        return _autoencoder(target)
    if type(target).__name__ not in PIPELINES:
        raise ValueError(
            f"fastdiff does not know {type(target).__name__}; it accelerates"
            f" {', '.join(PIPELINES)}, UNet2DConditionModel and AutoencoderKL"
        )
    return _unet(target.unet) | (
        _autoencoder(target.vae) if isinstance(target.vae, AutoencoderKL) else {}
    )


def _unet(unet: Any) -> dict[str, tuple[nn.Module, Kind]]:
    return {"unet": (unet, UNET)}


def _autoencoder(vae: Any) -> dict[str, tuple[nn.Module, Kind]]:
    # encoder and decoder, not the whole: slicing, tiling and the quant convolutions stay diffusers'
    return {"vae.encoder": (vae.encoder, ENCODER), "vae.decoder": (vae.decoder, DECODER)}


def eager_parts(target: Any) -> dict[str, str]:
    """Parts that `target` has and that stay with diffusers, with the reason."""
    components = {"vae": target} if isinstance(target, AutoencoderKL) else vars(target)

    def has(path: str) -> bool:
        component, _, part = path.partition(".")
        found = components.get(component) or getattr(target, component, None)
        return found is not None and (not part or getattr(found, part, None) is not None)

    return {path: why for path, why in EAGER_PARTS.items() if has(path)}


@dataclass(frozen=True)
class StepUNet:
    """The compact U-Net, and its per-step part with a tape for every shape."""

    network: UNet
    predict: Tapes


def borrow_step_unet(module: nn.Module, loan: Loan) -> StepUNet:
    network = borrow_unet(module, loan)
    return StepUNet(network, Tapes(network.predict))


def call_unet(
    unet: StepUNet,
    sample: Tensor,
    timestep: Tensor | float | int,
    encoder_hidden_states: Tensor,
    class_labels: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
    down_block_additional_residuals: Sequence[Tensor] | None = None,
    mid_block_additional_residual: Tensor | None = None,
    down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
    return_dict: bool = True,
    **unknown: Any,
) -> UNet2DConditionOutput | tuple[Tensor]:
    """`UNet2DConditionModel.forward` on the compact network."""
    network = unet.network
    refused = {
        "class_labels": class_labels,
        "attention_mask": attention_mask,
        "down_intrablock_additional_residuals": down_intrablock_additional_residuals,
        "cross_attention_kwargs": cross_attention_kwargs or None,
        **unknown,
    }
    for name, value in refused.items():
        if value is not None:
            raise Unsupported(f"it was given {name}")
    if (down_block_additional_residuals is None) != (mid_block_additional_residual is None):
        raise Unsupported("it was given ControlNet residuals in part")
    added = dict(added_cond_kwargs or {})
    text_embeds, time_ids = added.pop("text_embeds", None), added.pop("time_ids", None)
    if added:
        raise Unsupported(f"it was given {', '.join(added)} in added_cond_kwargs")
    if network.added is not None and (text_embeds is None or time_ids is None):
        raise Unsupported("text_embeds or time_ids are missing in added_cond_kwargs")
    if timestep_cond is not None and network.time.condition is None:
        raise Unsupported("it was given timestep_cond, for which it has no projection")
    weight = network.conv_in.weight
    _fits("sample", sample, weight, channels=weight.shape[1], dim=4)
    _fits("encoder_hidden_states", encoder_hidden_states, weight, network.text.weight.shape[1], 3)
    if sample.numel() == 0 or encoder_hidden_states.numel() == 0:
        raise Unsupported("it was given an empty tensor")
    if timestep_cond is not None and network.time.condition is not None:
        _fits("timestep_cond", timestep_cond, weight, network.time.condition.weight.shape[1], 2)
    for residual in (*(down_block_additional_residuals or ()), mid_block_additional_residual):
        if residual is not None:
            _fits("a ControlNet residual", residual, weight, residual.shape[1], 4)
    mask = None
    if encoder_attention_mask is not None:
        mask = (1 - encoder_attention_mask.to(sample.dtype)) * -10000.0
        mask = mask[:, None, None, :]
    prediction = network(
        sample,
        torch.as_tensor(timestep, device=sample.device).reshape(-1),
        encoder_hidden_states,
        text_embeds=text_embeds,
        time_ids=time_ids,
        timestep_cond=timestep_cond,
        text_mask=mask,
        down_residuals=down_block_additional_residuals,
        mid_residual=mid_block_additional_residual,
        predict=unet.predict,
    )
    return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)


def call_coder(network: Any, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
    """`Encoder.forward` and `Decoder.forward` of AutoencoderKL on the compact network."""
    if latent_embeds is not None:
        raise Unsupported("it was given latent_embeds")
    weight = network.conv_in.weight
    _fits("sample", sample, weight, channels=weight.shape[1], dim=4)
    if sample.numel() == 0:
        raise Unsupported("it was given an empty tensor")
    result: Tensor = network(sample)
    return result


def _fits(name: str, tensor: Tensor, weight: Tensor, channels: int, dim: int) -> None:
    """Raise Unsupported where diffusers itself would refuse the tensor, or convert it."""
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


UNET = Kind(borrow_step_unet, call_unet)
DECODER = Kind(borrow_decoder, call_coder)
ENCODER = Kind(borrow_encoder, call_coder)
