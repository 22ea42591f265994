"""AuraFlow: diffusers' AuraFlowTransformer2DModel."""

from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.families import Denoised, Family, Kind, Sizes, Taken, empty
from fastdiff.families.part import Part
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


def _part(folder: str, net: nn.Module, *_: object) -> Part:
    raise UserError(f"{folder} is a {type(net).__name__}, which fastdiff does not export")


def _exported(network: AuraFlow) -> None:
    """No AuraFlow is exported; `_part` says so."""


def _multiple(net: Any) -> int:
    """The patch size."""
    patch: int = net.config.patch_size
    return patch


def _taken(name: str, net: Any) -> Taken:
    return {name: (net, AURAFLOW)}


DENOISED = Denoised(Conditions, _example, _channels, _part, _exported, _multiple, TOKENS)
AURAFLOW = Kind(_borrow, _call, _planned, scale=_scale)
FAMILY = Family(models=("AuraFlowTransformer2DModel",), taken=_taken, denoised=DENOISED)
