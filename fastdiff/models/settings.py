"""The numbers and words that say, beside its weights, what a network computes."""

from collections.abc import Callable
from typing import Any

from torch import nn

from fastdiff.models.borrow import Loan
from fastdiff.models.controlnet import borrow_controlnet
from fastdiff.models.mmdit import borrow_mmdit
from fastdiff.models.mmdit_control import borrow_mmdit_control
from fastdiff.models.reads import Setting
from fastdiff.models.unet import borrow_unet
from fastdiff.models.vae import borrow_decoder, borrow_encoder
from fastdiff.models.watch import Unsupported, kind

_BORROW: dict[str, Callable[[Any, Loan], Any]] = {
    "UNet2DConditionModel": borrow_unet,
    "ControlNetModel": borrow_controlnet,
    "SD3Transformer2DModel": borrow_mmdit,
    "SD3ControlNetModel": borrow_mmdit_control,
    "Encoder": borrow_encoder,
    "Decoder": borrow_decoder,
}


def settings(root: nn.Module) -> list[Setting]:
    """What the runtime reads of the networks within `root`: path, attribute, value.

    Of modules that it does not compute, nothing.
    """
    found: list[Setting] = []
    for name, module in root.named_modules():
        if borrow := _BORROW.get(kind(module)):
            try:
                loan = Loan(module, rehearsal=True)
                borrow(module, loan)
            except Unsupported:
                continue
            found += ((f"{name}.{path}".strip("."), key, v) for path, key, v in loan.settings())
    return found
