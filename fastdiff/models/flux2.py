"""FLUX.2's denoising transformer on borrowed weights.

All blocks of a kind are modulated by the same vectors, which depend on the timestep, and in some
models on a distilled guidance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.attention import attention
from fastdiff.kernels.geglu import geglu
from fastdiff.kernels.gelu_gate import gelu_gate
from fastdiff.kernels.linear import linear
from fastdiff.kernels.observe import scope
from fastdiff.kernels.where import on_gpu
from fastdiff.models.blocks import Columns, require, split_heads
from fastdiff.models.borrow import Loan, Weights
from fastdiff.models.embeddings import (
    Embedding,
    Sinusoid,
    borrow_embedding,
    borrow_sinusoid,
    embedded_times,
)
from fastdiff.models.flux_blocks import borrow_joint, borrow_norms, both, open_flux_attention
from fastdiff.models.flux_trunk import FluxTrunk
from fastdiff.models.hoisted import Hoisted
from fastdiff.models.joint import MLP, JointBlock, Modulated, borrow_modulated
from fastdiff.models.joint_attention import HeadNorms
from fastdiff.models.rotary import Turns, borrow_rotary, check_positions, first
from fastdiff.models.stream import Stream
from fastdiff.models.weights import project


class Conditions(NamedTuple):
    """The network's inputs besides latents and timesteps. G: 2 with guidance, unconditional
    first."""

    encoder_hidden_states: Tensor | None
    """[G·B, T, D'] text."""
    img_ids: Tensor | None
    """[L, axes] or [B, L, axes] positions of the picture's tokens; diffusers reads the first
    picture's."""
    txt_ids: Tensor | None
    """[T, axes] or [B, T, axes] positions of the text's tokens, likewise."""
    guidance: Tensor | None = None
    """[B] the distilled guidance."""
    constant_tokens: Tensor | None = None
    """[B, L', C] tokens that follow the latents' and stay the same in all steps; nothing is
    predicted for them."""
    constant_ids: Tensor | None = None
    """[L', axes] or [B, L', axes] their positions."""


@dataclass(frozen=True)
class ParallelBlock:
    """Attention and MLP of the same norm and the same first layer, added together."""

    norm: Modulated
    heads: int
    up: Weights
    """[3·D + 2·M, D]: of queries, keys and values, the MLP's gate and its value."""
    norms: HeadNorms
    out: Weights
    """[D, D + M]: of the attention's columns, then of the MLP's."""

    def __call__(self, x: Stream, row: Tensor, turns: Turns) -> Stream:
        shift, scale, gate = self.norm.vectors(row)
        h = x.normed(self.norm.eps, shift, scale)
        packed, up = self._up(h, 3 * h.shape[-1])
        q, k, v = split_heads(packed, 3, self.heads)
        seen = attention(*self.norms(q, k, turns), v).flatten(2)
        return Stream(both(seen, up, self.out), gate, x.closed())

    def _up(self, h: Tensor, wide: int) -> tuple[Tensor, Tensor]:
        """The first layer: `wide` columns, and the gated others."""
        weight, act = self.up.weight, "silu_first"
        if on_gpu(h):
            made = linear(h, weight)
            return made[..., :wide], gelu_gate(made[..., wide:], act=act)
        return linear(h, weight[:wide]), geglu(h, weight[wide:], act=act)


@dataclass(frozen=True)
class Flux2(FluxTrunk):
    """Flux2Transformer2DModel."""

    sinusoid: Sinusoid
    time: Embedding
    guidance: Embedding | None

    def check(self, latents: Tensor, given: Conditions, copies: int = 1) -> None:
        """Raise Unsupported if diffusers itself would refuse a tensor, or convert it.

        Args:
            latents: [B, L, C].
            copies: G, the number of texts for each of the latents.
        """
        text, more = given.encoder_hidden_states, given.constant_tokens
        own, (_, count) = latents.shape[1], self.check_trunk(latents, text, copies, tokens=more)
        tokens = {"img_ids": own, "txt_ids": count}
        if more is not None:
            tokens["constant_ids"] = more.shape[1]
        for name, count in tokens.items():
            ids = first(getattr(given, name))
            check_positions(name, ids, self.proj_out.weight, count, self.rotary)
        if given.guidance is not None:
            fits = given.guidance.ndim == 1 and len(given.guidance) in (1, len(latents))
            require(fits, f"guidance has the shape {list(given.guidance.shape)}")

    def hoist(self, given: Conditions, timesteps: Tensor, sides: Sequence[int]) -> Hoisted:
        """Compute everything that does not depend on the latents.

        Args:
            given: accepted by `check`.
            timesteps: [steps, n], n = 1 or B: thousandths of timesteps.
            sides: not used.
        """
        text = given.encoder_hidden_states
        assert text is not None
        with scope("modulation"):
            told = self.dtype, len(text)
            times = self.in_thousands(timesteps, text)
            embedded = embedded_times(self.sinusoid, self.time, times, *told)
            if self.guidance is not None and given.guidance is not None:
                scales = (given.guidance.to(self.dtype) * 1000)[None]
                embedded = embedded + embedded_times(self.sinusoid, self.guidance, scales, *told)
            rows = project(F.silu(embedded), self.modulation)
        ids = (first(given.txt_ids), first(given.img_ids), first(given.constant_ids))
        turns = [self.rotary(part) for part in ids if part is not None]
        whole = Turns(*(torch.cat(tables) for tables in zip(*turns, strict=True)))
        return Hoisted(rows, self.constants(text, whole, None, given.constant_tokens))


def borrow_flux2(module: Any, loan: Loan) -> Flux2:
    """Borrow a Flux2Transformer2DModel's weights; raises Unsupported for other structures."""
    net, rows = loan.open(module, "Flux2Transformer2DModel"), Columns(loan)
    width = net.inner_dim
    picture = _borrow_modulation(net.double_stream_modulation_img, loan, rows, width, 2)
    text = _borrow_modulation(net.double_stream_modulation_txt, loan, rows, width, 2)
    one = _borrow_modulation(net.single_stream_modulation, loan, rows, width, 1)
    blocks = tuple(
        _borrow_block(block, loan, (picture, text), width)
        for block in loan.each(net.transformer_blocks)
    )
    singles = tuple(
        _borrow_single(block, loan, one, width)
        for block in loan.each(net.single_transformer_blocks)
    )
    require(len(blocks) > 0 and len(singles) > 0, "a FLUX without blocks of both kinds")
    norm_out = borrow_modulated(net.norm_out, loan, rows, width, "AdaLayerNormContinuous")
    told = loan.open(net.time_guidance_embed, "Flux2TimestepGuidanceEmbeddings")
    guidance = told.guidance_embedder
    flux = Flux2(
        embed=loan.linear(net.x_embedder),
        rotary=borrow_rotary(net.pos_embed, loan, width // singles[0].heads, "Flux2PosEmbed"),
        modulation=loan.linear(*rows.layers, hoisted=True),
        context=loan.linear(net.context_embedder),
        blocks=blocks,
        singles=singles,
        norm_out=norm_out,
        proj_out=loan.linear(net.proj_out),
        sinusoid=borrow_sinusoid(told.time_proj, loan),
        time=borrow_embedding(told.timestep_embedder, loan),
        guidance=None if guidance is None else borrow_embedding(guidance, loan),
    )
    for part in (flux.time, flux.guidance):
        require(part is None or part.condition is None, "a time embedding with a condition")
    loan.seal()
    return flux


def _borrow_modulation(module: Any, loan: Loan, rows: Columns, width: int, sets: int) -> slice:
    """The columns of the vectors that all blocks of a kind share."""
    modulation = loan.open(module, "Flux2Modulation")
    loan.silu(modulation.act_fn)
    columns = rows.take(modulation.linear)
    wide = columns.stop - columns.start
    require(wide == 3 * sets * width, "a norm whose width differs from its block's")
    return columns


def _borrow_block(module: Any, loan: Loan, columns: tuple[slice, slice], width: int) -> JointBlock:
    block = loan.open(module, "Flux2TransformerBlock")
    own = open_flux_attention(block.attn, loan, "Flux2Attention", "Flux2AttnProcessor")
    picture, text = columns
    return JointBlock(
        norm=Modulated(loan.bare_norm(block.norm1, width), picture, 6),
        attention=borrow_joint(own, loan, width),
        own=None,
        mlp=_borrow_mlp(block.norm2, block.ff, loan, width),
        text_norm=Modulated(loan.bare_norm(block.norm1_context, width), text, 6),
        text_mlp=_borrow_mlp(block.norm2_context, block.ff_context, loan, width),
    )


def _borrow_mlp(norm: Any, module: Any, loan: Loan, width: int) -> MLP:
    ff = loan.open(module, "Flux2FeedForward")
    _open_gate(ff.act_fn, loan)
    up, down = loan.linear(ff.linear_in), loan.linear(ff.linear_out)
    return MLP(loan.bare_norm(norm, width), up, down, gated=True)


def _open_gate(module: Any, loan: Loan) -> None:
    loan.silu(loan.open(module, "Flux2SwiGLU").gate_fn)


def _borrow_single(module: Any, loan: Loan, columns: slice, width: int) -> ParallelBlock:
    block = loan.open(module, "Flux2SingleTransformerBlock")
    names = "Flux2ParallelSelfAttention", "Flux2ParallelSelfAttnProcessor"
    own = open_flux_attention(block.attn, loan, *names)
    _open_gate(own.mlp_act_fn, loan)
    up, out = loan.linear(own.to_qkv_mlp_proj), loan.linear(own.to_out)
    inner = own.mlp_hidden_dim
    fits = own.inner_dim == width and own.mlp_mult_factor == 2
    fits = fits and up.weight.shape[0] == 3 * width + 2 * inner
    require(fits and up.bias is None, "queries, keys, values and MLP packed in another way")
    require(out.weight.shape[1] == width + inner, "a last layer of other columns")
    return ParallelBlock(
        norm=Modulated(loan.bare_norm(block.norm, width), columns, 3),
        heads=width // own.head_dim,
        up=up,
        norms=borrow_norms(own, loan),
        out=out,
    )
