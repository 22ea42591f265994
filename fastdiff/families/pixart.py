"""PixArt, a transformer that attends to a text: diffusers' PixArtTransformer2DModel."""

from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.families import Denoised, Family, Kind, Sizes, Taken, empty
from fastdiff.families.part import Part
from fastdiff.models import Loan, Unsupported
from fastdiff.models.checks import refuse
from fastdiff.models.pixart import SIZES, Conditions, PixArt, borrow_pixart
from fastdiff.runtime.denoiser import Denoiser, denoiser
from fastdiff.runtime.planned import Run, without_memory

TOKENS = 300
"""Tokens of PixArt-Σ's texts; PixArt-α's have 120."""


def _borrow(module: nn.Module, loan: Loan, searches: bool = True) -> Denoiser:
    return denoiser(borrow_pixart(module, loan), searches)


def _call(
    pixart: Denoiser,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    timestep: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor | None] | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    attention_mask: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    return_dict: bool = True,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """`PixArtTransformer2DModel.forward` on the compact network."""
    refuse(cross_attention_kwargs=cross_attention_kwargs, attention_mask=attention_mask)
    if not isinstance(timestep, Tensor) or timestep.shape != hidden_states.shape[:1]:
        raise Unsupported("its timestep is not a tensor of one timestep for each of the latents")
    given = Conditions(encoder_hidden_states, encoder_attention_mask, added_cond_kwargs)
    prediction = pixart(hidden_states, timestep, given)
    return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)


def _planned(pixart: Denoiser, sizes: Sizes) -> list[Run]:
    return DENOISED.loop(without_memory(pixart.network), sizes)


def _example(net: PixArt, texts: int, tokens: int) -> Conditions:
    weight = net.proj_out.weight
    sizes = None
    if net.embedding.size_sinusoid is not None:
        columns = zip(SIZES, (2, 1), strict=True)
        sizes = {name: empty(weight, texts, count) for name, count in columns}
    return Conditions(empty(weight, texts, tokens, net.text_width), None, sizes)


def _channels(net: PixArt) -> int:
    return net.patches.channels


def _part(folder: str, net: nn.Module, *_: object) -> Part:
    raise UserError(f"{folder} is a {type(net).__name__}, which fastdiff does not export")


def _exported(network: PixArt) -> None:
    """No PixArt is exported; `_part` says so."""


def _multiple(net: Any) -> int:
    """The patch size."""
    patch: int = net.config.patch_size
    return patch


def _taken(name: str, net: Any) -> Taken:
    return {name: (net, PIXART)}


DENOISED = Denoised(Conditions, _example, _channels, _part, _exported, _multiple, TOKENS)
PIXART = Kind(_borrow, _call, _planned)
FAMILY = Family(models=("PixArtTransformer2DModel",), taken=_taken, denoised=DENOISED)
