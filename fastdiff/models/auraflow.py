"""AuraFlow's denoising transformer on borrowed weights: a few blocks of a picture beside a text,
then many of both as one sequence.

All norms take vectors that depend only on the timestep. What a block attends to reaches its stream
only through its feed-forward layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.attention import attention
from fastdiff.kernels.joint_attention import joint_attention
from fastdiff.kernels.linear import linear
from fastdiff.kernels.observe import scope
from fastdiff.kernels.residual import residual
from fastdiff.kernels.where import on_gpu
from fastdiff.models.auraflow_block import Branch, borrow_joint, borrow_single
from fastdiff.models.blocks import Columns, repeated, require
from fastdiff.models.borrow import Loan, Weights
from fastdiff.models.checks import check_count, check_times, checked
from fastdiff.models.embeddings import (
    Embedding,
    Sinusoid,
    borrow_embedding,
    borrow_sinusoid,
    embedded_times,
)
from fastdiff.models.hoisted import Hoisted
from fastdiff.models.joint_trunk import alike
from fastdiff.models.patches import Patches, Positions
from fastdiff.models.sequences import cut, joined
from fastdiff.models.stream import Stream
from fastdiff.models.weights import project

WIDEST = 128
"""Heads beyond this width spill registers in our joint kernel (7 KiB a thread at 256 on sm_80), so
that a concatenation and the library's attention cost less."""
KEPT = 16
"""A text is cut to a multiple of this many tokens, so that few lengths need a recording."""


class Conditions(NamedTuple):
    """The network's inputs besides latents and timesteps. G: 2 with guidance, unconditional
    first."""

    encoder_hidden_states: Tensor | None
    """[G·B, T, D'] text."""


class Rows(NamedTuple):
    modulation: Tensor
    """[steps, n, …] the vectors of every norm."""
    shift: Tensor
    """[steps, n, p·p·C] the last layer of the last shift."""


class Constants(NamedTuple):
    text: Tensor
    """[G·B, T', D] registers, then text."""
    text_bias: Tensor | None
    """[T'] float32, added to the scores of their keys; see `joint_trunk.alike`."""
    embed: Tensor
    """[p·p·C, D] the patches' layer, in the order of packed patches."""
    position: Tensor
    """[1, L, D]"""
    ones: Tensor
    """[G·B, L, p·p·C]"""


@dataclass(frozen=True)
class CentredPositions(Positions):
    """Smaller pictures use the middle, whose odd rows and columns are cut as AuraFlow does."""

    def __call__(self, counts: tuple[int, int]) -> Tensor:
        rows, columns = counts
        top, left = self.side // 2 - rows // 2, self.side // 2 - columns // 2
        square = self.table[:, : self.side**2].view(1, self.side, self.side, -1)
        middle = square[:, top : top + rows, left : left + columns]
        return middle.reshape(1, rows * columns, -1)


