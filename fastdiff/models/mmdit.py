"""The denoising transformer (MM-DiT) of SD3 and SD3.5, on borrowed weights.

Latents become patches [B, L, p·p·C]; a patch is ordered (p, q, C): rows, columns, channels.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from fastdiff.kernels.linear import linear
from fastdiff.kernels.observe import scope
from fastdiff.models.blocks import Columns, require
from fastdiff.models.borrow import Loan, Unsupported, Weights
from fastdiff.models.checks import check_count, checked
from fastdiff.models.hoisted import Hoisted
from fastdiff.models.joint import Modulated, borrow_joint_block, borrow_modulated
from fastdiff.models.joint_attention import PERTURBING, Image
from fastdiff.models.joint_trunk import JointTrunk, borrow_joint_trunk
from fastdiff.models.mmdit_ip import JointIPAdapter, borrow_joint_ip_adapter
from fastdiff.models.perturbed import Perturbed, perturbed_of
from fastdiff.models.stream import Stream, Streams
from fastdiff.models.switches import Switch


class Conditions(NamedTuple):
    """The network's inputs besides latents and timesteps. G: 2 with guidance, unconditional
    first."""

    encoder_hidden_states: Tensor | None
    """[G·B, T, D'] text."""
    pooled_projections: Tensor | None
    """[G·B, D''] pooled text."""
    block_controlnet_hidden_states: Sequence[Tensor] | None = None
    """[G·B, L, D] each: a ControlNet's residuals."""
    skip_layers: Sequence[int] | None = None
    """Blocks to leave out."""
    ip_adapter_image_embeds: Tensor | None = None
    """[G·B, tokens, D'''] image embeddings from `joint_attention_kwargs`."""
    last_skip_layers: Sequence[int] | None = None
    """Blocks that the last of three predictions leaves out (skip-layer guidance)."""
    repeats: bool | None = None
    """Whether the last predictions have the same conditions as those before them."""


class Rows(NamedTuple):
    modulation: Tensor
    """[steps, G·B, ...] the vectors of every norm."""
    images: tuple[Tensor | None, ...] = ()
    """For every attention [steps, G·B, tokens, 2·D]: an IP-Adapter's keys and values; None if its
    scale is 0."""


class Constants(NamedTuple):
    text: Tensor
    """[G·B, T, D]"""
    text_bias: Tensor | None
    """[T] float32, added to the scores of the text's keys; see `alike`."""
    position: Tensor | None
    """[1, L, D]"""
    image_scales: Tensor | None = None
    """[attentions, D]: the IP-Adapter's scale of each attention, repeated D times."""
    controls: tuple[Tensor, ...] = ()
    skip_layers: tuple[int, ...] = ()
    perturbed: Perturbed | None = None
    skipped: Perturbed | None = None
    """The blocks that the last part of the batch leaves out."""


@dataclass(frozen=True)
class MMDiT(JointTrunk):
    """SD3Transformer2DModel."""

    recordable: ClassVar[bool] = True
    own_steps: ClassVar[bool] = True
    norm_out: Modulated
    proj_out: Weights
    ip_adapter: JointIPAdapter | None
    switches: tuple[Switch, ...]
    """The attention processors of all blocks; none with an IP-Adapter."""

    def check(self, latents: Tensor, conditions: Conditions, copies: int = 1) -> None:
        """Raise Unsupported if diffusers itself would refuse a tensor, or convert it.

        Args:
            latents: [B, C, Y, X].
            copies: G, the number of texts for each of the latents.
        """
        text, pooled, controls, _, image, *_ = conditions
        self.check_trunk(latents, text, pooled, copies)
        weight = self.like
        if controls is not None:
            require(len(controls) > 0, "block_controlnet_hidden_states is empty")
            assert self.patches is not None
            tokens = math.prod(self.patches.counts(latents.shape[2:]))
            for control in controls:
                checked("a ControlNet's residual", control, weight, self.width, 3)
                check_count("a ControlNet's residual", control, latents, copies)
                require(
                    control.shape[1] == tokens,
                    f"a ControlNet's residual has {control.shape[1]} tokens, not {tokens}",
                )
        if image is not None:
            if self.ip_adapter is None:
                raise Unsupported("image embeddings for an IP-Adapter that it does not have")
            wide = self.ip_adapter.channels
            checked("ip_adapter_image_embeds", image, weight, wide, 3)
            check_count("ip_adapter_image_embeds", image, latents, copies)

    def hoist(self, conditions: Conditions, timesteps: Tensor, sides: Sequence[int]) -> Hoisted:
        """Compute everything that does not depend on the latents.

        Args:
            conditions: accepted by `check`.
            timesteps: [steps, n], n = 1 or B: a timestep for each picture.
            sides: Y and X of the latents.
        """
        text, pooled, controls, skipped, image, last, repeats = conditions
        assert text is not None
        assert pooled is not None
        assert self.patches is not None
        images: tuple[Tensor | None, ...] = ()
        scales = None
        if image is not None and self.ip_adapter is not None:
            scales = self.ip_adapter.scales(image, self.width)
            images = self.ip_adapter.rows(image, timesteps)
        positions = None if self.positions is None else self.positions(self.patches.counts(sides))
        return Hoisted(
            Rows(self.modulations(timesteps, pooled), images),
            Constants(
                *(*self.texts(text), positions, scales),
                controls=tuple(controls or ()),
                skip_layers=tuple(skipped or ()),
                perturbed=perturbed_of(self.switches, PERTURBING, text, repeats),
                skipped=Perturbed(3, frozenset(last), bool(repeats)) if last else None,
            ),
        )

    def predict(self, x: Tensor, row: Rows, constants: Constants) -> Tensor:
        """The part that every step repeats: patches [B, L, p·p·C] -> [G·B, L, p·p·C]."""
        batch, perturbed, skipped = constants.text.shape[0], constants.perturbed, constants.skipped
        last = perturbed or skipped
        count = batch if last is None else last.first(x.shape[0], batch, batch)
        picture = self.embed(x, count, constants.position)
        part = 0 if last is None else batch // last.parts
        streams = Streams(picture, Stream(constants.text[:count]), batch, part)
        images = _images(row, constants)
        for i, block in enumerate(self.blocks):
            both = next(images), None if block.own is None else next(images)
            if i not in constants.skip_layers:
                alone = perturbed is not None and i in perturbed.layers
                if skipped is not None and i in skipped.layers:
                    streams.leave_last()
                elif alone or streams.waits:
                    streams.whole()
                with scope(f"block {i}"):
                    streams.picture, streams.text = block(
                        *(streams.picture, streams.text, row.modulation[: streams.count]),
                        *(constants.text_bias, both, part if alone else 0),
                    )
            if constants.controls and i + 1 < len(self.blocks):
                interval = len(self.blocks) / len(constants.controls)
                streams.picture = streams.picture.plus(constants.controls[int(i / interval)])
        with scope("out"):
            streams.whole()
            scale, shift = self.norm_out.vectors(row.modulation)
            h = streams.picture.normed(self.norm_out.eps, shift, scale)
            return linear(h, self.proj_out.weight, self.proj_out.bias)

    def unpack(self, x: Tensor, sides: Sequence[int]) -> Tensor:
        """[B, L, p·p·C] -> [B, C, Y, X], without rows and columns that fill no patch, as
        diffusers'."""
        assert self.patches is not None
        return self.patches.unpack(x, sides)


def _images(row: Rows, constants: Constants) -> Iterator[Image | None]:
    """What the IP-Adapter adds to each attention, in order; endless None without an IP-Adapter."""
    if constants.image_scales is None:
        yield from repeat(None)
        return
    for tokens, scale in zip(row.images, constants.image_scales, strict=True):
        yield None if tokens is None else Image(tokens, scale.expand(tokens.shape[0], -1))


def borrow_mmdit(module: Any, loan: Loan) -> MMDiT:
    """Borrow an SD3Transformer2DModel's weights; raises Unsupported for other structures."""
    net, config = loan.open(module, "SD3Transformer2DModel"), loan.config(module)
    rows, layers = Columns(loan), loan.each(net.transformer_blocks)
    width, switches = net.inner_dim, list[Switch]()
    blocks = tuple(
        borrow_joint_block(layer, loan, rows, width, i + 1 < len(layers), switches)
        for i, layer in enumerate(layers)
    )
    norm_out = borrow_modulated(net.norm_out, loan, rows, width, "AdaLayerNormContinuous")
    attentions = [
        attention
        for layer in layers
        for attention in (layer.attn, layer.attn2)
        if attention is not None
    ]
    mmdit = MMDiT(
        **borrow_joint_trunk(net, loan, rows, blocks),
        norm_out=norm_out,
        proj_out=loan.linear(net.proj_out),
        ip_adapter=borrow_joint_ip_adapter(getattr(net, "image_proj", None), attentions, loan),
        switches=tuple(switches),
    )
    assert mmdit.patches is not None
    size, channels = mmdit.patches.size, net.out_channels
    require(config.patch_size == size, f"patches of {size} that are unpatched at another size")
    require(
        mmdit.proj_out.weight.shape[0] == channels * size**2,
        f"a last layer of {mmdit.proj_out.weight.shape[0]} columns for {channels} channels",
    )
    loan.seal()
    return mmdit
