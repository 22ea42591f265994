"""The MM-DiT of Stable Diffusion 3 and 3.5: diffusers' SD3Transformer2DModel."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.families import Denoised, Family, Kind, Sizes, Taken, empty
from fastdiff.families.part import (
    Exported,
    Part,
    Port,
    dtype_name,
    patch_size,
    sides,
    unsupported,
)
from fastdiff.families.unet import lora_scale
from fastdiff.models import Loan, MMDiT, Unsupported, borrow_mmdit
from fastdiff.models.checks import refuse
from fastdiff.models.joint_attention import PERTURBING
from fastdiff.models.mmdit import Conditions
from fastdiff.models.perturbed import perturbing
from fastdiff.runtime.denoiser import Denoiser, denoiser
from fastdiff.runtime.planned import Run, without_memory

CLIP, T5 = 77, 256
TOKENS = CLIP + T5
"""Tokens of a text: CLIP's, then T5's, which are zeros without T5."""
PICTURES = "ip_adapter_image_embeds"


def _borrow(module: nn.Module, loan: Loan, searches: bool = True) -> Denoiser:
    return denoiser(borrow_mmdit(module, loan), searches)


def _call(
    mmdit: Denoiser,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    pooled_projections: Tensor | None = None,
    timestep: Tensor | None = None,
    block_controlnet_hidden_states: Sequence[Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
    skip_layers: Sequence[int] | None = None,
    **unknown: Any,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """`SD3Transformer2DModel.forward` on the compact network."""
    kwargs = dict(joint_attention_kwargs or {})
    pictures = kwargs.pop(PICTURES, None)
    lora_scale(kwargs, "joint_attention_kwargs")
    refuse(**unknown)
    if timestep is None:
        raise Unsupported("it was given no timestep")
    given = Conditions(
        encoder_hidden_states,
        pooled_projections,
        block_controlnet_hidden_states,
        skip_layers,
        pictures,
    )
    prediction = mmdit(hidden_states, timestep, given)
    return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)


def _scale(*_: Any, joint_attention_kwargs: Any = None, **__: Any) -> float:
    # diffusers ignores a scale that is passed by position
    kwargs = {k: v for k, v in (joint_attention_kwargs or {}).items() if k != PICTURES}
    return lora_scale(kwargs, "joint_attention_kwargs")


def _example(net: MMDiT, texts: int, tokens: int) -> Conditions:
    weight, context = net.like, net.context
    assert context is not None
    pooled = net.time_text.text.first.weight.shape[1]
    text = empty(weight, texts, tokens, context.weight.shape[1])
    return Conditions(text, empty(weight, texts, pooled))


def _channels(net: MMDiT) -> int:
    assert net.patches is not None
    return net.patches.channels


def _planned(mmdit: Denoiser, sizes: Sizes) -> list[Run]:
    """The planned launches, for a text whose tokens all differ. Kernels of IP-Adapters are not
    planned; they are compiled at their first launch."""
    return DENOISED.loop(without_memory(mmdit.network), sizes)


def _unexported(network: MMDiT) -> None:
    if network.ip_adapter is not None:
        raise Unsupported("an IP-Adapter, which an engine does not support")
    if perturbing(network.switches, PERTURBING):
        raise Unsupported("perturbed attention, which an engine does not support")


def _part(
    folder: str,
    net: nn.Module,
    dtype: torch.dtype,
    tokens: int = CLIP,
    timestep: tuple[int, ...] = (),
) -> Part:
    kind = type(net).__name__
    if kind != "SD3Transformer2DModel":
        raise UserError(f"{folder} is a {kind}; supported is SD3Transformer2DModel")
    config: Any = net.config
    for key in ("sample_size", "pos_embed_max_size"):
        if not isinstance(getattr(config, key), int):
            raise unsupported(folder, key, config)
    free, kind, patch = ("batch_size",), dtype_name(dtype), config.patch_size
    picture, tokens, most = ("height", "width"), tokens + T5, _most(net)
    own = min(config.sample_size, most)
    # the middle of the positions is computed differently for odd and even numbers of patches
    sizes = ((1, own, own), (3, 5 * patch, 3 * patch), (2, 7 * patch, 4 * patch))
    return Part(
        folder=folder,
        source=net,
        module=Exported(net, ["encoder_hidden_states", "pooled_projections"]).eval(),
        dtype=dtype,
        inputs=(
            Port("hidden_states", kind, (*free, config.in_channels, *picture)),
            # float32 in every dtype: above 512, float16 steps by 0.5
            Port("timestep", "float32", timestep),
            Port(
                "encoder_hidden_states",
                kind,
                (*free, "sequence_length", config.joint_attention_dim),
            ),
            Port("pooled_projections", kind, (*free, config.pooled_projection_dim)),
        ),
        outputs=(Port("out_sample", kind, (*free, config.out_channels, *picture)),),
        example=sides(2, 4 * patch, 6 * patch) | {"sequence_length": tokens},
        cases=tuple(
            sides(*size) | {"sequence_length": length}
            for size, length in zip(sizes, (tokens, tokens, 2 * tokens), strict=True)
        ),
        most=most,
    )


def _most(net: Any) -> int:
    """A picture uses as many positions as it has patches, so there is a largest one."""
    most: int = net.config.pos_embed_max_size * net.config.patch_size
    return most


def _taken(name: str, net: Any) -> Taken:
    return {name: (net, MMDIT)}


DENOISED = Denoised(Conditions, _example, _channels, _part, _unexported, patch_size, TOKENS, _most)
MMDIT = Kind(_borrow, _call, _planned, scale=_scale)
FAMILY = Family(
    models=("SD3Transformer2DModel",),
    taken=_taken,
    left={"image_proj": "projects an IP-Adapter's picture to a few tokens in every step"},
    denoised=DENOISED,
)
