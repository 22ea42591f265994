"""U-Nets with conditions: diffusers' UNet2DConditionModel."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.families import Denoised, Family, Kind, Sizes, Taken, empty
from fastdiff.families.part import Part, Port, dtype_name, exportable, sides, unsupported
from fastdiff.models import Loan, Trunk, UNet, Unsupported, borrow_unet
from fastdiff.models.blocks import PERTURBING
from fastdiff.models.checks import refuse
from fastdiff.models.perturbed import perturbing
from fastdiff.models.trunk import Conditions
from fastdiff.runtime.denoiser import Denoiser, denoiser
from fastdiff.runtime.planned import Run, without_memory

TOKENS = 77
"""CLIP's text encoders pad a prompt to this many tokens."""
TIME_IDS = 6
"""SDXL's numbers: original height and width, crop's top and left, target height and width, in
pixels."""


def _borrow(module: nn.Module, loan: Loan, searches: bool = True) -> Denoiser:
    return denoiser(borrow_unet(module, loan), searches)


def _call(
    unet: Denoiser,
    sample: Tensor,
    timestep: Tensor | float | int,
    encoder_hidden_states: Tensor | None,
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
    lora_scale(cross_attention_kwargs, "cross_attention_kwargs")
    refuse(**unknown)
    network: Any = unet.network
    mask = encoder_attention_mask
    if attention_mask is not None:
        if not network.at_once:  # elsewhere this is a mask of the pixels
            refuse(attention_mask=attention_mask)
        mask = attention_mask
    added = dict(added_cond_kwargs or {})
    known: dict[str, Any] = {
        name: added.pop(name, None) for name in ("text_embeds", "time_ids", "image_embeds")
    }
    if added:
        raise Unsupported(f"it was given {', '.join(added)} in added_cond_kwargs")
    given = Conditions(
        encoder_hidden_states,
        **known,
        timestep_cond=timestep_cond,
        down_block_additional_residuals=down_block_additional_residuals,
        mid_block_additional_residual=mid_block_additional_residual,
        down_intrablock_additional_residuals=down_intrablock_additional_residuals,
        encoder_attention_mask=mask,
        class_labels=class_labels,
    )
    prediction = unet(sample, timestep, given)
    return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)


def lora_scale(kwargs: dict[str, Any] | None, what: str) -> float:
    """The factor by which attention `kwargs` scale LoRA adapters; Unsupported for anything else in
    them.

    what: the name of this argument.
    """
    others = dict(kwargs or {})
    scale = others.pop("scale", 1.0)
    if others:
        raise Unsupported(f"it was given {', '.join(others)} in {what}")
    if not isinstance(scale, int | float) or scale == 0:
        raise Unsupported(f"a LoRA scale of {scale!r}, for which diffusers resets the adapters")
    return float(scale)


def _scale(*_: Any, cross_attention_kwargs: Any = None, **__: Any) -> float:
    # diffusers ignores a scale that is passed by position
    return lora_scale(cross_attention_kwargs, "cross_attention_kwargs")


def example(net: Trunk, texts: int, tokens: int) -> Conditions:
    """Conditions of `texts`, not initialised."""
    weight, added = net.conv_in.weight, net.added
    told = {name: (*[tokens] * (dim - 2), width) for name, width, dim in net.told()}
    made: dict[str, Any] = {name: empty(weight, texts, *shape) for name, shape in told.items()}
    given = Conditions(**made)
    if net.classes is not None:
        given = given._replace(class_labels=net.classes.example(texts, weight))
    if added is None or net.added_sinusoid is None:
        return given
    pooled = added.first.weight.shape[1] - TIME_IDS * net.added_sinusoid.width
    sizes = empty(weight, texts, TIME_IDS)
    return given._replace(text_embeds=empty(weight, texts, pooled), time_ids=sizes)


def channels(net: Trunk) -> int:
    """The latents' channels; others that a U-Net takes are constant."""
    taken = net.conv_in.weight.shape[1]
    return min(taken, net.conv_out.weight.shape[0]) if isinstance(net, UNet) else taken


def constant_channels(net: UNet) -> int:
    """The channels of its input beside the latents."""
    return net.conv_in.weight.shape[1] - channels(net)


