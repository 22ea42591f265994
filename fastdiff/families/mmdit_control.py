"""ControlNets of Stable Diffusion 3 and 3.5: diffusers' SD3ControlNetModel, one or several."""

from typing import Any

from diffusers.models.controlnets.controlnet_sd3 import SD3ControlNetOutput
from torch import Tensor, nn

from fastdiff.families import Family, Kind, Sizes, Taken, empty
from fastdiff.families.controlnet import each_of
from fastdiff.families.mmdit import TOKENS
from fastdiff.families.unet import lora_scale
from fastdiff.models import (
    Loan,
    MMDiTControl,
    MMDiTControlConditions,
    Unsupported,
    borrow_mmdit_control,
)
from fastdiff.runtime.denoiser import Denoiser, denoiser
from fastdiff.runtime.planned import Run, call, without_memory


def _borrow(module: nn.Module, loan: Loan, searches: bool = True) -> Denoiser:
    return denoiser(borrow_mmdit_control(module, loan), searches)


def _call(
    net: Denoiser,
    hidden_states: Tensor,
    controlnet_cond: Tensor,
    conditioning_scale: float = 1.0,
    encoder_hidden_states: Tensor | None = None,
    pooled_projections: Tensor | None = None,
    timestep: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> SD3ControlNetOutput | tuple[list[Tensor]]:
    """`SD3ControlNetModel.forward` on the compact network."""
    if timestep is None:
        raise Unsupported("it was given no timestep")
    given = MMDiTControlConditions(encoder_hidden_states, pooled_projections, controlnet_cond)
    residuals = [part * conditioning_scale for part in net(hidden_states, timestep, given)]
    if not return_dict:
        return (residuals,)
    output: Any = SD3ControlNetOutput
    made: SD3ControlNetOutput = output(controlnet_block_samples=residuals)
    return made


def _scale(*_: Any, joint_attention_kwargs: Any = None, **__: Any) -> float:
    # diffusers passes only the scale on to a ControlNet
    kwargs = joint_attention_kwargs or {}
    return lora_scale({"scale": kwargs.get("scale", 1.0)}, "joint_attention_kwargs")


def _planned(net: Denoiser, sizes: Sizes) -> list[Run]:
    """One step, for which diffusers repeats the latents for guidance."""
    network: Any = net.network
    bare: MMDiTControl = without_memory(network)
    texts, weight, side = 2 if sizes.guided else 1, bare.like, sizes.side
    picture = empty(weight, texts, bare.picture.channels, side, side)
    text = None
    if bare.context is not None:
        text = empty(weight, texts, TOKENS, bare.context.weight.shape[1])
    pooled = empty(weight, texts, bare.time_text.text.first.weight.shape[1])
    if bare.patches is not None:
        latents = empty(weight, texts, bare.patches.channels, side, side)
    else:
        latents = empty(weight, texts, (side // bare.picture.size) ** 2, bare.width)
    return [call(bare, MMDiTControlConditions(text, pooled, picture), latents)]


def _taken(name: str, component: Any) -> Taken:
    nets = each_of(name, component, FAMILY.models[0], "SD3MultiControlNetModel")
    return {path: (net, CONTROL) for path, net in nets.items()}


CONTROL = Kind(_borrow, _call, _planned, scale=_scale)
FAMILY = Family(models=("SD3ControlNetModel",), taken=_taken)
