"""FLUX's transformer: diffusers' FluxTransformer2DModel."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fastdiff.families import Denoised, Family, Kind, Sizes, Taken, empty
from fastdiff.families.part import PACKED, Exported, Part, Port, dtype_name, packed_cases
from fastdiff.families.unet import lora_scale
from fastdiff.models import Loan, Unsupported
from fastdiff.models.checks import refuse
from fastdiff.models.flux import Conditions, Flux, borrow_flux
from fastdiff.models.flux_trunk import FluxTrunk
from fastdiff.models.rotary import first
from fastdiff.runtime.denoiser import Denoiser, denoiser
from fastdiff.runtime.planned import Run, without_memory

TOKENS = 512
"""Tokens of a text."""
PATCH = 2
"""Rows and columns of the latents in each token."""
PICTURES = "ip_adapter_image_embeds"
IDS = ("img_ids", "txt_ids")


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
    kwargs = dict(joint_attention_kwargs or {})
    pictures = kwargs.pop(PICTURES, None)
    lora_scale(kwargs, "joint_attention_kwargs")
    refuse(**unknown)
    if timestep is None:
        raise Unsupported("it was given no timestep")
    given = Conditions(
        *(encoder_hidden_states, pooled_projections, img_ids, txt_ids, guidance),
        controlnet_block_samples,
        controlnet_single_block_samples,
        bool(controlnet_blocks_repeat),
        ip_adapter_image_embeds=pictures,
    )
    prediction = flux(hidden_states, timestep, given)
    return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)


def _scale(*_: Any, joint_attention_kwargs: Any = None, **__: Any) -> float:
    # diffusers ignores a scale that is passed by position
    kwargs = {k: v for k, v in (joint_attention_kwargs or {}).items() if k != PICTURES}
    return lora_scale(kwargs, "joint_attention_kwargs")


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
    """The shape of a picture's latents."""
    return 1, (side // PATCH) ** 2, net.channels


def channels(net: FluxTrunk) -> int:
    """The channels of its latents."""
    return net.proj_out.weight.shape[0]


def _constant_channels(net: FluxTrunk) -> int:
    """The constant channels of FLUX.1 Fill and Control: a picture, and for Fill a mask."""
    return net.channels - channels(net)


def part(
    folder: str,
    net: nn.Module,
    dtype: torch.dtype,
    _: int = 0,
    timestep: tuple[int, ...] = (),
) -> Part:
    """The part of FLUX.1's transformer or FLUX.2's, with constant channels or without."""
    config: Any = net.config
    kind, free, axes = dtype_name(dtype), "batch_size", len(config.axes_dims_rope)
    pooled = config.get("pooled_projection_dim")
    places = kind if pooled else "float32"  # of FLUX.2, which counts the tokens of a text
    text = (free, "sequence_length", config.joint_attention_dim)
    told = [
        Port("encoder_hidden_states", kind, text),
        *([Port("pooled_projections", kind, (free, pooled))] if pooled else []),
        Port("img_ids", places, (PACKED, axes)),
        Port("txt_ids", places, ("sequence_length", axes)),
        *([Port("guidance", "float32", (free,))] if config.guidance_embeds else []),
    ]
    wide = config.out_channels or config.in_channels
    example, *cases = packed_cases(TOKENS)
    return Part(
        folder=folder,
        source=net,
        module=Exported(net, [port.name for port in told]).eval(),
        dtype=dtype,
        inputs=(
            Port("hidden_states", kind, (free, PACKED, config.in_channels)),
            Port("timestep", "float32", timestep),
            *told,
        ),
        outputs=(Port("out_sample", kind, (free, PACKED, wide)),),
        example=example,
        cases=tuple(cases),
        unit=0.001,
        packed=PATCH,
        told=lambda given: given | {name: first(given[name]) for name in IDS},
        guided=False,
    )


def exported(network: FluxTrunk) -> None:
    """A file holds all of a FLUX."""


def _exported(network: Flux) -> None:
    if network.ip_adapters is not None:
        raise Unsupported("an IP-Adapter, which an engine does not support")


def multiple(net: Any) -> int:
    """The rows and columns of a token."""
    return PATCH


def _taken(name: str, net: Any) -> Taken:
    return {name: (net, FLUX)}


DENOISED = Denoised(
    *(Conditions, _example, channels, part, _exported, multiple, TOKENS),
    constant_channels=_constant_channels,
    shape=shape,
    placed=placed,
    guided=False,
)
FLUX = Kind(_borrow, _call, _planned, scale=_scale)
FAMILY = Family(models=("FluxTransformer2DModel",), taken=_taken, denoised=DENOISED)
