"""U-Nets that are told of no text, as DDPM's: diffusers' UNet2DModel."""

from typing import Any

from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from fastdiff.families import Family, Kind, Sizes, Taken, empty
from fastdiff.families.unet import channels
from fastdiff.models import Loan, UNet, borrow_picture_unet
from fastdiff.models.checks import refuse
from fastdiff.models.trunk import Conditions
from fastdiff.runtime.denoiser import Denoiser, denoiser
from fastdiff.runtime.planned import Run, call, without_memory


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
    """One step: diffusers' loop calls it once in each."""
    network: Any = unet.network
    bare: UNet = without_memory(network)
    latents = empty(bare.conv_in.weight, 1, channels(bare), sizes.side, sizes.side)
    return [call(bare, Conditions(), latents)]


def _taken(name: str, unet: Any) -> Taken:
    return {name: (unet, UNET2D)}


UNET2D = Kind(_borrow, _call, _planned)
FAMILY = Family(models=("UNet2DModel",), taken=_taken)
