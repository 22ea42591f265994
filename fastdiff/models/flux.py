"""FLUX's denoising transformer on borrowed weights.

Latents come packed as tokens [B, L, C]. In the first blocks picture and text are two streams that
attend to each other; then they are one, the text first, in blocks whose attention and MLP run side
by side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.concat import concat
from fastdiff.kernels.linear import linear
from fastdiff.kernels.observe import scope
from fastdiff.kernels.where import on_gpu
from fastdiff.models.blocks import Columns, repeated, require
from fastdiff.models.borrow import Loan, Weights
from fastdiff.models.checks import check_count, checked
from fastdiff.models.embeddings import TimeText, borrow_time_text
from fastdiff.models.flux_blocks import SingleBlock, borrow_flux_block, borrow_single_block
from fastdiff.models.hoisted import Hoisted
from fastdiff.models.joint import JointBlock, Modulated, borrow_modulated
from fastdiff.models.rotary import Rotary, Turns, borrow_rotary, check_positions
from fastdiff.models.stream import Stream
from fastdiff.models.weights import project
from fastdiff.tables import plural

LIMIT = 65504.0
"""The largest number of float16, at which diffusers clips the streams in that dtype."""


class Conditions(NamedTuple):
    """The network's inputs besides latents and timesteps. G: 2 with guidance, unconditional
    first."""

    encoder_hidden_states: Tensor | None
    """[G·B, T, D'] text."""
    pooled_projections: Tensor | None
    """[G·B, D''] pooled text."""
    img_ids: Tensor | None
    """[L, axes] positions of the picture's tokens."""
    txt_ids: Tensor | None
    """[T, axes] positions of the text's tokens."""
    guidance: Tensor | None = None
    """[B] the distilled guidance, if the network is told one."""
    controlnet_block_samples: Sequence[Tensor] | None = None
    """[G·B, L, D] each: a ControlNet's residuals for the first blocks."""
    controlnet_single_block_samples: Sequence[Tensor] | None = None
    """[G·B, L, D] each, for the others."""
    controlnet_blocks_repeat: bool = False
    """Whether the first blocks take their residuals in turn, not in groups."""
    constant_channels: Tensor | None = None
    """[n, L, C''] channels that follow the latents' and stay the same in all steps; n is B or
    G·B."""
    constant_tokens: Tensor | None = None
    """[B, L', C] tokens that follow the latents' and stay the same in all steps; nothing is
    predicted for them."""


class Constants(NamedTuple):
    text: Tensor
    """[G·B, T, D]"""
    turns: Turns
    """Of the text's tokens and then the picture's."""
    made: Tensor | None = None
    """[G·B, L, D] what the embedding makes of the constant channels, with its bias."""
    tokens: Tensor | None = None
    """[G·B, L', D] the constant tokens, embedded."""
    controls: tuple[Tensor, ...] = ()
    """[G·B, L, D] for each of the first blocks, or none."""
    single_controls: tuple[Tensor, ...] = ()
    """[G·B, T + L, D] for each of the others, or none."""


@dataclass(frozen=True)
class Flux:
    """FluxTransformer2DModel."""

    recordable: ClassVar[bool] = True
    embed: Weights
    rotary: Rotary
    time_text: TimeText
    modulation: Weights
    """The linear layers of all norms, which read the same embedding."""
    context: Weights
    blocks: tuple[JointBlock, ...]
    singles: tuple[SingleBlock, ...]
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
            copies: G, the number of texts for each of the latents.
        """
        weight, more = self.proj_out.weight, given.constant_tokens
        channels = given.constant_channels
        constant = 0 if channels is None else channels.shape[-1]
        checked("hidden_states", latents, weight, self.channels - constant, 3)
        own = tokens = latents.shape[1]
        if channels is not None:
            checked("the constant channels", channels, weight, constant, 3)
            fits = channels.shape[1] == own and len(channels) in (
                len(latents),
                copies * len(latents),
            )
            require(fits, f"constant channels of the shape {list(channels.shape)}")
        if more is not None:
            checked("the constant tokens", more, weight, self.channels, 3)
            check_count("the constant tokens", more, latents, 1)
            tokens += more.shape[1]
        text = given.encoder_hidden_states
        text = checked("encoder_hidden_states", text, weight, self.context.weight.shape[1], 3)
        wide = self.time_text.text.first.weight.shape[1]
        pooled = checked("pooled_projections", given.pooled_projections, weight, wide, 2)
        for name, told in (("encoder_hidden_states", text), ("pooled_projections", pooled)):
            check_count(name, told, latents, copies)
        check_positions("img_ids", given.img_ids, weight, tokens, self.rotary)
        check_positions("txt_ids", given.txt_ids, weight, text.shape[1], self.rotary)
        takes, guidance = self.time_text.guidance is not None, given.guidance
        require(takes == (guidance is not None), "guidance is missing, or not taken")
        if guidance is not None:
            fits = guidance.ndim == 1 and len(guidance) in (1, len(latents))
            require(fits, f"guidance has the shape {list(guidance.shape)}")
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            controls = getattr(given, name)
            require(controls is None or len(controls) > 0, f"{name} is empty")
            for control in controls or ():
                checked(f"one of {name}", control, weight, self.embed.weight.shape[0], 3)
                check_count(f"one of {name}", control, latents, copies)
                require(control.shape[1] == own and more is None, f"{name} of other tokens")

    def hoist(self, given: Conditions, timesteps: Tensor, sides: Sequence[int]) -> Hoisted:
        """Compute everything that does not depend on the latents.

        Args:
            given: accepted by `check`.
            timesteps: [steps, n], n = 1 or B: thousandths of timesteps.
            sides: not used.
        """
        text, pooled, guidance = given.encoder_hidden_states, given.pooled_projections, None
        assert text is not None
        assert pooled is not None
        assert given.txt_ids is not None
        assert given.img_ids is not None
        count, times = text.shape[0], timesteps.shape[1]
        many = times > 0 and count % times == 0
        require(many, f"{plural(times, 'timestep')} for {plural(count, 'text')}")
        with scope("modulation"):
            # diffusers rounds both to its own dtype before it embeds them
            timesteps = timesteps.to(text.device).to(self.dtype) * 1000
            if given.guidance is not None:
                guidance = given.guidance.to(self.dtype) * 1000
            embedded = F.silu(self.time_text(timesteps, pooled, guidance))
            rows = project(embedded, self.modulation)
        with scope("text"):
            told = linear(text.contiguous(), self.context.weight, self.context.bias)
        made, more = given.constant_channels, given.constant_tokens
        if made is not None:
            others = self.embed.weight[:, -made.shape[-1] :]
            made = repeated(linear(made.contiguous(), others, self.embed.bias), count)
        if more is not None:
            more = repeated(linear(more.contiguous(), self.embed.weight, self.embed.bias), count)
        turns = self.rotary(torch.cat((given.txt_ids, given.img_ids)))
        controls = self._controls(given, text.shape[1])
        return Hoisted(rows, Constants(told, turns, made, more, *controls))

    def _controls(self, given: Conditions, text: int) -> tuple[tuple[Tensor, ...], ...]:
        """The residuals of all blocks; `text`: its tokens."""
        first, others = given.controlnet_block_samples, given.controlnet_single_block_samples
        made: tuple[Tensor, ...] = ()
        if first is not None and given.controlnet_blocks_repeat:
            made = tuple(first[i % len(first)] for i in range(len(self.blocks)))
        elif first is not None:
            made = _in_groups(first, len(self.blocks))
        padded = [F.pad(control, (0, 0, text, 0)) for control in others or ()]
        return made, _in_groups(padded, len(self.singles)) if padded else ()

    def pack(self, latents: Tensor) -> Tensor:
        return latents.contiguous()

    def unpack(self, x: Tensor, sides: Sequence[int]) -> Tensor:
        return x

    def predict(self, x: Tensor, row: Tensor, constants: Constants) -> Tensor:
        """The part that every step repeats: [B, L, C] -> [G·B, L, C']."""
        told, limit = constants.text, LIMIT if x.dtype == torch.float16 else 0.0
        tokens, own = told.shape[1], x.shape[1]
        picture, text = self._embed(repeated(x, told.shape[0]), constants), Stream(told)
        text_turns, turns = constants.turns.cut(tokens)
        for i, block in enumerate(self.blocks):
            with scope(f"block {i}"):
                picture, last = block(picture, text, row, turns=(turns, text_turns))
                assert last is not None
                text = last.limited(limit)
                if constants.controls:
                    picture = picture.plus(constants.controls[i])
        with scope("join"):
            whole = Stream(_joined(text.closed(), picture.closed()))
        for i, single in enumerate(self.singles):
            with scope(f"single {i}"):
                whole = single(whole, row, constants.turns).limited(limit)
                if constants.single_controls:
                    whole = whole.plus(constants.single_controls[i])
        with scope("out"):
            scale, shift = self.norm_out.vectors(row)
            h = _cut(whole.normed(self.norm_out.eps, shift, scale), tokens, tokens + own)
            return linear(h, self.proj_out.weight, self.proj_out.bias)

    def _embed(self, x: Tensor, constants: Constants) -> Stream:
        with scope("patches"):
            weight, bias = self.embed.weight, self.embed.bias
            if constants.made is not None:
                return Stream(linear(x, weight[:, : x.shape[-1]]), total=constants.made)
            x = linear(x, weight, bias)
            return Stream(x if constants.tokens is None else _joined(x, constants.tokens))


def _joined(text: Tensor, picture: Tensor) -> Tensor:
    """[B, T, D] and [B, L, D] -> [B, T + L, D]."""
    joined: Tensor = concat(text.flatten(1), picture.flatten(1))
    return joined.view(len(text), -1, text.shape[-1])


def _cut(x: Tensor, start: int, end: int) -> Tensor:
    """Tokens of x [B, L, D], contiguous; on a CPU by our own kernels alone."""
    if len(x) == 1 or on_gpu(x):
        return x[:, start:end].contiguous()
    rows: Tensor = reduce(concat, [sample[start:end].reshape(1, -1) for sample in x])
    return rows.view(len(x), end - start, -1)


def _in_groups(controls: Sequence[Tensor], blocks: int) -> tuple[Tensor, ...]:
    """One for each block: as many blocks in turn as possible share one."""
    each = math.ceil(blocks / len(controls))
    return tuple(controls[i // each] for i in range(blocks))


def borrow_flux(module: Any, loan: Loan) -> Flux:
    """Borrow a FluxTransformer2DModel's weights; raises Unsupported for other structures."""
    net, rows = loan.open(module, "FluxTransformer2DModel"), Columns(loan)
    width = net.inner_dim
    blocks = tuple(
        borrow_flux_block(block, loan, rows, width) for block in loan.each(net.transformer_blocks)
    )
    singles = tuple(
        borrow_single_block(block, loan, rows, width)
        for block in loan.each(net.single_transformer_blocks)
    )
    require(len(blocks) > 0 and len(singles) > 0, "a FLUX without blocks of both kinds")
    norm_out = borrow_modulated(net.norm_out, loan, rows, width, "AdaLayerNormContinuous")
    head = width // singles[0].heads
    flux = Flux(
        embed=loan.linear(net.x_embedder),
        rotary=borrow_rotary(net.pos_embed, loan, head),
        time_text=borrow_time_text(net.time_text_embed, loan),
        modulation=loan.linear(*rows.layers, hoisted=True),
        context=loan.linear(net.context_embedder),
        blocks=blocks,
        singles=singles,
        norm_out=norm_out,
        proj_out=loan.linear(net.proj_out),
    )
    loan.seal()
    return flux
