"""Compact networks that run on the weights of the diffusers modules they were borrowed from."""

from fastdiff.models.borrow import Loan, Unsupported
from fastdiff.models.unet import UNet, borrow_unet
from fastdiff.models.vae import Decoder, Encoder, borrow_decoder, borrow_encoder

__all__ = [
    "Decoder",
    "Encoder",
    "Loan",
    "UNet",
    "Unsupported",
    "borrow_decoder",
    "borrow_encoder",
    "borrow_unet",
]
