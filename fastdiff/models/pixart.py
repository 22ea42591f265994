"""PixArt-α and -Σ, denoising transformers that attend to a text, on borrowed weights.

A block's norms take vectors that are the sum of the block's own table and of one layer's output
for the timestep (and the picture's size), the same for all blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.kernels.observe import scope
from fastdiff.models.blocks import require
from fastdiff.models.borrow import Loan, Unsupported, Weights
from fastdiff.models.checks import check_count, check_times, checked
from fastdiff.models.embeddings import Embedding, Sinusoid, borrow_embedding, borrow_sinusoid
from fastdiff.models.hoisted import Hoisted
from fastdiff.models.patch_trunk import PatchTrunk
from fastdiff.models.patches import SizedPositions, borrow_patches
from fastdiff.models.pixart_block import Block, Folding, borrow_blocks
from fastdiff.models.transformer import CrossColumns
from fastdiff.models.weights import project

SIZES = ("resolution", "aspect_ratio")
KEPT = 16
"""A text is cut to a multiple of this many tokens, so that few lengths need a recording."""


class Conditions(NamedTuple):
    """The network's inputs besides latents and timesteps. G: 2 with guidance, unconditional
    first."""

    encoder_hidden_states: Tensor | None
    """[G·B, T, D'] text."""
    encoder_attention_mask: Tensor | None = None
    """[G·B, T] of 0 and 1: 1 for the tokens to attend to."""
    added_cond_kwargs: Mapping[str, Tensor | None] | None = None
    """resolution [G·B, 2] and aspect_ratio [G·B, 1], or None each."""


class Constants(NamedTuple):
    position: Tensor
    """[1, L, D]"""
    text: Tensor
    """[G·B, T', …] keys and values of every block."""
    mask: Tensor | None
    """[G·B, 1, 1, T'], added to the scores."""


@dataclass(frozen=True)
class TimeSize:
    """The embedding of a timestep, and for some networks of the picture's size."""

    sinusoid: Sinusoid
    time: Embedding
    size_sinusoid: Sinusoid | None
    sizes: tuple[Embedding, ...]
    """Embeddings of `SIZES`; () if the network does not take them."""

    def __call__(
        self, timesteps: Tensor, told: Mapping[str, Tensor | None], dtype: torch.dtype, count: int
    ) -> Tensor:
        """[steps, n] -> [steps, N, D] for `count` texts; N is n, or `count` with sizes."""
        embedded = self.time(self.sinusoid(timesteps).to(dtype))
        if self.size_sinusoid is None:
            return embedded
        parts = []
        for name, embedding in zip(SIZES, self.sizes, strict=True):
            value = told[name]
            assert value is not None
            waves = self.size_sinusoid(value.flatten()).to(dtype)
            parts.append(embedding(waves).reshape(count, -1))
        times = embedded.shape[1]
        return embedded.repeat(1, count // times, 1) + torch.cat(parts, dim=1)


@dataclass(frozen=True)
class PixArt(PatchTrunk):
    """PixArtTransformer2DModel."""

    recordable: ClassVar[bool] = True
    embedding: TimeSize
    modulation: Weights
    """The layer that reads the embedding, shared by all blocks."""
    blocks: tuple[Block, ...]
    folding: Folding
    table: Tensor
    """[2, D]: shift and scale of the last norm."""
    caption: Embedding | None
    text: Weights
    """Keys and values of all blocks, which read the same text."""

    @property
    def text_width(self) -> int:
        """The columns of a text."""
        first = self.text if self.caption is None else self.caption.first
        return first.weight.shape[1]

    def check(self, latents: Tensor, conditions: Conditions, copies: int = 1) -> None:
        """Raise Unsupported if diffusers itself would refuse a tensor, or convert it.

        Args:
            latents: [B, C, Y, X].
            copies: G, the number of texts for each of the latents.
        """
        weight = self.proj_out.weight
        text, mask, added = conditions
        checked("hidden_states", latents, weight, self.patches.channels, 4)
        counts = self.patches.counts(latents.shape[2:])
        require(min(counts) > 0, f"latents of {list(latents.shape)} have no patch")
        text = checked("encoder_hidden_states", text, weight, self.text_width, 3)
        check_count("encoder_hidden_states", text, latents, copies)
        if mask is not None:
            right = mask.shape == text.shape[:2] and mask.device == weight.device
            require(right, f"encoder_attention_mask of the shape {list(mask.shape)}")
        told = added or {}
        require(set(told) <= set(SIZES), f"added_cond_kwargs of {', '.join(told)}")
        for name, columns in zip(SIZES, (2, 1), strict=True):
            value = told.get(name)
            if self.embedding.size_sinusoid is None:
                require(value is None, f"it was given {name}")
            else:
                check_count(name, checked(name, value, weight, columns, 2), latents, copies)

    def hoist(self, conditions: Conditions, timesteps: Tensor, sides: Sequence[int]) -> Hoisted:
        """Compute everything that does not depend on the latents.

        Args:
            conditions: accepted by `check`.
            timesteps: [steps, n], n = 1 or B: a timestep for each picture.
            sides: Y and X of the latents.
        """
        text, mask, added = conditions
        assert text is not None
        times, many = timesteps.shape[1], text.shape[0]
        check_times(timesteps, many)
        if times > 1:
            timesteps = timesteps.repeat(1, many // times)
        with scope("modulation"):
            told, count = added or {}, many
            if times == 1 and all(v is None or alike(v) for v in told.values()):
                told, count = {n: None if v is None else v[:1] for n, v in told.items()}, 1
            embedded = self.embedding(timesteps.to(text.device), told, self.dtype, count)
            shared = project(F.silu(embedded), self.modulation)
            vectors = [shared + block.table.flatten() for block in self.blocks]
            folded = self.folding.biases(vectors)
            vectors.append(torch.cat([embedded, embedded], -1) + self.table.flatten())
        position = self.positions(self.patches.counts(sides)).to(self.dtype)
        rows = torch.cat([*vectors, *folded], dim=-1)
        return Hoisted(rows, Constants(position, *self._told(text, mask)))

    def _told(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The text's keys and values without tokens that are never attended to, and the mask."""
        bias = None
        if mask is not None:
            # scores apart by 200 or more; a query whose keys are all masked attends to all alike
            used = mask.float() > mask.float().amax(1, keepdim=True) - 0.02
            last = int(used.any(0).nonzero().max()) + 1
            kept = min(text.shape[1], -(-last // KEPT) * KEPT)
            text, mask = text[:, :kept], mask[:, :kept]
            bias = ((1 - mask.to(self.dtype)) * -10000.0)[:, None, None, :].contiguous()
        with scope("text"):
            h = text.contiguous()
            if self.caption is not None:
                h = self.caption(h)
            return project(h, self.text), bias

    def predict(self, x: Tensor, row: Tensor, constants: Constants) -> Tensor:
        """The part that every step repeats: [B, L, p·p, C] -> [G·B, L, p·p, C or 2·C]."""
        width, count = self.table.shape[1], constants.text.shape[0]
        every = 6 * width * len(self.blocks)
        vectors, folded = row[:, :every].split(6 * width, dim=1), self.folding.at(row)
        picture = self.embed(x, count, constants.position)
        for i, block in enumerate(self.blocks):
            with scope(f"block {i}"):
                told = constants.text, constants.mask, folded[i]
                picture = block(picture, vectors[i], *told)
        return self.out(picture, row[:, every : every + 2 * width].expand(count, -1))


def alike(rows: Tensor) -> bool:
    """Whether all rows of [n, …] are equal; waits for the device."""
    return rows.is_meta or bool((rows == rows[:1]).all())


def borrow_pixart(module: Any, loan: Loan) -> PixArt:
    """Borrow a PixArtTransformer2DModel's weights; raises Unsupported for other structures."""
    net, config = loan.open(module, "PixArtTransformer2DModel"), loan.config(module)
    patches, found = borrow_patches(net.pos_embed, loan, own_size=True)
    if found is None:
        raise Unsupported("patches without positions")
    embed = loan.open(net.pos_embed, "PatchEmbed")
    require(embed.base_size == found.side, "positions of another base size")
    width, text = patches.embed.weight.shape[0], CrossColumns(loan)
    single = loan.open(net.adaln_single, "AdaLayerNormSingle")
    loan.silu(single.silu)
    blocks, folding = borrow_blocks(loan.each(net.transformer_blocks), loan, text, width)
    embedding = _borrow_embedding(single.emb, loan)
    told = embedding.size_sinusoid is not None
    require(bool(net.use_additional_conditions) == told, "sizes that are only half told")
    pixart = PixArt(
        patches=patches,
        positions=SizedPositions(found.table, found.side, embed.interpolation_scale),
        eps=loan.bare_norm(net.norm_out, width),
        proj_out=loan.linear(net.proj_out),
        embedding=embedding,
        modulation=loan.linear(single.linear, hoisted=True),
        blocks=blocks,
        folding=folding,
        table=loan.parameter(net.scale_shift_table),
        caption=_borrow_caption(net.caption_projection, loan),
        text=loan.linear(*text.layers, hoisted=True),
    )
    pixart.check_out(net.out_channels, config.patch_size)
    wide = pixart.modulation.weight.shape[0]
    require(wide == 6 * width, "a norm whose width differs from its block's")
    loan.seal()
    return pixart


def _borrow_embedding(module: Any, loan: Loan) -> TimeSize:
    both = loan.open(module, "PixArtAlphaCombinedTimestepSizeEmbeddings")
    sizes: tuple[Any, ...] = ()
    if both.use_additional_conditions:
        sizes = (both.resolution_embedder, both.aspect_ratio_embedder)
    return TimeSize(
        borrow_sinusoid(both.time_proj, loan),
        borrow_embedding(both.timestep_embedder, loan),
        borrow_sinusoid(both.additional_condition_proj, loan) if sizes else None,
        tuple(borrow_embedding(size, loan) for size in sizes),
    )


def _borrow_caption(module: Any, loan: Loan) -> Embedding | None:
    if module is None:
        return None
    caption = loan.open(module, "PixArtAlphaTextProjection")
    require(type(caption.act_1) is nn.GELU, "an activation of the text other than GELU")
    by = loan.open(caption.act_1, nn.GELU).approximate
    require(by == "tanh", f"a GELU of kind {by!r}")
    first, second = loan.linear(caption.linear_1), loan.linear(caption.linear_2)
    return Embedding(first, second, None, "gelu_tanh")
