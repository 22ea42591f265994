"""DiT, the denoising transformer that is conditioned on a class, on borrowed weights.

A block's norms take vectors of the timestep and the class,
which each block embeds with its own layers; `hoist` computes those of all steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.attention import attention
from fastdiff.kernels.linear import linear
from fastdiff.kernels.observe import scope
from fastdiff.models.blocks import open_attention, require, split_heads
from fastdiff.models.borrow import Loan, Unsupported, Weights
from fastdiff.models.checks import check_count, check_times, checked
from fastdiff.models.class_embeddings import INDICES
from fastdiff.models.embeddings import (
    Embedding,
    Sinusoid,
    borrow_embedding,
    borrow_sinusoid,
    embedded_times,
)
from fastdiff.models.hoisted import Hoisted
from fastdiff.models.joint import MLP, borrow_mlp
from fastdiff.models.patch_trunk import PatchTrunk
from fastdiff.models.patches import borrow_patches
from fastdiff.models.stream import Stream
from fastdiff.models.weights import project


class Conditions(NamedTuple):
    """The network's inputs besides latents and timesteps. G: 2 with guidance."""

    class_labels: Tensor | None
    """[G·B] int64 or int32."""


class Constants(NamedTuple):
    position: Tensor
    """[1, L, D]"""
    like: Tensor
    """[G·B], values unused: its length is the number of predictions."""


@dataclass(frozen=True)
class ClassEmbedding:
    """The sum of a timestep's and a class's embeddings."""

    sinusoid: Sinusoid
    time: Embedding
    table: Tensor
    """[classes, D]"""

    def __call__(self, timesteps: Tensor, labels: Tensor) -> Tensor:
        """[steps, n] and [N] -> [steps, N, D]; n is 1 or divides N."""
        classes = F.embedding(labels, self.table)
        told = timesteps.to(labels.device), self.table.dtype, len(labels)
        return embedded_times(self.sinusoid, self.time, *told) + classes


@dataclass(frozen=True)
class Block:
    heads: int
    embedding: ClassEmbedding
    modulation: Weights
    """From the embedding: shift, scale and gate of the attention, then of the MLP."""
    eps: float
    qkv: Weights
    out: Weights
    mlp: MLP

    def __call__(self, picture: Stream, vectors: Tensor) -> Stream:
        """`vectors`: [B, 6·D]."""
        shift, scale, gate, *mlp = vectors.chunk(6, 1)
        h = picture.normed(self.eps, shift, scale)
        q, k, v = split_heads(linear(h, self.qkv.weight, self.qkv.bias), 3, self.heads)
        seen = linear(attention(q, k, v).flatten(2), self.out.weight, self.out.bias)
        return self.mlp(Stream(seen, gate, picture.closed()), *mlp)


@dataclass(frozen=True)
class DiT(PatchTrunk):
    """DiTTransformer2DModel. It predicts the noise, and perhaps as many channels for the
    variance."""

    recordable: ClassVar[bool] = True
    blocks: tuple[Block, ...]
    modulation: Weights
    """From the first block's embedding: shift and scale of the last norm."""

    def check(self, latents: Tensor, conditions: Conditions, copies: int = 1) -> None:
        """Raise Unsupported if diffusers itself would refuse a tensor, or convert it.

        Args:
            latents: [B, C, Y, X].
            copies: G, the number of labels for each of the latents.
        """
        weight, labels = self.proj_out.weight, conditions.class_labels
        checked("hidden_states", latents, weight, self.patches.channels, 4)
        side = self.positions.side * self.patches.size
        own = all(side <= given < side + self.patches.size for given in latents.shape[2:])
        require(own, f"latents of {list(latents.shape)} are not {side} by {side}")
        if labels is None:
            raise Unsupported("class_labels is missing")
        found = f"class_labels are {labels.dtype} of the shape {list(labels.shape)}"
        right = labels.dtype in INDICES and labels.ndim == 1 and labels.device == weight.device
        require(right, f"{found} on {labels.device}")
        check_count("class_labels", labels, latents, copies)

    def hoist(self, conditions: Conditions, timesteps: Tensor, sides: Sequence[int]) -> Hoisted:
        """Compute everything that does not depend on the latents.

        Args:
            conditions: accepted by `check`.
            timesteps: [steps, n], n = 1 or B: a timestep for each picture.
            sides: Y and X of the latents.
        """
        labels = conditions.class_labels
        assert labels is not None
        check_times(timesteps, labels.shape[0], "label")
        with scope("modulation"):
            embedded = [F.silu(block.embedding(timesteps, labels)) for block in self.blocks]
            told = [(x, block.modulation) for x, block in zip(embedded, self.blocks, strict=True)]
            told.append((embedded[0], self.modulation))
            vectors = [project(x, layer) for x, layer in told]
        position = self.positions(self.patches.counts(sides)).to(self.dtype)
        return Hoisted(torch.cat(vectors, dim=-1), Constants(position, labels))

    def predict(self, x: Tensor, row: Tensor, constants: Constants) -> Tensor:
        """The part that every step repeats: [B, L, p·p, C] -> [G·B, L, p·p, C or 2·C]."""
        layers = (*(block.modulation for block in self.blocks), self.modulation)
        vectors = row.split([layer.weight.shape[0] for layer in layers], dim=1)
        picture = self.embed(x, constants.like.shape[0], constants.position)
        for i, block in enumerate(self.blocks):
            with scope(f"block {i}"):
                picture = block(picture, vectors[i])
        return self.out(picture, vectors[-1])


