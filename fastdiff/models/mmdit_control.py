"""The ControlNets of SD3 and SD3.5, on borrowed weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.linear import linear
from fastdiff.kernels.observe import scope
from fastdiff.models.blocks import Columns, require
from fastdiff.models.borrow import Loan, Weights
from fastdiff.models.checks import check_count, checked
from fastdiff.models.hoisted import Hoisted
from fastdiff.models.joint import (
    JointBlock,
    borrow_joint_block,
    borrow_mlp,
    borrow_modulated,
)
from fastdiff.models.joint_attention import borrow_joint_attention
from fastdiff.models.joint_trunk import JointTrunk, borrow_joint_trunk
from fastdiff.models.patches import Patches, borrow_patches
from fastdiff.models.stream import Stream


class ControlConditions(NamedTuple):
    """A ControlNet's inputs besides latents and timesteps. G: 2 with guidance, unconditional
    first."""

    encoder_hidden_states: Tensor | None
    """[G·B, T, D'] text; None for SD3.5-large's own ControlNets."""
    pooled_projections: Tensor | None
    """[G·B, D''] pooled text."""
    controlnet_cond: Tensor | None
    """[G·B, C', Y, X] control picture, encoded as latents."""


class ControlRows(NamedTuple):
    modulation: Tensor
    """[steps, G·B, ...] the vectors of every norm."""


class ControlConstants(NamedTuple):
    picture: Tensor
    """[G·B, L, D] the control picture's embedded patches plus positions."""
    text: Tensor | None
    """[G·B, T, D]"""
    text_bias: Tensor | None
    """[T] float32, added to the scores of the text's keys; see `joint_trunk.alike`."""


@dataclass(frozen=True)
class MMDiTControl(JointTrunk):
    """SD3ControlNetModel."""

    recordable: ClassVar[bool] = True
    picture: Patches
    """The patches of the control picture."""
    outs: tuple[Weights, ...]
    """A linear layer for each block's result."""

    def check(self, latents: Tensor, conditions: ControlConditions, copies: int = 1) -> None:
        """Raise Unsupported if diffusers itself would refuse a tensor, or convert it.

        Args:
            latents: [B, C, Y, X], or [B, L, D] for a network that does not cut patches itself.
            copies: G, the number of texts for each of the latents.
        """
        text, pooled, picture = conditions
        self.check_trunk(latents, text, pooled, copies)
        weight = self.like
        picture = checked("controlnet_cond", picture, weight, self.picture.channels, 4)
        check_count("controlnet_cond", picture, latents, copies)
        rows, columns = self.picture.counts(picture.shape[2:])
        if self.patches is None:
            same = latents.shape[1] == rows * columns
        else:
            same = self.patches.counts(latents.shape[2:]) == (rows, columns)
        require(same, f"controlnet_cond {list(picture.shape)} beside {list(latents.shape)}")

    def hoist(
        self, conditions: ControlConditions, timesteps: Tensor, sides: Sequence[int]
    ) -> Hoisted:
        """Compute everything that does not depend on the latents; arguments as for
        `MMDiT.hoist`."""
        text, pooled, cond = conditions
        assert pooled is not None
        assert cond is not None
        with scope("picture"):
            embed = self.picture.embed
            picture = linear(self.picture.pack(cond), embed.weight, embed.bias)
            if self.positions is not None:
                picture = picture + self.positions(self.picture.counts(cond.shape[2:]))
        return Hoisted(
            ControlRows(self.modulations(timesteps, pooled)),
            ControlConstants(picture, *((None, None) if text is None else self.texts(text))),
        )

    def predict(self, x: Tensor, row: ControlRows, constants: ControlConstants) -> Tensor:
        """The part that every step repeats, for patches [B, L, p·p·C] or tokens [B, L, D].

        Returns:
            [blocks, G·B, L, D]: what to add to the transformer's blocks, without any conditioning
            scale.
        """
        text = None if constants.text is None else Stream(constants.text)
        picture = self.embed(x, constants.picture.shape[0], constants.picture)
        streams = []
        for i, block in enumerate(self.blocks):
            with scope(f"block {i}"):
                picture, text = block(picture, text, row.modulation, constants.text_bias)
            streams.append(picture)
        with scope("out"):
            both = zip(streams, self.outs, strict=True)
            return torch.stack([linear(s.closed(), out.weight, out.bias) for s, out in both])

    def unpack(self, x: Tensor, sides: Sequence[int]) -> Tensor:
        """Returned as they are."""
        return x


def borrow_mmdit_control(module: Any, loan: Loan) -> MMDiTControl:
    """Borrow an SD3ControlNetModel's weights; raises Unsupported for other structures."""
    net = loan.open(module, "SD3ControlNetModel")
    rows, layers = Columns(loan), loan.each(net.transformer_blocks)
    told = net.context_embedder is not None
    width = net.inner_dim
    blocks = tuple(
        borrow_joint_block(layer, loan, rows, width, asked=i + 1 < len(layers))
        if told
        else borrow_single_block(layer, loan, rows, width)
        for i, layer in enumerate(layers)
    )
    picture, positions = borrow_patches(net.pos_embed_input, loan)
    require(positions is None, "positions for the control picture")
    outs = loan.each(net.controlnet_blocks, len(layers))
    control = MMDiTControl(
        **borrow_joint_trunk(net, loan, rows, blocks),
        picture=picture,
        outs=tuple(map(loan.linear, outs)),
    )
    loan.seal()
    return control


def borrow_single_block(module: Any, loan: Loan, rows: Columns, width: int) -> JointBlock:
    """From an SD3SingleTransformerBlock, used in SD3.5-large's ControlNets."""
    block = loan.open(module, "SD3SingleTransformerBlock")
    return JointBlock(
        norm=borrow_modulated(block.norm1, loan, rows, width, "AdaLayerNormZero"),
        attention=borrow_joint_attention(block.attn, loan),
        own=None,
        mlp=borrow_mlp(block.norm2, block.ff, loan, width),
        text_norm=None,
        text_mlp=None,
    )
