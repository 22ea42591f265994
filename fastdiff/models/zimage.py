"""Z-Image's denoising transformer on borrowed weights: one sequence of a picture's tokens and its
caption's, after each was refined by a few separate blocks.

diffusers pads pictures and captions to a multiple of `MULTIPLE` tokens, which take part like all
others. A caption's blocks depend on neither timestep nor latents: they run once an image.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.kernels.ada_norm import ada_norm
from fastdiff.kernels.linear import linear
from fastdiff.kernels.observe import scope
from fastdiff.kernels.residual import residual
from fastdiff.models.blocks import Columns, repeated, require
from fastdiff.models.borrow import Loan, Weights
from fastdiff.models.checks import checked
from fastdiff.models.embeddings import Embedding, Sinusoid, embedded_times
from fastdiff.models.hoisted import Hoisted
from fastdiff.models.patches import Patches
from fastdiff.models.sequences import chained, cut, joined
from fastdiff.models.weights import project
from fastdiff.models.zimage_block import RMS, Block, Group, Pending, borrow_block, borrow_rms
from fastdiff.models.zimage_turns import Axes, borrow_axes

MULTIPLE = 32


class Conditions(NamedTuple):
    """The network's inputs besides latents and timesteps. G: 2 with guidance."""

    cap_feats: Sequence[Tensor] | None
    """G·B captions [T, D'] of any length."""
    negated: bool = False
    """Whether the loop takes the prediction's negative."""


class Constants(NamedTuple):
    captions: tuple[Tensor, ...]
    """[b, T, D] refined, for each run of captions of one length."""
    pad: Tensor | None
    """[G·B, P, D] the tokens behind a picture's own."""
    pictures: tuple[Group, ...]
    """The pictures beside each run of captions."""
    wholes: tuple[Group, ...]
    """Pictures and captions together."""
    negated: bool


class Rows(NamedTuple):
    modulation: Tensor
    """[steps, n, …] the vectors of all blocks."""
    last: Tensor
    """[steps, n, D] the last norm's scale."""


