"""DiT, a transformer that is told a class: diffusers' DiTTransformer2DModel."""

from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.families import Denoised, Family, Kind, Sizes, Taken
from fastdiff.families.part import Part
from fastdiff.models import Loan, Unsupported
from fastdiff.models.checks import refuse
from fastdiff.models.dit import Conditions, DiT, borrow_dit
from fastdiff.runtime.denoiser import Denoiser, denoiser
from fastdiff.runtime.planned import Run, without_memory


def _borrow(module: nn.Module, loan: Loan, searches: bool = True) -> Denoiser:
    return denoiser(borrow_dit(module, loan), searches)


def _call(
    dit: Denoiser,
    hidden_states: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """`DiTTransformer2DModel.forward` on the compact network."""
    refuse(cross_attention_kwargs=cross_attention_kwargs)
    if not isinstance(timestep, Tensor) or timestep.ndim != 1:
        raise Unsupported("its timestep is not a tensor of one dimension")
    prediction = dit(hidden_states, timestep, Conditions(class_labels))
    return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)


def _planned(dit: Denoiser, sizes: Sizes) -> list[Run]:
    return DENOISED.loop(without_memory(dit.network), sizes)


def _example(net: DiT, texts: int, tokens: int) -> Conditions:
    weight = net.proj_out.weight
    return Conditions(torch.zeros(texts, dtype=torch.long, device=weight.device))


def _channels(net: DiT) -> int:
    return net.patches.channels


def _part(folder: str, net: nn.Module, *_: object) -> Part:
    raise UserError(f"{folder} is a {type(net).__name__}, which fastdiff does not export")


def _exported(network: DiT) -> None:
    """No DiT is exported; `_part` says so."""


def _multiple(net: Any) -> int:
    """The patch size."""
    patch: int = net.config.patch_size
    return patch


def _taken(name: str, net: Any) -> Taken:
    return {name: (net, DIT)}


DENOISED = Denoised(Conditions, _example, _channels, _part, _exported, _multiple)
DIT = Kind(_borrow, _call, _planned)
FAMILY = Family(models=("DiTTransformer2DModel",), taken=_taken, denoised=DENOISED)
