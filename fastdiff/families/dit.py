"""DiT, a transformer conditioned on a class: diffusers' DiTTransformer2DModel."""

from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fastdiff.families import Denoised, Family, Kind, Sizes, Taken
from fastdiff.families.part import Exported, Part, Port, latents_of, patch_size
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


def _part(
    folder: str, net: nn.Module, dtype: torch.dtype, _: int = 0, timestep: tuple[int, ...] = ()
) -> Part:
    latents, outputs = latents_of(folder, net, dtype)
    return Part(
        folder=folder,
        source=net,
        module=Exported(net, ["class_labels"]).eval(),
        dtype=dtype,
        inputs=(
            latents,
            Port("timestep", "float32", timestep),
            Port("class_labels", "int64", ("batch_size",)),
        ),
        outputs=(outputs,),
        example={"batch_size": 2},
        cases=({"batch_size": 1}, {"batch_size": 3}),
    )


def _unexported(network: DiT) -> None:
    """A file holds all of a DiT."""


def _taken(name: str, net: Any) -> Taken:
    return {name: (net, DIT)}


DENOISED = Denoised(Conditions, _example, _channels, _part, _unexported, patch_size)
DIT = Kind(_borrow, _call, _planned)
FAMILY = Family(models=("DiTTransformer2DModel",), taken=_taken, denoised=DENOISED)
