"""PixArt, a transformer that attends to a text: diffusers' PixArtTransformer2DModel."""

from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fastdiff.families import Denoised, Family, Kind, Sizes, Taken, empty
from fastdiff.families.part import Part, Port, exportable, latents_of, patch_size
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


class _Out(nn.Module):
    """The last layer: [B, L, D] -> [B, 1, L, p·p·C]. diffusers squeezes the second axis. If it is
    not 1, torch does nothing, but ONNX refuses."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x)
        return made.unsqueeze(1)


class _Exported(nn.Module):
    """hidden_states [B, C, Y, X], timestep [] or [1], text [B, L, D], mask [B, L] of 0 and 1,
    for some resolution [B, 2] and aspect_ratio [B, 1] -> out_sample."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = exportable(net)
        self.net._modules["proj_out"] = _Out(net.get_submodule("proj_out"))

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, text: Tensor, mask: Tensor, *sizes: Tensor
    ) -> tuple[Tensor, ...]:
        net: Any = self.net
        many = hidden_states.shape[0]
        # as many rows as pictures, which torch's exporter does not see by itself
        told = [size.expand(many, -1) for size in sizes] or (None, None)
        return (
            net(
                hidden_states,
                text,
                timestep.reshape(-1).expand(many),
                dict(zip(SIZES, told, strict=True)),
                encoder_attention_mask=mask.expand(many, -1),
                return_dict=False,
            )[0],
        )


def _part(
    folder: str, net: nn.Module, dtype: torch.dtype, _: int = 0, timestep: tuple[int, ...] = ()
) -> Part:
    config: Any = net.config
    latents, outputs = latents_of(folder, net, dtype)
    kind, free = latents.dtype, ("batch_size", "sequence_length")
    wide = config.caption_channels or config.cross_attention_dim
    told = zip(SIZES, (2, 1), strict=True) if net.use_additional_conditions else ()
    lengths = (TOKENS - 1, TOKENS, 17)
    example, *cases = (
        {"batch_size": texts, "sequence_length": tokens}
        for texts, tokens in zip((2, 1, 3), lengths, strict=True)
    )
    return Part(
        folder=folder,
        source=net,
        module=_Exported(net).eval(),
        dtype=dtype,
        inputs=(
            latents,
            Port("timestep", "float32", timestep),
            Port("encoder_hidden_states", kind, (*free, wide)),
            Port("encoder_attention_mask", "int64", free),
            *(Port(name, kind, ("batch_size", columns)) for name, columns in told),
        ),
        outputs=(outputs,),
        example=example,
        cases=tuple(cases),
    )


def _unexported(network: PixArt) -> None:
    """A file holds all of a PixArt."""


def _taken(name: str, net: Any) -> Taken:
    return {name: (net, PIXART)}


DENOISED = Denoised(Conditions, _example, _channels, _part, _unexported, patch_size, TOKENS)
PIXART = Kind(_borrow, _call, _planned)
FAMILY = Family(models=("PixArtTransformer2DModel",), taken=_taken, denoised=DENOISED)
