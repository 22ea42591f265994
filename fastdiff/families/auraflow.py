"""AuraFlow: diffusers' AuraFlowTransformer2DModel."""

import math
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fastdiff.families import Denoised, Family, Kind, Sizes, Taken, empty
from fastdiff.families.part import Exported, Part, Port, dtype_name, patch_size, sides
from fastdiff.families.unet import lora_scale
from fastdiff.models import Loan, Unsupported
from fastdiff.models.auraflow import AuraFlow, Conditions, borrow_auraflow
from fastdiff.runtime.denoiser import Denoiser, denoiser
from fastdiff.runtime.planned import Run, without_memory

TOKENS = 256


def _borrow(module: nn.Module, loan: Loan, searches: bool = True) -> Denoiser:
    return denoiser(borrow_auraflow(module, loan), searches)


def _call(
    auraflow: Denoiser,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    timestep: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """`AuraFlowTransformer2DModel.forward` on the compact network."""
    lora_scale(attention_kwargs, "attention_kwargs")
    if not isinstance(timestep, Tensor) or timestep.ndim != 1:
        raise Unsupported("its timestep is not a tensor of one dimension")
    prediction = auraflow(hidden_states, timestep, Conditions(encoder_hidden_states))
    return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)


def _scale(*_: Any, attention_kwargs: Any = None, **__: Any) -> float:
    # diffusers ignores a scale that is passed by position
    return lora_scale(attention_kwargs, "attention_kwargs")


def _planned(auraflow: Denoiser, sizes: Sizes) -> list[Run]:
    return DENOISED.loop(without_memory(auraflow.network), sizes)


def _example(net: AuraFlow, texts: int, tokens: int) -> Conditions:
    return Conditions(empty(net.context.weight, texts, tokens, net.context.weight.shape[1]))


def _channels(net: AuraFlow) -> int:
    return net.patches.channels


def _part(
    folder: str, net: nn.Module, dtype: torch.dtype, _: int = 0, timestep: tuple[int, ...] = ()
) -> Part:
    config: Any = net.config
    free, kind, patch, most = "batch_size", dtype_name(dtype), config.patch_size, _most(net)
    own = min(config.sample_size, most)
    # the middle of the positions is computed differently for odd and even numbers of patches
    sizes = ((2, 4, 6), (1, own // patch, own // patch), (3, 5, 3), (2, 7, 4))
    lengths = (TOKENS - 1, TOKENS, 17, TOKENS)
    example, *cases = (
        sides(batch, y * patch, x * patch) | {"sequence_length": tokens}
        for (batch, y, x), tokens in zip(sizes, lengths, strict=True)
    )
    return Part(
        folder=folder,
        source=net,
        module=Exported(net, ["encoder_hidden_states"]).eval(),
        dtype=dtype,
        inputs=(
            Port("hidden_states", kind, (free, config.in_channels, "height", "width")),
            Port("timestep", "float32", timestep),
            Port(
                "encoder_hidden_states", kind, (free, "sequence_length", config.joint_attention_dim)
            ),
        ),
        outputs=(Port("out_sample", kind, (free, config.out_channels, "height", "width")),),
        example=example,
        cases=tuple(cases),
        most=most,
        unit=0.001,
    )


def _most(net: Any) -> int:
    """The largest height and width: as many patches as there are positions for a side."""
    most: int = math.isqrt(net.config.pos_embed_max_size) * net.config.patch_size
    return most


def _unexported(network: AuraFlow) -> None:
    """A file holds all of an AuraFlow."""


def _taken(name: str, net: Any) -> Taken:
    return {name: (net, AURAFLOW)}


DENOISED = Denoised(Conditions, _example, _channels, _part, _unexported, patch_size, TOKENS, _most)
AURAFLOW = Kind(_borrow, _call, _planned, scale=_scale)
FAMILY = Family(models=("AuraFlowTransformer2DModel",), taken=_taken, denoised=DENOISED)
