"""ControlNets of SD1.x, SD2.x and SDXL: diffusers' ControlNetModel, one or several."""

from dataclasses import replace
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetOutput
from torch import Tensor, nn

from fastdiff.families import Family, Kind, Sizes, Taken, empty, of_model
from fastdiff.families.unet import TOKENS, channels, example
from fastdiff.models import ControlNet, Loan, borrow_controlnet
from fastdiff.models.checks import refuse
from fastdiff.models.trunk import Conditions
from fastdiff.runtime.denoiser import Denoiser, denoiser
from fastdiff.runtime.planned import Run, call, without_memory


def _borrow(module: nn.Module, loan: Loan, searches: bool = True) -> Denoiser:
    return denoiser(borrow_controlnet(module, loan), searches)


def _call(
    net: Denoiser,
    sample: Tensor,
    timestep: Tensor | float | int,
    encoder_hidden_states: Tensor,
    controlnet_cond: Tensor,
    conditioning_scale: float = 1.0,
    class_labels: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    attention_mask: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    guess_mode: bool = False,
    return_dict: bool = True,
) -> ControlNetOutput | tuple[list[Tensor], Tensor]:
    """`ControlNetModel.forward` on the compact network."""
    refuse(
        attention_mask=attention_mask,
        cross_attention_kwargs=cross_attention_kwargs or None,
    )
    network: Any = net.network
    added = added_cond_kwargs or {}
    given = Conditions(
        encoder_hidden_states,
        added.get("text_embeds"),
        added.get("time_ids"),
        timestep_cond,
        controlnet_cond=controlnet_cond,
        class_labels=class_labels,
    )
    residuals = net(sample, timestep, given)
    if guess_mode and not network.pooled:
        scales = torch.logspace(-1, 0, len(residuals), device=sample.device) * conditioning_scale
        residuals = [residual * scale for residual, scale in zip(residuals, scales, strict=True)]
    elif conditioning_scale != 1:
        residuals = [residual * conditioning_scale for residual in residuals]
    if network.pooled:
        residuals = [residual.mean(dim=(2, 3), keepdim=True) for residual in residuals]
    *down, middle = residuals
    if not return_dict:
        return down, middle
    output: Any = ControlNetOutput
    made: ControlNetOutput = output(down_block_res_samples=down, mid_block_res_sample=middle)
    return made


def _planned(net: Denoiser, sizes: Sizes) -> list[Run]:
    """One step, for which diffusers repeats the latents for guidance. The control picture's
    embedding is left out, since diffusers computes it."""
    network: Any = net.network
    embedded = replace(network, embedding=nn.Identity(), flipped=False)
    bare: ControlNet = without_memory(embedded)
    texts = 2 if sizes.guided else 1
    weight, side = bare.conv_in.weight, sizes.side
    latents = empty(weight, texts, channels(bare), side, side)
    picture = empty(weight, texts, weight.shape[0], side, side)
    given = example(bare, texts, TOKENS)._replace(controlnet_cond=picture)
    return [call(bare, given, latents)]


def each_of(name: str, component: Any, single: str, several: str) -> dict[str, Any]:
    """By dotted name: a component of class `single`, or the networks in a component of class
    `several`."""
    if of_model(component, single):
        return {name: component}
    if not of_model(component, several):
        return {}
    once = {id(net): net for net in getattr(component, "nets", ())}  # a network may be listed twice
    return {f"{name}.{i}": net for i, net in enumerate(once.values())}


def _taken(name: str, component: Any) -> Taken:
    nets = each_of(name, component, FAMILY.models[0], "MultiControlNetModel")
    return {path: (net, CONTROLNET) for path, net in nets.items()}


CONTROLNET = Kind(_borrow, _call, _planned)
FAMILY = Family(
    models=("ControlNetModel",),
    taken=_taken,
    left={"controlnet_cond_embedding": "small convolutions of the picture, in every step"},
)