@dataclass(frozen=True)
class AuraFlow:
    """AuraFlowTransformer2DModel."""

    recordable: ClassVar[bool] = True
    patches: Patches
    """The columns of its layer are in diffusers' order (C, p, q); see `Constants.embed`."""
    positions: CentredPositions
    sinusoid: Sinusoid
    time: Embedding
    modulation: Weights
    """The layers of all norms, which read the same embedding."""
    context: Weights
    registers: Tensor
    """[1, 8, D]"""
    joint: tuple[tuple[Branch, Branch], ...]
    """A picture's and a text's part of each block."""
    single: tuple[Branch, ...]
    last: slice
    """Which part of a row holds the last scale and shift."""
    proj_out: Weights

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    def check(self, latents: Tensor, conditions: Conditions, copies: int = 1) -> None:
        """Raise Unsupported if diffusers itself would refuse a tensor, or convert it.

        Args:
            latents: [B, C, Y, X].
            copies: G, the number of texts for each of the latents.
        """
        weight, size, side = self.proj_out.weight, self.patches.size, self.positions.side
        checked("hidden_states", latents, weight, self.patches.channels, 4)
        given = f"latents of {list(latents.shape)}"
        whole = all(length % size == 0 for length in latents.shape[2:])
        require(whole, f"{given} do not divide into patches of {size}")
        counts = self.patches.counts(latents.shape[2:])
        require(max(counts) <= side, f"{given} are larger than {side} by {side} patches")
        text = conditions.encoder_hidden_states
        text = checked("encoder_hidden_states", text, weight, self.context.weight.shape[1], 3)
        check_count("encoder_hidden_states", text, latents, copies)

    def hoist(self, conditions: Conditions, timesteps: Tensor, sides: Sequence[int]) -> Hoisted:
        """Compute everything that does not depend on the latents.

        Args:
            conditions: accepted by `check`.
            timesteps: [steps, n], n = 1 or B: a timestep for each picture.
            sides: Y and X of the latents.
        """
        text = conditions.encoder_hidden_states
        assert text is not None
        many = text.shape[0]
        check_times(timesteps, many)
        with scope("modulation"):
            timesteps = timesteps.to(text.device)
            told = embedded_times(self.sinusoid, self.time, timesteps, self.dtype, many)
            rows = project(F.silu(told), self.modulation)
            shift = rows[..., self.last].chunk(2, -1)[1]
            shift = linear(shift.contiguous(), self.proj_out.weight)
        position = self.positions(self.patches.counts(sides))
        ones = shift.new_ones(many, position.shape[1], shift.shape[-1])
        return Hoisted(
            Rows(rows, shift), Constants(*self._told(text), self._embed(), position, ones)
        )

    def _told(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """Registers and text, and the bias of their scores if equal tokens at the end are one.

        On a GPU they stay: there a library's attention, which takes no float32 bias, computes what
        they cost faster.
        """
        with scope("text"):
            count = 1 if on_gpu(text) else alike(text)
            length = text.shape[1] - count + 1
            length = min(text.shape[1], -(-length // KEPT) * KEPT)
            count = text.shape[1] - length + 1
            told = project(text[:, :length].contiguous(), self.context)
            told = torch.cat([self.registers.expand(len(told), -1, -1), told], dim=1)
            if count == 1:
                return told, None
            bias = torch.zeros(told.shape[1], device=told.device)
            bias[-1] = math.log(count)
            return told, bias

    def _embed(self) -> Tensor:
        size, weight = self.patches.size, self.patches.embed.weight
        cut = weight.view(len(weight), -1, size, size)
        return cut.permute(2, 3, 1, 0).reshape(-1, len(weight))

    def pack(self, latents: Tensor) -> Tensor:
        """[B, C, Y, X] -> [B, L, p·p·C]."""
        return self.patches.pack(latents)

    def predict(self, x: Tensor, row: Rows, constants: Constants) -> Tensor:
        """The part that every step repeats: [B, L, p·p·C] -> [G·B, L, p·p·C]."""
        count, bias = constants.text.shape[0], constants.text_bias
        vectors = row.modulation.expand(count, -1)
        with scope("patches"):
            x = linear(repeated(x, count), constants.embed.t(), self.patches.embed.bias)
            picture, text = Stream(x, total=constants.position), Stream(constants.text)
        for i, (own, other) in enumerate(self.joint):
            with scope(f"block {i}"):
                q, k, v = own.heads_of(picture, vectors)
                seen, told = _both(q, k, v, *other.heads_of(text, vectors), bias)
                picture, text = (
                    own.after(seen, picture, vectors),
                    other.after(told, text, vectors),
                )
        length = constants.text.shape[1]
        both = Stream(joined(text.closed(), picture.closed()))
        for i, block in enumerate(self.single):
            with scope(f"single block {i}"):
                seen = _attended(*block.heads_of(both, vectors), length, bias)
                both = block.after(seen, both, vectors)
        with scope("out"):
            x = cut(both.closed(), length, length + len(constants.position[0]))
            scale = vectors[:, self.last].chunk(2, 1)[0]
            x = linear(residual(x, x, gate=scale), self.proj_out.weight)
            return residual(x, constants.ones, gate=row.shift.expand(count, -1))

    def unpack(self, x: Tensor, sides: Sequence[int]) -> Tensor:
        """[B, L, p·p·C] -> [B, C, Y, X]."""
        return self.patches.unpack(x, sides)


def _both(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of a picture and a text to both."""
    if bias is None and on_gpu(q) and q.shape[3] > WIDEST:
        q, k, v = (torch.cat(pair, dim=1) for pair in ((text_q, q), (text_k, k), (text_v, v)))
        told, seen = attention(q, k, v).tensor_split((text_q.shape[1],), dim=1)
        return seen, told
    return joint_attention(q, k, v, text_q, text_k, text_v, text_bias=bias)


def _attended(q: Tensor, k: Tensor, v: Tensor, length: int, bias: Tensor | None) -> Tensor:
    """Attention of one sequence [B, S, H, K] whose first `length` tokens are text."""
    if bias is None:
        return attention(q, k, v)
    (text_q, q), (text_k, k), (text_v, v) = (t.tensor_split((length,), 1) for t in (q, k, v))
    seen, told = joint_attention(q, k, v, text_q, text_k, text_v, text_bias=bias)
    return joined(told.flatten(2), seen.flatten(2)).view(seen.shape[0], -1, *seen.shape[2:])


def borrow_auraflow(module: Any, loan: Loan) -> AuraFlow:
    """Borrow an AuraFlowTransformer2DModel's weights; raises Unsupported for other structures."""
    net, config = loan.open(module, "AuraFlowTransformer2DModel"), loan.config(module)
    embed = loan.open(net.pos_embed, "AuraFlowPatchEmbed")
    patches = Patches(embed.patch_size, loan.linear(embed.proj))
    width, side = patches.embed.weight.shape[0], math.isqrt(embed.pos_embed_max_size)
    table = loan.parameter(embed.pos_embed)
    require(table.shape == (1, embed.pos_embed_max_size, width), f"positions {list(table.shape)}")
    rows = Columns(loan)
    joint = tuple(
        borrow_joint(block, loan, rows, width) for block in loan.each(net.joint_transformer_blocks)
    )
    single = tuple(
        borrow_single(block, loan, rows, width)
        for block in loan.each(net.single_transformer_blocks)
    )
    require(len(single) > 0, "a transformer whose text and picture stay apart")
    final = loan.open(net.norm_out, "AuraFlowPreFinalBlock")
    loan.silu(final.silu)
    last = rows.take(final.linear)
    require(last.stop - last.start == 2 * width, "a last scale and shift of another width")
    proj_out, size = loan.linear(net.proj_out), patches.size
    require(config.patch_size == size, f"patches of {size} that are put together as others")
    wide = proj_out.weight.shape[0]
    require(
        config.out_channels == patches.channels and wide == patches.channels * size**2,
        f"a last layer of {wide} columns for {config.out_channels} channels",
    )
    require(proj_out.bias is None, "a last layer with a bias")
    registers = loan.parameter(net.register_tokens)
    require(registers.shape[::2] == (1, width), f"registers {list(registers.shape)}")
    auraflow = AuraFlow(
        patches=patches,
        positions=CentredPositions(table, side),
        sinusoid=borrow_sinusoid(net.time_step_embed, loan),
        time=borrow_embedding(net.time_step_proj, loan),
        modulation=loan.linear(*rows.layers, hoisted=True),
        context=loan.linear(net.context_embedder, hoisted=True),
        registers=registers,
        joint=joint,
        single=single,
        last=last,
        proj_out=proj_out,
    )
    loan.seal()
    return auraflow
