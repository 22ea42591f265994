"""FLUX.1's ControlNets: diffusers' FluxControlNetModel, one or several."""

from dataclasses import replace
from functools import partial
from typing import Any

from diffusers.models.controlnets.controlnet_flux import FluxControlNetOutput
from torch import Tensor, nn

from fastdiff.families import Family, Kind, Sizes, Taken, empty
from fastdiff.families.controlnet import each_of
from fastdiff.families.flux import PATCH, TOKENS
from fastdiff.families.unet import lora_scale
from fastdiff.kernels.residual import residual
from fastdiff.models import Loan, Unsupported
from fastdiff.models.flux_control import ControlConditions, FluxControl, borrow_flux_control
from fastdiff.runtime.denoiser import Denoiser, denoiser
from fastdiff.runtime.planned import Run, call, without_memory

Residuals = list[Tensor] | None


def _borrow(module: nn.Module, loan: Loan, searches: bool = True) -> Denoiser:
    return denoiser(borrow_flux_control(module, loan), searches)


def _call(
    net: Denoiser,
    hidden_states: Tensor,
    controlnet_cond: Tensor,
    controlnet_mode: Tensor | None = None,
    conditioning_scale: float = 1.0,
    encoder_hidden_states: Tensor | None = None,
    pooled_projections: Tensor | None = None,
    timestep: Tensor | None = None,
    img_ids: Tensor | None = None,
    txt_ids: Tensor | None = None,
    guidance: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> FluxControlNetOutput | tuple[Residuals, Residuals]:
    """`FluxControlNetModel.forward` on the compact network."""
    if timestep is None:
        raise Unsupported("it was given no timestep")
    texts = encoder_hidden_states, pooled_projections, img_ids, txt_ids, guidance
    given = ControlConditions(*texts, controlnet_cond, controlnet_mode)
    made = [part * conditioning_scale for part in net(hidden_states, timestep, given)]
    network: Any = net.network
    count = len(network.blocks)
    both = made[:count] or None, made[count:] or None
    if not return_dict:
        return both
    output: Any = FluxControlNetOutput
    found: FluxControlNetOutput = output(
        controlnet_block_samples=both[0], controlnet_single_block_samples=both[1]
    )
    return found


def _scale(*_: Any, joint_attention_kwargs: Any = None, **__: Any) -> float:
    # diffusers hands no other of them to a block
    kwargs = joint_attention_kwargs or {}
    return lora_scale({"scale": kwargs.get("scale", 1.0)}, "joint_attention_kwargs")


def _planned(net: Denoiser, sizes: Sizes) -> list[Run]:
    """One step, without convolutions of the control picture, and the sum of its residuals with a
    stream of the transformer."""
    network: Any = net.network
    bare: FluxControl = without_memory(replace(network, hint=None))
    weight, axes, count = bare.embed.weight, len(bare.rotary.axes), (sizes.side // PATCH) ** 2
    latents = empty(weight, 1, count, bare.channels)
    given = ControlConditions(
        empty(weight, 1, TOKENS, bare.context.weight.shape[1]),
        empty(weight, 1, bare.time_text.text.first.weight.shape[1]),
        empty(weight, count, axes),
        empty(weight, TOKENS, axes),
        None if bare.time_text.guidance is None else empty(weight, 1).float(),
        empty(weight, 1, count, bare.cond.weight.shape[1]),
        None if bare.modes is None else empty(weight, 1, 1).long(),
    )
    stream = empty(weight, 1, count, len(weight))
    return [call(bare, given, latents), partial(residual, stream, stream)]


def _taken(name: str, component: Any) -> Taken:
    nets = each_of(name, component, FAMILY.models[0], "FluxMultiControlNetModel")
    return {path: (net, CONTROL) for path, net in nets.items()}


CONTROL = Kind(_borrow, _call, _planned, scale=_scale)
FAMILY = Family(
    models=("FluxControlNetModel",),
    taken=_taken,
    left={"input_hint_block": "small convolutions of the control picture"},
)
