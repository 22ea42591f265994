"""Qwen-Image's denoising transformer on borrowed weights: picture and text are two streams that
attend to each other.

Latents come packed as tokens [B, L, C]. The vectors of all norms depend on the timestep alone: a
third of the weights leave the loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.linear import linear
from fastdiff.kernels.observe import scope
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
from fastdiff.models.joint import JointBlock, Modulated, borrow_modulated
from fastdiff.models.qwen_block import borrow_block
from fastdiff.models.qwen_turns import Places, Shapes, borrow_places
from fastdiff.models.rotary import Turns
from fastdiff.models.stream import Stream
from fastdiff.models.weights import project
from fastdiff.models.zimage_block import RMS, borrow_rms

LIMIT = 65504.0
"""The largest number of float16, at which diffusers clips the streams in that dtype."""
HIDDEN = -10000.0
"""Added to the scores of a token that is never attended to."""


class Conditions(NamedTuple):
    """The network's inputs besides latents and timesteps. With true guidance the network itself
    combines two predictions into one, as the pipeline does."""

    encoder_hidden_states: Tensor | None
    """[B, T, D'] text."""
    encoder_hidden_states_mask: Tensor | None = None
    """[B, T]: not 0 for the tokens to attend to."""
    img_shapes: Shapes | None = None
    """For each picture: frames, rows and columns of its tokens."""
    negative: Tensor | None = None
    """[B, T2, D'] the other text of true guidance."""
    negative_mask: Tensor | None = None
    """[B, T2]"""
    true_cfg_scale: float | None = None
    do_true_cfg: bool | None = None


class Constants(NamedTuple):
    text: Tensor
    """[N, T', D]; N is B, or 2·B with true guidance: the negative text last."""
    text_bias: Tensor | None
    """[N, T'] float32, added to the scores of their keys."""
    turns: tuple[Turns, Turns]
    """Rotations of the picture's tokens and of the text's."""
    scale: Tensor | None
    """[] float32: that of true guidance."""


@dataclass(frozen=True)
class Qwen:
    """QwenImageTransformer2DModel."""

    recordable: ClassVar[bool] = True
    embed: Weights
    places: Places
    sinusoid: Sinusoid
    time: Embedding
    modulation: Weights
    """The linear layers of all norms, which read the same embedding."""
    text_norm: RMS
    context: Weights
    blocks: tuple[JointBlock, ...]
    norm_out: Modulated
    proj_out: Weights

    @property
    def dtype(self) -> torch.dtype:
        return self.proj_out.weight.dtype

    @property
    def channels(self) -> int:
        """Channels of its input."""
        return self.embed.weight.shape[1]

    def check(self, latents: Tensor, given: Conditions, copies: int = 1) -> None:
        """Raise Unsupported if diffusers itself would refuse a tensor, or convert it.

        Args:
            latents: [B, L, C].
            copies: 1.
        """
        weight = self.proj_out.weight
        checked("hidden_states", latents, weight, self.channels, 3)
        told = [("encoder_hidden_states", *given[:2])]
        if given.do_true_cfg:
            told.append(("negative_prompt_embeds", given.negative, given.negative_mask))
        longest = 0
        for name, text, mask in told:
            text = checked(name, text, weight, self.context.weight.shape[1], 3)
            check_count(name, text, latents, copies)
            right = mask is None or (mask.shape == text.shape[:2] and mask.device == text.device)
            require(right, f"the mask of {name} has another shape, or is on another device")
            longest = max(longest, text.shape[1])
        shapes = given.img_shapes
        require(shapes is not None and len(shapes) > 0, "img_shapes is missing")
        assert shapes is not None
        self.places.check(shapes, latents.shape[1], longest)

    def hoist(self, given: Conditions, timesteps: Tensor, sides: Sequence[int]) -> Hoisted:
        """Compute everything that does not depend on the latents.

        Args:
            given: accepted by `check`.
            timesteps: [steps, n], n = 1 or B: a thousandth of a timestep for each picture.
            sides: not used.
        """
        text, shapes = given.encoder_hidden_states, given.img_shapes
        assert text is not None
        assert shapes is not None
        with scope("text"):
            states, bias = _trimmed([(text, given.encoder_hidden_states_mask)])
            if given.do_true_cfg:
                assert given.negative is not None
                both = [(text, given.encoder_hidden_states_mask)]
                states, bias = _trimmed([*both, (given.negative, given.negative_mask)])
            told, _ = self.text_norm(states.contiguous())
            told = project(told, self.context)
        many = len(told)
        check_times(timesteps, many)
        with scope("modulation"):
            # diffusers rounds timesteps to its dtype before it embeds them
            timesteps = timesteps.to(text.device).to(self.dtype)
            embedded = embedded_times(self.sinusoid, self.time, timesteps, self.dtype, many)
            rows = project(F.silu(embedded), self.modulation)
        turns = self.places(shapes, told.shape[1], text.device)
        scale = None
        if given.do_true_cfg:
            scale = torch.tensor(given.true_cfg_scale, dtype=torch.float32, device=text.device)
        return Hoisted(rows, Constants(told, bias, turns, scale))

    def pack(self, latents: Tensor) -> Tensor:
        return latents.contiguous()

    def unpack(self, x: Tensor, sides: Sequence[int]) -> Tensor:
        return x

    def predict(self, x: Tensor, row: Tensor, constants: Constants) -> Tensor:
        """The part that every step repeats: [B, L, C] -> [B, L, C']."""
        told, limit = constants.text, LIMIT if x.dtype == torch.float16 else 0.0
        vectors = row.expand(len(told), -1)
        with scope("patches"):
            x = repeated(x, len(told))
            picture = Stream(linear(x, self.embed.weight, self.embed.bias))
        text: Stream | None = Stream(told)
        for i, block in enumerate(self.blocks):
            with scope(f"block {i}"):
                bias = constants.text_bias
                picture, text = block(picture, text, vectors, bias, turns=constants.turns)
                assert text is not None
                picture, text = picture.limited(limit), text.limited(limit)
        with scope("out"):
            scale, shift = self.norm_out.vectors(vectors)
            h = picture.normed(self.norm_out.eps, shift, scale)
            made = linear(h, self.proj_out.weight, self.proj_out.bias)
            return made if constants.scale is None else _guided(made, constants.scale)


def _guided(both: Tensor, scale: Tensor) -> Tensor:
    """Guidance that rescales every token to its length in the prediction with the text:
    [2·B, L, C] -> [B, L, C]."""
    first, second = both.float().chunk(2)
    far = torch.lerp(second, first, scale)
    norms = (torch.linalg.vector_norm(part, dim=-1, keepdim=True) for part in (first, far))
    return (far * torch.div(*norms)).to(both.dtype)


def _trimmed(told: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Texts [B, T, D'] with masks [B, T], concatenated, without the tokens at the end that are
    never attended to; and the bias of their scores, if a hidden token is left."""
    used = []
    for text, mask in told:
        all_of = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        used.append(all_of if mask is None else mask.bool())
    longest = max(text.shape[1] for text, _ in told)
    seen = torch.cat([F.pad(one, (0, longest - one.shape[1])) for one in used])
    states = torch.cat([F.pad(text, (0, 0, 0, longest - text.shape[1])) for text, _ in told])
    if seen.is_meta or bool(seen.all()):
        return states, None
    kept = max(1, int(seen.any(0).nonzero().max()) + 1) if bool(seen.any()) else longest
    seen = seen[:, :kept]
    bias = torch.where(seen, 0.0, HIDDEN).float().contiguous()
    return states[:, :kept], None if bool(seen.all()) else bias


def borrow_qwen(module: Any, loan: Loan) -> Qwen:
    """Borrow a QwenImageTransformer2DModel's weights; raises Unsupported for other structures."""
    net, rows = loan.open(module, "QwenImageTransformer2DModel"), Columns(loan)
    width = net.inner_dim
    require(not net.zero_cond_t, "reference pictures with another timestep")
    blocks = tuple(
        borrow_block(block, loan, rows, width) for block in loan.each(net.transformer_blocks)
    )
    require(len(blocks) > 0, "a Qwen-Image without blocks")
    norm_out = borrow_modulated(net.norm_out, loan, rows, width, "AdaLayerNormContinuous")
    embed = loan.open(net.time_text_embed, "QwenTimestepProjEmbeddings")
    require(not embed.use_additional_t_cond, "an embedding beside the timestep's")
    time = borrow_embedding(embed.timestep_embedder, loan)
    require(time.condition is None, "a time embedding with a condition")
    context = loan.linear(net.txt_in, hoisted=True)
    qwen = Qwen(
        embed=loan.linear(net.img_in),
        places=borrow_places(net.pos_embed, loan, width // blocks[0].attention.heads),
        sinusoid=borrow_sinusoid(embed.time_proj, loan),
        time=time,
        modulation=loan.linear(*rows.layers, hoisted=True),
        text_norm=borrow_rms(net.txt_norm, loan, context.weight.shape[1]),
        context=context,
        blocks=blocks,
        norm_out=norm_out,
        proj_out=loan.linear(net.proj_out),
    )
    loan.seal()
    return qwen
