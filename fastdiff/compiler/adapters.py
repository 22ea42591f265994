"""What fastdiff knows about diffusers: which components it takes over, how they are called."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    MultiControlNetModel,
    UNet2DConditionModel,
)
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from fastdiff.compiler.controlnets import borrow_step_controlnet, call_controlnet
from fastdiff.compiler.engines import EngineStep, open_unet
from fastdiff.compiler.fits import fits, one_text_each, refuse
from fastdiff.compiler.found import plain
from fastdiff.compiler.options import Options
from fastdiff.compiler.slot import Kind
from fastdiff.compiler.steps import Extras, StepUNet, borrow_step_unet
from fastdiff.models import (
    Decoder,
    Encoder,
    Loan,
    Unsupported,
    borrow_decoder,
    borrow_encoder,
)
from fastdiff.models.blocks import channels_first, channels_last
from fastdiff.models.borrow import kind
from fastdiff.recipes import RECIPES, recipe_of
from fastdiff.runtime.hoist import Conditions
from fastdiff.runtime.recordings import Recorded

EAGER_PARTS = {
    "text_encoder": "once per prompt",
    "text_encoder_2": "once per prompt",
    "image_encoder": "once per picture",
    "safety_checker": "once per picture",
    "adapter": "once per picture",
    "tokenizer": "no network: words to numbers, once per prompt",
    "tokenizer_2": "no network: words to numbers, once per prompt",
    "feature_extractor": "no network: pixels to pixels, once per picture",
    "controlnet": "of a kind that fastdiff does not compute",
    "controlnet.controlnet_cond_embedding": "small convolutions over the picture, in every step",
    "unet.encoder_hid_proj": "projects an IP-Adapter's pictures to a few tokens",
    "vae.quant_conv": "a 1×1 convolution of a few channels",
    "vae.post_quant_conv": "a 1×1 convolution of a few channels",
}
"""What is left to diffusers on purpose, and why."""

_BARE = {UNet2DConditionModel: "unet", AutoencoderKL: "vae", ControlNetModel: "controlnet"}
"""The models that can be compiled by themselves, by the name that they have in a pipeline."""


def parts(target: Any) -> dict[str, tuple[nn.Module, Kind]]:
    """The modules of a pipeline or a bare model that can be taken over, by dotted name.

    What torch.compile wrapped is among them as it is. Nothing where the pipeline has no such part.

    Raises:
        ValueError: `target` is neither a known pipeline nor a known model.
    """
    bare, recipe = _bare(target), recipe_of(target)
    if bare is None and recipe is None:
        raise ValueError(
            f"fastdiff does not know {type(target).__name__}; it accelerates"
            f" {', '.join(RECIPES)}, UNet2DConditionModel, ControlNetModel and AutoencoderKL"
        )
    networks = (bare,) if recipe is None else recipe.networks
    has = components(target)
    taken: dict[str, tuple[nn.Module, Kind]] = {}
    for name in networks:
        if name in has:
            taken |= _TAKEN[name](has[name])
    return taken


def components(target: Any) -> dict[str, Any]:
    """What a pipeline has been given, and every further module in it; no None. A bare model is one
    component."""
    if (name := _bare(target)) is not None:
        return {name: target}
    given = [name for name, of in target.config.items() if isinstance(of, tuple | list)]
    found = {name: getattr(target, name, None) for name in dict.fromkeys((*given, *vars(target)))}
    return {
        name: part
        for name, part in found.items()
        if part is not None and (name in given or isinstance(part, nn.Module))
    }


def _bare(target: Any) -> str | None:
    return next((name for model, name in _BARE.items() if isinstance(plain(target), model)), None)


def _unet(unet: Any) -> dict[str, tuple[nn.Module, Kind]]:
    return {"unet": (unet, UNET)}


def _controlnets(net: Any) -> dict[str, tuple[nn.Module, Kind]]:
    nets: dict[str, Any] = {"controlnet": net} if isinstance(plain(net), ControlNetModel) else {}
    if isinstance(plain(net), MultiControlNetModel):  # one may be there more than once
        once = {id(each): each for each in getattr(net, "nets", ())}
        nets = {f"controlnet.{i}": each for i, each in enumerate(once.values())}
    return {name: (each, CONTROLNET) for name, each in nets.items()}


def _autoencoder(vae: Any) -> dict[str, tuple[nn.Module, Kind]]:
    if not isinstance(plain(vae), AutoencoderKL):
        return {}
    # encoder and decoder, not the whole: slicing, tiling and the quant convolutions stay diffusers'
    halves = {name: getattr(vae, name, None) for name in CODERS}
    return {f"vae.{n}": (half, CODERS[n]) for n, half in halves.items() if half is not None}


_TAKEN: dict[str, Callable[[Any], dict[str, tuple[nn.Module, Kind]]]] = {
    "unet": _unet,
    "controlnet": _controlnets,
    "vae": _autoencoder,
}
"""By component: the modules of it that are taken over, by dotted name."""


def eager_parts(target: Any) -> dict[str, str]:
    """Parts that `target` has and that stay with diffusers, with the reason: every component but
    the scheduler, and what is left of those that are taken over."""
    has = components(target)
    taken = {path.partition(".")[0] for path in parts(target)}
    whole = {
        name: EAGER_PARTS.get(name, f"{kind(part)}, which fastdiff does not compute")
        for name, part in has.items()
        if name not in taken | {"scheduler"}
    }

    def within(path: str) -> bool:
        component, _, part = path.partition(".")
        return component in has and bool(part) and getattr(has[component], part, None) is not None

    return whole | {path: why for path, why in EAGER_PARTS.items() if within(path)}


@dataclass(frozen=True)
class Coder:
    """The compact decoder or encoder, recorded."""

    network: Decoder | Encoder
    run: Recorded


def borrow_coder(
    module: nn.Module,
    loan: Loan,
    borrow: Callable[[Any, Loan], Decoder | Encoder],
    searches: bool = True,
) -> Coder:
    network = borrow(module, loan)
    return Coder(network, Recorded(network.run, searches))


def call_unet(
    unet: StepUNet | EngineStep,
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
    lora_scale(cross_attention_kwargs)
    refuse(class_labels=class_labels, attention_mask=attention_mask, **unknown)
    added = dict(added_cond_kwargs or {})
    given = Conditions(
        text=encoder_hidden_states,
        text_embeds=added.pop("text_embeds", None),
        time_ids=added.pop("time_ids", None),
        timestep_cond=timestep_cond,
        image_embeds=added.pop("image_embeds", None),
    )
    if added:
        raise Unsupported(f"it was given {', '.join(added)} in added_cond_kwargs")
    unet.fit(sample, given)
    one_text_each(encoder_hidden_states, sample)
    prediction = unet(
        sample,
        torch.as_tensor(timestep, device=sample.device).reshape(-1),
        given,
        Extras(
            down_block_additional_residuals,
            mid_block_additional_residual,
            down_intrablock_additional_residuals,
            encoder_attention_mask,
        ),
    )
    return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)


def lora_scale(cross_attention_kwargs: dict[str, Any] | None) -> float:
    """What `cross_attention_kwargs` multiply LoRA adapters by; Unsupported for all else in them."""
    others = dict(cross_attention_kwargs or {})
    scale = others.pop("scale", 1.0)
    if others:
        raise Unsupported(f"it was given {', '.join(others)} in cross_attention_kwargs")
    if not isinstance(scale, int | float) or scale == 0:
        raise Unsupported(f"a LoRA scale of {scale!r}, at which diffusers resets the adapters")
    return float(scale)


def _scale_of_call(*_: Any, cross_attention_kwargs: Any = None, **__: Any) -> float:
    # by position diffusers ignores the scale
    return lora_scale(cross_attention_kwargs)


def call_coder(coder: Coder, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
    """`Encoder.forward` and `Decoder.forward` of AutoencoderKL on the compact network."""
    if latent_embeds is not None:
        raise Unsupported("it was given latent_embeds")
    weight = coder.network.conv_in.weight
    fits("sample", sample, weight, channels=weight.shape[1], dim=4)
    if sample.numel() == 0:
        raise Unsupported("it was given an empty tensor")
    return channels_first(coder.run(channels_last(sample)))


CONTROLNET = Kind(borrow_step_controlnet, partial(call_controlnet, output=ControlNetOutput))
UNET = Kind(borrow_step_unet, call_unet, scale=_scale_of_call)
CODERS = {
    "encoder": Kind(partial(borrow_coder, borrow=borrow_encoder), call_coder, guarded=True),
    "decoder": Kind(partial(borrow_coder, borrow=borrow_decoder), call_coder, guarded=True),
}


def without_tactics(kind: Kind) -> Kind:
    """The same, with cuDNN's own choice of plans."""
    return replace(kind, borrow=partial(kind.borrow, searches=False), tactics=False)


def kind_of_engine(unet: nn.Module, options: Options) -> Kind:
    """How a U-Net is taken over by the engine that `options` ask for; UserError where it is not."""
    source = open_unet(unet, options)
    exact = partial(borrow_step_unet, searches=options.tactics)
    return replace(
        UNET,
        borrow=source.borrow,
        runner=options.backend,
        frozen=True,
        exact=exact,
        tactics=options.tactics,
    )
