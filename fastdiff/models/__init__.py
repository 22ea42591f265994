"""Compact networks that run on the weights of the diffusers modules they were borrowed from."""

from fastdiff.models.borrow import Loan, Unsupported
from fastdiff.models.controlnet import ControlNet, borrow_controlnet
from fastdiff.models.mmdit import Conditions as MMDiTConditions
from fastdiff.models.mmdit import MMDiT, borrow_mmdit
from fastdiff.models.mmdit_control import ControlConditions as MMDiTControlConditions
from fastdiff.models.mmdit_control import MMDiTControl, borrow_mmdit_control
from fastdiff.models.prior import Conditions as PriorConditions
from fastdiff.models.prior import Prior, borrow_prior
from fastdiff.models.trunk import Trunk
from fastdiff.models.unet import UNet, borrow_picture_unet, borrow_unet
from fastdiff.models.vae import Decoder, Encoder, borrow_decoder, borrow_encoder

__all__ = [
    "ControlNet",
    "Decoder",
    "Encoder",
    "Loan",
    "MMDiT",
    "MMDiTConditions",
    "MMDiTControl",
    "MMDiTControlConditions",
    "Prior",
    "PriorConditions",
    "Trunk",
    "UNet",
    "Unsupported",
    "borrow_controlnet",
    "borrow_decoder",
    "borrow_encoder",
    "borrow_mmdit",
    "borrow_mmdit_control",
    "borrow_picture_unet",
    "borrow_prior",
    "borrow_unet",
]