def _planned(unet: Denoiser, sizes: Sizes) -> list[Run]:
    """Kernels of IP-Adapters are not planned; they are compiled at their first launch."""
    network: Any = unet.network
    return DENOISED.loop(without_memory(replace(network, ip_adapters=None)), sizes)


def _unexported(network: UNet) -> None:
    if network.ip_adapters is not None:
        raise Unsupported("an IP-Adapter, which an engine does not support")
    if perturbing(network.switches, PERTURBING):
        raise Unsupported("perturbed attention, which an engine does not support")


class _Exported(nn.Module):
    """sample [B, C, Y, X], timestep [] or [1], text [B, L, D] and `extra` inputs -> out_sample."""

    def __init__(self, net: nn.Module, extra: tuple[str, ...]) -> None:
        super().__init__()
        self.net, self.extra = exportable(net), extra

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *more: Tensor
    ) -> tuple[Tensor, ...]:
        given = dict(zip(self.extra, more, strict=True))
        condition = given.pop("timestep_cond", None)
        out = self.net(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=condition,
            added_cond_kwargs=given or None,
            return_dict=False,
        )
        return (out[0],)


def _part(
    folder: str,
    net: nn.Module,
    dtype: torch.dtype,
    tokens: int = TOKENS,
    timestep: tuple[int, ...] = (),
) -> Part:
    kind = type(net).__name__
    if kind != "UNet2DConditionModel":
        raise UserError(f"{folder} is a {kind}; supported is UNet2DConditionModel")
    config: Any = net.config
    for key, supported in {
        "addition_embed_type": (None, "text_time"),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim_type": (None,),
    }.items():
        if (value := getattr(config, key, None)) not in supported:
            raise UserError(f"{folder} has {key} {value!r}, whose inputs cannot be exported")
    for key in ("cross_attention_dim", "sample_size"):
        if not isinstance(getattr(config, key), int):
            raise unsupported(folder, key, config)
    free, kind = ("batch_size",), dtype_name(dtype)
    extra: list[Port] = []
    if config.time_cond_proj_dim is not None:
        extra.append(Port("timestep_cond", kind, (*free, config.time_cond_proj_dim)))
    if config.addition_embed_type == "text_time":
        ids = TIME_IDS * config.addition_time_embed_dim
        width = config.projection_class_embeddings_input_dim - ids
        extra.append(Port("text_embeds", kind, (*free, width)))
        extra.append(Port("time_ids", kind, (*free, TIME_IDS)))
    context = (*free, "sequence_length", config.cross_attention_dim)
    # float32 in every dtype: above 512, float16 steps by 0.5
    step = Port("timestep", "float32", timestep)
    least = 2 ** (len(config.block_out_channels) - 1)
    side = config.sample_size
    sizes = ((1, side, side), (3, 3 * least, 2 * least), (2, 4 * least, 2 * least))
    return Part(
        folder=folder,
        source=net,
        module=_Exported(net, tuple(port.name for port in extra)).eval(),
        dtype=dtype,
        inputs=(
            Port("sample", kind, (*free, config.in_channels, "height", "width")),
            step,
            Port("encoder_hidden_states", kind, context),
            *extra,
        ),
        outputs=(Port("out_sample", kind, (*free, config.out_channels, "height", "width")),),
        example=sides(2, 2 * least, 3 * least) | {"sequence_length": tokens},
        cases=tuple(
            sides(*size) | {"sequence_length": length}
            for size, length in zip(sizes, (tokens, tokens, 2 * tokens), strict=True)
        ),
    )


def _multiple(unet: Any) -> int:
    """The total downsampling: for other sizes the halves of the U-Net differ in size."""
    times: int = 2**unet.num_upsamplers
    return times


def _taken(name: str, unet: Any) -> Taken:
    return {name: (unet, UNET)}


DENOISED = Denoised(
    Conditions,
    example,
    channels,
    _part,
    _unexported,
    _multiple,
    TOKENS,
    constant_channels=constant_channels,
)
UNET = Kind(_borrow, _call, _planned, scale=_scale)
FAMILY = Family(
    models=("UNet2DConditionModel",),
    taken=_taken,
    left={"encoder_hid_proj": "projects an IP-Adapter's pictures to a few tokens"},
    denoised=DENOISED,
)