@dataclass(frozen=True)
class ZImage:
    """ZImageTransformer2DModel."""

    recordable: ClassVar[bool] = True
    patches: Patches
    axes: Axes
    sinusoid: Sinusoid
    time_scale: float
    time: Embedding
    modulation: Weights
    """The layers of all blocks, which read the same embedding."""
    caption_norm: RMS
    caption: Weights
    caption_pad: Tensor
    """[1, D]"""
    picture_pad: Tensor
    """[1, D]"""
    caption_refiner: tuple[Block, ...]
    refiner: tuple[Block, ...]
    blocks: tuple[Block, ...]
    last: Weights
    """The layer that computes the last norm's scale."""
    eps: float
    proj_out: Weights

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    @property
    def multiple(self) -> int:
        """The number that divides the latents' height and width."""
        return self.patches.size

    def check(self, latents: Tensor, given: Conditions, copies: int = 1) -> None:
        """Raise Unsupported if diffusers itself would refuse a tensor, or convert it.

        Args:
            latents: [B, C, Y, X], in the weights' dtype or, in a loop, float32.
            copies: G, the number of captions for each of the latents.
        """
        weight, captions = self.proj_out.weight, given.cap_feats
        latents = latents.to(weight.dtype) if latents.dtype == torch.float32 else latents
        checked("latents", latents, weight, self.patches.channels, 4)
        whole = all(side % self.patches.size == 0 for side in latents.shape[2:])
        require(whole, f"latents of {list(latents.shape)} do not divide into patches")
        require(captions is not None and len(captions) > 0, "cap_feats is missing")
        assert captions is not None
        count = copies * latents.shape[0]
        require(len(captions) == count, f"{len(captions)} captions for {count} predictions")
        for caption in captions:
            checked("a caption", caption, weight, self.caption.weight.shape[1], 2)
        longest = max(padded(len(caption)) for caption in captions)
        counts = self.patches.counts(latents.shape[2:])
        most = (longest + 2, *counts)
        require(
            all(n <= length for n, length in zip(most, self.axes.lengths, strict=True)),
            f"positions up to {most}; there are {tuple(self.axes.lengths)}",
        )

    def hoist(self, given: Conditions, timesteps: Tensor, sides: Sequence[int]) -> Hoisted:
        """Compute everything that does not depend on the latents.

        Args:
            given: accepted by `check`.
            timesteps: [steps, n], n = 1 or that of the captions; then these must be of one length.
            sides: Y and X of the latents.
        """
        captions = given.cap_feats
        assert captions is not None
        runs = [list(run) for _, run in itertools.groupby(captions, lambda text: padded(len(text)))]
        times, many = timesteps.shape[1], len(captions)
        alone = len(runs) == 1 and times > 0 and many % times == 0
        require(times == 1 or alone, f"{times} timesteps for captions of several lengths")
        device = captions[0].device
        with scope("modulation"):
            angles = timesteps.to(device) * self.time_scale
            embedded = embedded_times(self.sinusoid, self.time, angles, self.dtype, many)
            rows = project(embedded, self.modulation)
            vectors = rows.unflatten(-1, (-1, 2, len(self.picture_pad[0])))  # scale and gate
            rows = torch.stack((vectors[..., 0, :], vectors[..., 1, :].tanh()), -2).flatten(-3)
            last = project(F.silu(embedded), self.last)
        counts = self.patches.counts(sides)
        tokens = counts[0] * counts[1]
        missing = padded(tokens) - tokens
        with scope("text"):
            told = tuple(self._refined(run) for run in runs)
        pictures, wholes = [], []
        for caption in told:
            own = self.axes.picture(caption.shape[1] + 1, counts, missing, device)
            text = self.axes.caption(caption.shape[1], device)
            pictures.append(Group(len(caption), *own))
            wholes.append(Group(len(caption), *map(torch.cat, zip(own, text, strict=True))))
        pad = self.picture_pad.expand(many, missing, -1).contiguous() if missing else None
        constants = Constants(told, pad, tuple(pictures), tuple(wholes), given.negated)
        return Hoisted(Rows(rows, last), constants)

    def _refined(self, run: Sequence[Tensor]) -> Tensor:
        """Captions [T, D'] of one padded length -> [b, T', D]."""
        h, _ = self.caption_norm(torch.cat(list(run))[None])
        h = project(h, self.caption)[0]
        length = padded(len(run[0]))
        rows = [
            torch.cat((part, self.caption_pad.expand(length - len(part), -1)))
            for part in h.split([len(text) for text in run])
        ]
        x, group = Pending(torch.stack(rows)), Group(len(run), *self.axes.caption(length, h.device))
        for block in self.caption_refiner:
            x = block(x, (group,), None)
        return _closed(x)

    def pack(self, latents: Tensor) -> Tensor:
        """[B, C, Y, X] -> [B, L, p·p·C]."""
        return self.patches.pack(latents)

    def predict(self, x: Tensor, row: Rows, constants: Constants) -> Tensor:
        """The part that every step repeats: [B, L, p·p·C] -> [G·B, L, p·p·C]."""
        pictures, wholes = constants.pictures, constants.wholes
        count, tokens = sum(group.many for group in pictures), x.shape[1]
        with scope("patches"):
            x = repeated(x, count)
            x = linear(x, self.patches.embed.weight, self.patches.embed.bias)
            if constants.pad is not None:
                x = joined(x, constants.pad)
        state = Pending(_laid(x, pictures))
        vectors = row.modulation.expand(len(state.branch), -1)
        for i, block in enumerate(self.refiner):
            with scope(f"refiner {i}"):
                state = block(state, pictures, vectors)
        with scope("join"):
            x = _closed(state).view(count, -1, x.shape[-1])
            starts = itertools.accumulate((group.many for group in pictures), initial=0)
            both = [
                joined(x[at : at + len(text)], text).flatten(0, 1)
                for at, text in zip(starts, constants.captions, strict=False)
            ]
            state = Pending(_laid(chained(both), wholes))
        for i, block in enumerate(self.blocks):
            with scope(f"block {i}"):
                state = block(state, wholes, vectors)
        with scope("out"):
            scale = row.last.expand(len(state.branch), -1)
            h, _ = ada_norm(
                *(state.branch, self.eps), scale=scale, gate=state.gate, residual=state.total
            )
            h = linear(h, self.proj_out.weight, self.proj_out.bias).flatten(0, 1)
            h = chained([cut(part, 0, tokens) for part in _parts(h, wholes)])
            return residual(h, scale=-1.0) if constants.negated else h

    def unpack(self, x: Tensor, sides: Sequence[int]) -> Tensor:
        """[B, L, p·p·C] -> [B, C, Y, X]."""
        return self.patches.unpack(x, sides)


