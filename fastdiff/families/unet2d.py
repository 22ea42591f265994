"""U-Nets without a text, such as DDPM's: diffusers' UNet2DModel."""

from dataclasses import replace
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.families import Denoised, Family, Kind, Sizes, Taken
from fastdiff.families.part import Part, Port, dtype_name, exportable, sides, unsupported
from fastdiff.families.unet import channels, constant_channels
from fastdiff.models import Loan, UNet, borrow_picture_unet
from fastdiff.models.trunk import Conditions
from fastdiff.runtime.denoiser import Denoiser, denoiser
from fastdiff.runtime.planned import Run, without_memory


def _borrow(module: nn.Module, loan: Loan, searches: bool = True) -> Denoiser:
    return denoiser(borrow_picture_unet(module, loan), searches)


def _call(
    unet: Denoiser,
    sample: Tensor,
    timestep: Tensor | float | int,
    class_labels: Tensor | None = None,
    return_dict: bool = True,
) -> UNet2DOutput | tuple[Tensor]:
    """`UNet2DModel.forward` on the compact network."""
    # diffusers makes an integer of a number
    step = timestep if isinstance(timestep, Tensor) else int(timestep)
    prediction = unet(sample, step, Conditions(class_labels=class_labels))
    return UNet2DOutput(sample=prediction) if return_dict else (prediction,)


def _planned(unet: Denoiser, sizes: Sizes) -> list[Run]:
    network: Any = unet.network
    return DENOISED.loop(without_memory(network), replace(sizes, guided=False))


def _example(net: UNet, texts: int, tokens: int) -> Conditions:
    if net.classes is None:
        return Conditions()
    return Conditions(class_labels=net.classes.example(texts, net.conv_in.weight))


class _Exported(nn.Module):
    """sample [B, C, Y, X], timestep [] or [1], perhaps class_labels -> out_sample."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = exportable(net)

    def forward(self, sample: Tensor, timestep: Tensor, *labels: Tensor) -> tuple[Tensor, ...]:
        out = self.net(sample, timestep, *labels, return_dict=False)
        return (out[0],)


def _part(
    folder: str, net: nn.Module, dtype: torch.dtype, _: int = 0, timestep: tuple[int, ...] = ()
) -> Part:
    kind = type(net).__name__
    if kind != "UNet2DModel":
        raise UserError(f"{folder} is a {kind}; supported is UNet2DModel")
    config: Any = net.config
    if config.time_embedding_type != "positional" or config.class_embed_type is not None:
        raise UserError(
            f"{folder} has time_embedding_type {config.time_embedding_type!r} and class_embed_type"
            f" {config.class_embed_type!r}; supported are 'positional' and None"
        )
    if not isinstance(config.sample_size, int):
        raise unsupported(folder, "sample_size", config)
    inputs = [
        Port("sample", dtype_name(dtype), ("batch_size", config.in_channels, "height", "width")),
        Port("timestep", "float32", timestep),
    ]
    if config.num_class_embeds is not None:
        inputs.append(Port("class_labels", "int64", ("batch_size",)))
    shape = ("batch_size", config.out_channels, "height", "width")
    least, side = _multiple(net), config.sample_size
    return Part(
        folder=folder,
        source=net,
        module=_Exported(net).eval(),
        dtype=dtype,
        inputs=tuple(inputs),
        outputs=(Port("out_sample", dtype_name(dtype), shape),),
        example=sides(2, 2 * least, 3 * least),
        cases=(sides(1, side, side), sides(3, 3 * least, 2 * least)),
    )


def _unexported(network: UNet) -> None:
    """A file holds all of a UNet2DModel."""


def _multiple(unet: Any) -> int:
    times: int = 2 ** (len(unet.config.block_out_channels) - 1)
    return times


def _taken(name: str, unet: Any) -> Taken:
    return {name: (unet, UNET2D)}


DENOISED = Denoised(
    Conditions,
    _example,
    channels,
    _part,
    _unexported,
    _multiple,
    constant_channels=constant_channels,
)
UNET2D = Kind(_borrow, _call, _planned)
FAMILY = Family(models=("UNet2DModel",), taken=_taken, denoised=DENOISED)
