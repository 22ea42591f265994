"""The blocks of a U-Net: resnets, attention and a resampler, on borrowed weights."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastdiff.models.added_kv import AddedKV, borrow_added_kv
from fastdiff.models.blocks import PictureAttention, borrow_picture_attention, require
from fastdiff.models.borrow import Loan
from fastdiff.models.resnets import (
    Down,
    Resnet,
    TimeColumns,
    Up,
    borrow_resamplers,
    borrow_resnet,
)
from fastdiff.models.sums import Sum
from fastdiff.models.transformer import CrossColumns, Transformer, borrow_transformer

TOLD = (
    *("DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    *("UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
)
"""Block classes of a U-Net that attends to a text."""
ADDED = (
    *("DownBlock2D", "SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    *("UNetMidBlock2DSimpleCrossAttn", "UpBlock2D", "SimpleCrossAttnUpBlock2D"),
    "ResnetUpsampleBlock2D",
)
"""Block classes of a U-Net whose pixels attend to a text and to each other at once."""
ALONE = (
    *("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    *("UNetMidBlock2D", "UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
)
"""Block classes of a U-Net without a text: it attends to its own pixels only."""
_FREEU = ("s1", "s2", "b1", "b2")
"""The attributes that FreeU sets on a block."""


@dataclass(frozen=True)
class Stage:
    """A block of the U-Net: resnets, each followed by attention or None, and a resampler."""

    resnets: tuple[Resnet, ...]
    attentions: tuple[Transformer | AddedKV | PictureAttention | None, ...]
    """Transformers, attention to a text and the pixels, or self-attention over the pixels."""
    down: Down | Resnet | None = None
    up: Up | Resnet | None = None

    def halved(self, x: Sum, rows: Tensor) -> Sum:
        """x at the size of the next level down; `down` is not None."""
        assert self.down is not None
        return self.down(x, rows) if isinstance(self.down, Resnet) else self.down(x)

    def enlarged(self, x: Sum, rows: Tensor, size: tuple[int, int]) -> Sum:
        """x at the next level's `size`; `up` is not None. A resnet always doubles."""
        assert self.up is not None
        return self.up(x, rows) if isinstance(self.up, Resnet) else self.up(x, size)

    @property
    def crossed(self) -> bool:
        """Whether it attends to the text."""
        return isinstance(self.attentions[-1], Transformer | AddedKV)


def borrow_stage(
    module: Any, kinds: tuple[str, ...], loan: Loan, rows: TimeColumns, text: CrossColumns
) -> Stage:
    """From a block whose class is one of `kinds`."""
    block, name = loan.open(module, *kinds), type(module).__name__
    crossed, picture = "Cross" in name, name.startswith("Attn") or name == "UNetMidBlock2D"
    require(all(getattr(block, name, None) is None for name in _FREEU), "FreeU")
    told = bool(getattr(block, "has_cross_attention", False))
    require(told == crossed, "a block whose has_cross_attention contradicts its class")
    resnets = tuple(borrow_resnet(resnet, loan, rows) for resnet in loan.each(block.resnets))
    attentions = loan.each(block.attentions) if crossed or picture else [None] * len(resnets)

    def borrow(attention: Any) -> Transformer | AddedKV | PictureAttention:
        if "Simple" in name:
            return borrow_added_kv(attention, loan, text)
        if picture:
            return borrow_picture_attention(attention, loan)
        return borrow_transformer(attention, loan, text)

    attended = tuple(a if a is None else borrow(a) for a in attentions)
    return Stage(resnets, attended, *borrow_resamplers(block, loan, rows))