def padded(tokens: int) -> int:
    """The number of tokens that diffusers pads this many tokens to."""
    return -(-tokens // MULTIPLE) * MULTIPLE


def _laid(x: Tensor, groups: tuple[Group, ...]) -> Tensor:
    """All tokens […, D] as blocks take them: [b, S, D] of one group, [1, N, D] of several."""
    rows = groups[0].many if len(groups) == 1 else 1
    return x.reshape(rows, -1, x.shape[-1])


def _parts(flat: Tensor, groups: tuple[Group, ...]) -> list[Tensor]:
    """All tokens [N, D] as the sequences [b, S, D] of each group."""
    sizes = [group.many * len(group.cos) for group in groups]
    parts = zip(flat.split(sizes), groups, strict=True)
    return [part.unflatten(0, (group.many, -1)) for part, group in parts]


def _closed(x: Pending) -> Tensor:
    return x.branch if x.total is None else residual(x.total, x.branch, gate=x.gate)


def borrow_zimage(module: Any, loan: Loan) -> ZImage:
    """Borrow a ZImageTransformer2DModel's weights; raises Unsupported for other structures."""
    net, rows = loan.open(module, "ZImageTransformer2DModel"), Columns(loan)
    require(net.siglip_embedder is None, "a Z-Image that takes reference pictures (SigLIP)")
    size, frames = net.all_patch_size, net.all_f_patch_size
    require(len(size) == 1 and tuple(frames) == (1,), f"patches of {size} over {frames} frames")
    embeds, finals, key = net.all_x_embedder, net.all_final_layer, f"{size[0]}-1"
    for held in (embeds, finals):
        loan.open(held, nn.ModuleDict)
        require([*held] == [key], f"layers for patches of {[*held]}")
    width, final = net.dim, loan.open(finals[key], "FinalLayer")
    refiner, blocks = (
        tuple(borrow_block(block, loan, rows, width) for block in loan.each(layers))
        for layers in (net.noise_refiner, net.layers)
    )
    captions = tuple(
        borrow_block(block, loan, None, width) for block in loan.each(net.context_refiner)
    )
    require(len(blocks) > 0, "a Z-Image without blocks")
    caption_norm, caption = loan.each(net.cap_embedder, 2)
    silu, last = loan.each(final.adaLN_modulation, 2)
    loan.silu(silu)
    embedder = loan.open(net.t_embedder, "TimestepEmbedder")
    first, act, second = loan.each(embedder.mlp, 3)
    loan.silu(act)
    wide = loan.width(caption)
    require(wide == width, f"captions of {wide} columns in a network of {width}")
    patches = Patches(size[0], loan.linear(embeds[key]))
    zimage = ZImage(
        patches=patches,
        axes=borrow_axes(net.rope_embedder, loan, width // blocks[0].heads),
        sinusoid=Sinusoid(embedder.frequency_embedding_size, True, 0.0),
        time_scale=net.t_scale,
        time=Embedding(loan.linear(first), loan.linear(second), None),
        modulation=loan.linear(*rows.layers, hoisted=True),
        caption_norm=borrow_rms(caption_norm, loan, caption.weight.shape[1]),
        caption=loan.linear(caption, hoisted=True),
        caption_pad=loan.parameter(net.cap_pad_token),
        picture_pad=loan.parameter(net.x_pad_token),
        caption_refiner=captions,
        refiner=refiner,
        blocks=blocks,
        last=loan.linear(last, hoisted=True),
        eps=loan.bare_norm(final.norm_final, width),
        proj_out=loan.linear(final.linear),
    )
    out = zimage.proj_out.weight.shape[0]
    require(out == net.out_channels * size[0] ** 2, f"a last layer of {out} columns")
    loan.seal()
    return zimage
