"""FLUX's transformer: diffusers' FluxTransformer2DModel."""

from collections.abc import Sequence
from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.families import Denoised, Family, Kind, Sizes, Taken, empty
from fastdiff.families.part import Part
from fastdiff.families.unet import lora_scale
from fastdiff.models import Loan, Unsupported
from fastdiff.models.checks import refuse
from fastdiff.models.flux import Conditions, Flux, borrow_flux
from fastdiff.models.flux_trunk import FluxTrunk
from fastdiff.runtime.denoiser import Denoiser, denoiser
from fastdiff.runtime.planned import Run, without_memory

TOKENS = 512
"""Tokens of a text."""
PATCH = 2
"""Each token is of so many rows and columns of the latents."""


def _borrow(module: nn.Module, loan: Loan, searches: bool = True) -> Denoiser:
    return denoiser(borrow_flux(module, loan), searches)


def _call(
    flux: Denoiser,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    pooled_projections: Tensor | None = None,
    timestep: Tensor | None = None,
    img_ids: Tensor | None = None,
    txt_ids: Tensor | None = None,
    guidance: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    controlnet_block_samples: Sequence[Tensor] | None = None,
    controlnet_single_block_samples: Sequence[Tensor] | None = None,
    return_dict: bool = True,
    controlnet_blocks_repeat: bool = False,
    **unknown: Any,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """`FluxTransformer2DModel.forward` on the compact network."""
    lora_scale(joint_attention_kwargs, "joint_attention_kwargs")
    refuse(**unknown)
    if timestep is None:
        raise Unsupported("it was given no timestep")
    given = Conditions(
        *(encoder_hidden_states, pooled_projections, img_ids, txt_ids, guidance),
        controlnet_block_samples,
        controlnet_single_block_samples,
        bool(controlnet_blocks_repeat),
    )
    prediction = flux(hidden_states, timestep, given)
    return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)


def _scale(*_: Any, joint_attention_kwargs: Any = None, **__: Any) -> float:
    # diffusers ignores a scale that is passed by position
    return lora_scale(joint_attention_kwargs, "joint_attention_kwargs")


def _planned(flux: Denoiser, sizes: Sizes) -> list[Run]:
    return DENOISED.loop(without_memory(flux.network), sizes)


def _example(net: Flux, texts: int, tokens: int) -> Conditions:
    weight, axes = net.proj_out.weight, len(net.rotary.axes)
    told = None if net.time_text.guidance is None else empty(weight, 1).float()
    return Conditions(
        empty(weight, texts, tokens, net.context.weight.shape[1]),
        empty(weight, texts, net.time_text.text.first.weight.shape[1]),
        img_ids=None,
        txt_ids=empty(weight, tokens, axes),
        guidance=told,
    )


def placed(given: Any, latents: Tensor) -> Any:
    """Conditions with positions of the latents' tokens, not initialised."""
    return given._replace(img_ids=empty(given.txt_ids, latents.shape[1], given.txt_ids.shape[1]))


def shape(net: FluxTrunk, side: int) -> tuple[int, ...]:
    """Of a picture's latents."""
    return 1, (side // PATCH) ** 2, net.channels


def channels(net: FluxTrunk) -> int:
    """Those of its latents."""
    return net.proj_out.weight.shape[0]


def _constant_channels(net: FluxTrunk) -> int:
    """Those of FLUX.1 Fill and Control: a picture, and perhaps a mask."""
    return net.channels - channels(net)


def part(folder: str, net: nn.Module, *_: object) -> Part:
    """There is none."""
    raise UserError(f"{folder} is a {type(net).__name__}, which fastdiff does not export")


def exported(network: FluxTrunk) -> None:
    """No FLUX is exported; `part` says so."""


def multiple(net: Any) -> int:
    """The rows and columns of a token."""
    return PATCH


def _taken(name: str, net: Any) -> Taken:
    return {name: (net, FLUX)}


DENOISED = Denoised(
    *(Conditions, _example, channels, part, exported, multiple, TOKENS),
    constant_channels=_constant_channels,
    shape=shape,
    placed=placed,
    guided=False,
)
FLUX = Kind(_borrow, _call, _planned, scale=_scale)
FAMILY = Family(models=("FluxTransformer2DModel",), taken=_taken, denoised=DENOISED)