def borrow_dit(module: Any, loan: Loan) -> DiT:
    """Borrow a DiTTransformer2DModel's weights; raises Unsupported for other structures."""
    net = loan.open(module, "DiTTransformer2DModel")
    patches, positions = borrow_patches(net.pos_embed, loan, own_size=True)
    if positions is None:
        raise Unsupported("patches without positions")
    width = patches.embed.weight.shape[0]
    blocks = tuple(_borrow_block(block, loan, width) for block in loan.each(net.transformer_blocks))
    require(len(blocks) > 0, "a transformer without blocks")
    dit = DiT(
        patches=patches,
        positions=positions,
        blocks=blocks,
        eps=loan.bare_norm(net.norm_out, width),
        modulation=loan.linear(net.proj_out_1, hoisted=True),
        proj_out=loan.linear(net.proj_out_2),
    )
    dit.check_out(net.out_channels, net.patch_size)
    require(dit.modulation.weight.shape[0] == 2 * width, "a last norm of another width")
    loan.seal()
    return dit


def _borrow_block(module: Any, loan: Loan, width: int) -> Block:
    """From a BasicTransformerBlock of the norms "ada_norm_zero"."""
    block = loan.open(module, "BasicTransformerBlock")
    require(block.norm_type == "ada_norm_zero", f"transformer norms of type {block.norm_type}")
    require(block.attn2 is None, "cross-attention in a block with a class embedding")
    require(block.pos_embed is None, "positional embeddings in a transformer block")
    require(block._chunk_size is None, "a feed-forward layer in chunks")
    require(not block.only_cross_attention, "cross-attention in place of self-attention")
    norm = loan.open(block.norm1, "AdaLayerNormZero")
    loan.silu(norm.silu)
    both = loan.open(norm.emb, "CombinedTimestepLabelEmbeddings")
    labels = loan.open(both.class_embedder, "LabelEmbedding")
    rate, training = labels.dropout_prob, labels.training
    require(not (training and rate > 0), "a module in training mode")
    own, out = open_attention(block.attn1, loan, residual=False)
    require(own.group_norm is None, "a group norm inside a transformer block's attention")
    modulation = loan.linear(norm.linear, hoisted=True)
    require(modulation.weight.shape[0] == 6 * width, "a norm whose width differs from its block's")
    return Block(
        heads=own.heads,
        embedding=ClassEmbedding(
            borrow_sinusoid(both.time_proj, loan),
            borrow_embedding(both.timestep_embedder, loan),
            loan.table(labels.embedding_table),
        ),
        modulation=modulation,
        eps=loan.bare_norm(norm.norm, width),
        qkv=loan.linear(own.to_q, own.to_k, own.to_v),
        out=loan.linear(out),
        mlp=borrow_mlp(block.norm3, block.ff, loan, width),
    )
