"""UnCLIP's and Kandinsky's prior: diffusers' PriorTransformer, whose latents are embeddings."""

from typing import Any

from diffusers.models.transformers.prior_transformer import PriorTransformerOutput
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.families import Denoised, Family, Kind, Sizes, Taken, empty
from fastdiff.families.part import Part
from fastdiff.models import Loan, Prior, borrow_prior
from fastdiff.models.prior import Conditions
from fastdiff.runtime.denoiser import Denoiser, denoiser
from fastdiff.runtime.planned import Run, without_memory


def _borrow(module: nn.Module, loan: Loan, searches: bool = True) -> Denoiser:
    return denoiser(borrow_prior(module, loan), searches)


def _call(
    prior: Denoiser,
    hidden_states: Tensor,
    timestep: Tensor | float | int,
    proj_embedding: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    return_dict: bool = True,
) -> PriorTransformerOutput | tuple[Tensor]:
    """`PriorTransformer.forward` on the compact network."""
    given = Conditions(proj_embedding, encoder_hidden_states, attention_mask)
    # diffusers makes an integer of a number
    step = timestep if isinstance(timestep, Tensor) else int(timestep)
    prediction = prior(hidden_states, step, given)
    return PriorTransformerOutput(prediction) if return_dict else (prediction,)


def _example(net: Prior, texts: int, tokens: int) -> Conditions:
    """Conditions of `texts`, not initialised; a prior has but one number of tokens."""
    weight, tokens = net.proj_in.weight, net.constant - 1
    wide = weight.shape[0] if net.text is None else net.text.weight.shape[1]
    return Conditions(
        empty(weight, texts, net.embedding.weight.shape[1]),
        empty(weight, texts, tokens, wide),
        empty(weight, texts, tokens).bool(),
    )


def _shape(net: Prior, side: int) -> tuple[int, ...]:
    return (1, net.proj_in.weight.shape[1])


def _channels(net: Prior) -> int:
    return net.proj_in.weight.shape[1]


def _planned(prior: Denoiser, sizes: Sizes) -> list[Run]:
    return DENOISED.loop(without_memory(prior.network), sizes)


def _part(folder: str, net: nn.Module, *_: object) -> Part:
    raise UserError(
        f"{folder} is a {type(net).__name__}, which cannot be exported: a file would compute all"
        " its tokens in every step"
    )


def _exported(network: Prior) -> None:
    """No prior is exported; `_part` says so."""


def _taken(name: str, prior: Any) -> Taken:
    return {name: (prior, PRIOR)}


DENOISED = Denoised(
    Conditions, _example, _channels, _part, _exported, multiple=lambda prior: 1, shape=_shape
)
PRIOR = Kind(_borrow, _call, _planned)
FAMILY = Family(models=("PriorTransformer",), taken=_taken, denoised=DENOISED)
