"""What the transformers of FLUX.1 and FLUX.2 share with their ControlNets: two streams, then one.

Latents come packed as tokens [B, L, C]. In the first blocks picture and text are two streams that
attend to each other; then they are one, the text first, in blocks whose attention and MLP run side
by side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.concat import concat
from fastdiff.kernels.linear import linear
from fastdiff.kernels.observe import scope
from fastdiff.kernels.where import on_gpu
from fastdiff.models.blocks import repeated, require
from fastdiff.models.borrow import Weights
from fastdiff.models.checks import check_count, check_times, checked
from fastdiff.models.flux_blocks import Single
from fastdiff.models.joint import JointBlock, Modulated
from fastdiff.models.rotary import Rotary, Turns
from fastdiff.models.stream import Stream

LIMIT = 65504.0
"""The largest number of float16, at which diffusers clips the streams in that dtype."""


class Constants(NamedTuple):
    text: Tensor
    """[G·B, T, D]"""
    turns: Turns
    """Rotations of the text's tokens, then of the picture's."""
    made: Tensor | None = None
    """[G·B, L, D] the embedding's output for the constant channels, with its bias."""
    tokens: Tensor | None = None
    """[G·B, L', D] the constant tokens, embedded."""
    controls: tuple[Tensor, ...] = ()
    """[G·B, L, D] for each of the first blocks, or none."""
    single_controls: tuple[Tensor, ...] = ()
    """[G·B, T + L, D] for each of the others, or none."""
    images: tuple[Tensor, ...] = ()
    """For each IP-Adapter [G·B, tokens, blocks·2·D]: keys and scaled values for the first blocks;
    no tokens if all its scales are 0."""


@dataclass(frozen=True)
class FluxBlocks:
    """All but the end of the networks."""

    recordable: ClassVar[bool] = True
    embed: Weights
    rotary: Rotary
    modulation: Weights
    """The linear layers of all norms, which read the same embedding."""
    context: Weights
    blocks: tuple[JointBlock, ...]
    singles: tuple[Single, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def channels(self) -> int:
        """Channels of its input."""
        return self.embed.weight.shape[1]

    def check_trunk(
        self,
        latents: Tensor,
        text: Tensor | None,
        copies: int,
        channels: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> tuple[int, int]:
        """Raise Unsupported if diffusers itself would refuse a tensor, or convert it.

        Args:
            latents: [B, L, C].
            text: [G·B, T, D'].
            copies: G.
            channels, tokens: the constant ones.

        Returns:
            How many tokens the picture and the text have.
        """
        weight, constant = self.embed.weight, 0 if channels is None else channels.shape[-1]
        checked("hidden_states", latents, weight, self.channels - constant, 3)
        count = own = latents.shape[1]
        if channels is not None:
            checked("the constant channels", channels, weight, constant, 3)
            fits = len(channels) in (len(latents), copies * len(latents))
            require(
                fits and channels.shape[1] == own,
                f"constant channels of the shape {list(channels.shape)}",
            )
        if tokens is not None:
            checked("the constant tokens", tokens, weight, self.channels, 3)
            check_count("the constant tokens", tokens, latents, 1)
            count += tokens.shape[1]
        text = checked("encoder_hidden_states", text, weight, self.context.weight.shape[1], 3)
        check_count("encoder_hidden_states", text, latents, copies)
        return count, text.shape[1]

    def in_thousands(self, timesteps: Tensor, text: Tensor) -> Tensor:
        """[steps, n] of thousandths of timesteps for the texts; n is 1 or divides their number.

        diffusers rounds them to its own dtype before it embeds them.
        """
        check_times(timesteps, len(text))
        return timesteps.to(text.device).to(self.dtype) * 1000

    def constants(
        self, text: Tensor, turns: Turns, channels: Tensor | None, tokens: Tensor | None
    ) -> Constants:
        """The constants of a picture without a ControlNet; arguments as for `check_trunk`."""
        with scope("text"):
            told = linear(text.contiguous(), self.context.weight, self.context.bias)
        weight, bias, count = self.embed.weight, self.embed.bias, len(text)
        if channels is not None:
            others = weight[:, -channels.shape[-1] :]
            channels = repeated(linear(channels.contiguous(), others, bias), count)
        if tokens is not None:
            tokens = repeated(linear(tokens.contiguous(), weight, bias), count)
        return Constants(told, turns, channels, tokens)

    def pack(self, latents: Tensor) -> Tensor:
        return latents.contiguous()

    def unpack(self, x: Tensor, sides: Sequence[int]) -> Tensor:
        return x

    def streams(self, x: Tensor, row: Tensor, constants: Constants) -> Iterator[Stream]:
        """The picture [G·B, L, D] after each of the first blocks, then text and picture
        [G·B, T + L, D] after each of the others."""
        told, limit = constants.text, LIMIT if x.dtype == torch.float16 else 0.0
        row, width = row.expand(len(told), -1), told.shape[-1]
        picture, text = self._embed(repeated(x, len(told)), constants), Stream(told)
        text_turns, turns = constants.turns.cut(told.shape[1])
        for i, block in enumerate(self.blocks):
            with scope(f"block {i}"):
                images = [
                    image[..., 2 * i * width : 2 * (i + 1) * width]
                    for image in constants.images
                    if image.shape[1] > 0
                ]
                picture, last = block(
                    picture, text, row, turns=(turns, text_turns), pictures=images
                )
                assert last is not None
                text = last.limited(limit)
                if constants.controls:
                    picture = picture.plus(constants.controls[i])
            yield picture
        with scope("join"):
            whole = Stream(joined(text.closed(), picture.closed()))
        for i, single in enumerate(self.singles):
            with scope(f"single {i}"):
                whole = single(whole, row, constants.turns).limited(limit)
                if constants.single_controls:
                    whole = whole.plus(constants.single_controls[i])
            yield whole

    def _embed(self, x: Tensor, constants: Constants) -> Stream:
        with scope("patches"):
            weight, bias = self.embed.weight, self.embed.bias
            if constants.made is not None:
                return Stream(linear(x, weight[:, : x.shape[-1]]), total=constants.made)
            x = linear(x, weight, bias)
            return Stream(x if constants.tokens is None else joined(x, constants.tokens))


@dataclass(frozen=True)
class FluxTrunk(FluxBlocks):
    """What the transformers have in common."""

    norm_out: Modulated
    proj_out: Weights

    def predict(self, x: Tensor, row: Tensor, constants: Constants) -> Tensor:
        """The part that every step repeats: [B, L, C] -> [G·B, L, C']."""
        *_, whole = self.streams(x, row, constants)
        count, tokens, _ = constants.text.shape
        with scope("out"):
            scale, shift = self.norm_out.vectors(row.expand(count, -1))
            h = whole.normed(self.norm_out.eps, shift, scale)
            h = cut(h, tokens, tokens + x.shape[1])
            return linear(h, self.proj_out.weight, self.proj_out.bias)


def joined(text: Tensor, picture: Tensor) -> Tensor:
    """[B, T, D] and [B, L, D] -> [B, T + L, D]."""
    joined: Tensor = concat(text.flatten(1), picture.flatten(1))
    return joined.view(len(text), -1, text.shape[-1])


def cut(x: Tensor, start: int, end: int) -> Tensor:
    """Tokens of x [B, L, D], contiguous; on a CPU by our own kernels alone."""
    if len(x) == 1 or on_gpu(x):
        return x[:, start:end].contiguous()
    rows: Tensor = reduce(concat, [sample[start:end].reshape(1, -1) for sample in x])
    return rows.view(len(x), end - start, -1)
