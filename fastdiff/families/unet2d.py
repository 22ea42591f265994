"""U-Nets without a text, such as DDPM's: diffusers' UNet2DModel."""

from dataclasses import replace
from typing import Any

from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.families import Denoised, Family, Kind, Sizes, Taken
from fastdiff.families.part import Part
from fastdiff.families.unet import channels, constant_channels
from fastdiff.models import Loan, UNet, borrow_picture_unet
from fastdiff.models.checks import refuse
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
    refuse(class_labels=class_labels)
    prediction = unet(sample, timestep, Conditions())
    return UNet2DOutput(sample=prediction) if return_dict else (prediction,)


def _planned(unet: Denoiser, sizes: Sizes) -> list[Run]:
    network: Any = unet.network
    return DENOISED.loop(without_memory(network), replace(sizes, guided=False))


def _example(net: UNet, texts: int, tokens: int) -> Conditions:
    return Conditions()


def _part(folder: str, net: nn.Module, *_: object) -> Part:
    raise UserError(f"{folder} is a {type(net).__name__}; supported is UNet2DConditionModel")


def _exported(network: UNet) -> None:
    """No UNet2DModel is exported; `_part` says so."""


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
    _exported,
    _multiple,
    constant_channels=constant_channels,
)
UNET2D = Kind(_borrow, _call, _planned)
FAMILY = Family(models=("UNet2DModel",), taken=_taken, denoised=DENOISED)
