"""FLUX.2's transformer: diffusers' Flux2Transformer2DModel."""

from typing import Any

from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModelOutput
from torch import Tensor, nn

from fastdiff.families import Denoised, Family, Kind, Sizes, Taken, empty
from fastdiff.families.flux import IDS, TOKENS, channels, exported, multiple, part, placed, shape
from fastdiff.families.unet import lora_scale
from fastdiff.models import Loan, Unsupported
from fastdiff.models.checks import refuse
from fastdiff.models.flux2 import Conditions, Flux2, borrow_flux2
from fastdiff.models.rotary import first
from fastdiff.runtime.denoiser import Denoiser, denoiser
from fastdiff.runtime.planned import Run, without_memory


def _borrow(module: nn.Module, loan: Loan, searches: bool = True) -> Denoiser:
    return denoiser(borrow_flux2(module, loan), searches)


def _call(
    flux: Denoiser,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    timestep: Tensor | None = None,
    img_ids: Tensor | None = None,
    txt_ids: Tensor | None = None,
    guidance: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
    kv_cache: Any = None,
    kv_cache_mode: str | None = None,
    num_ref_tokens: int = 0,
    ref_fixed_timestep: float = 0.0,
) -> Flux2Transformer2DModelOutput | tuple[Tensor]:
    """`Flux2Transformer2DModel.forward` on the compact network."""
    lora_scale(joint_attention_kwargs, "joint_attention_kwargs")
    refuse(kv_cache=kv_cache, kv_cache_mode=kv_cache_mode)
    if timestep is None:
        raise Unsupported("it was given no timestep")
    given = Conditions(encoder_hidden_states, img_ids, txt_ids, guidance)
    prediction = flux(hidden_states, timestep, given)
    return Flux2Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)


def _scale(
    *_: Any, joint_attention_kwargs: Any = None, attention_kwargs: Any = None, **__: Any
) -> float:
    """The LoRA scale from the network's argument, or from the pipeline's property."""
    # diffusers ignores a scale that is passed by position
    return lora_scale(joint_attention_kwargs or attention_kwargs, "joint_attention_kwargs")


def _planned(flux: Denoiser, sizes: Sizes) -> list[Run]:
    return DENOISED.loop(without_memory(flux.network), sizes)


def _example(net: Flux2, texts: int, tokens: int) -> Conditions:
    weight, axes = net.proj_out.weight, len(net.rotary.axes)
    text = empty(weight, texts, tokens, net.context.weight.shape[1])
    told = None if net.guidance is None else empty(weight, 1).float()
    return Conditions(text, None, empty(weight, tokens, axes), told)


def _for_file(net: Any, given: Conditions) -> Conditions:
    """With positions of any dtype, for one or several pictures, as the file takes them."""
    ids = {name: first(getattr(given, name)) for name in IDS}
    return given._replace(**{name: one.float() for name, one in ids.items() if one is not None})


def _taken(name: str, net: Any) -> Taken:
    return {name: (net, FLUX2)}


DENOISED = Denoised(
    *(Conditions, _example, channels, part, exported, multiple, TOKENS),
    shape=shape,
    placed=placed,
    guided=False,
    for_file=_for_file,
)
FLUX2 = Kind(_borrow, _call, _planned, scale=_scale)
FAMILY = Family(models=("Flux2Transformer2DModel",), taken=_taken, denoised=DENOISED)
