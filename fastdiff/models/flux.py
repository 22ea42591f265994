"""FLUX.1's denoising transformer on borrowed weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.observe import scope
from fastdiff.models.blocks import Columns, repeated, require
from fastdiff.models.borrow import Loan
from fastdiff.models.checks import check_count, checked
from fastdiff.models.embeddings import TimeText, borrow_time_text
from fastdiff.models.flux_blocks import (
    IP_PROCESSOR,
    PROCESSOR,
    borrow_flux_block,
    borrow_single_block,
)
from fastdiff.models.flux_control import Control
from fastdiff.models.flux_trunk import Constants, FluxTrunk, joined
from fastdiff.models.hoisted import Hoisted
from fastdiff.models.ip_adapter import IPAdapters, borrow_ip_adapters
from fastdiff.models.joint import borrow_modulated
from fastdiff.models.rotary import borrow_rotary, check_positions
from fastdiff.models.weights import project


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
    """[B] the distilled guidance, if the network takes one."""
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
    ip_adapter_image_embeds: Any = None
    """For each IP-Adapter [G·B, N, ...], for N pictures; from `joint_attention_kwargs`."""
    controls: tuple[Control, ...] = ()
    """What the ControlNets of the same step are told; `runtime.controlled` reads it."""


@dataclass(frozen=True)
class Flux(FluxTrunk):
    """FluxTransformer2DModel."""

    time_text: TimeText
    ip_adapters: IPAdapters | None

    def check(self, latents: Tensor, given: Conditions, copies: int = 1) -> None:
        """Raise Unsupported if diffusers itself would refuse a tensor, or convert it.

        Args:
            latents: [B, L, C].
            copies: G, the number of texts for each of the latents.
        """
        constant = given.constant_channels, given.constant_tokens
        told = self.check_trunk(latents, given.encoder_hidden_states, copies, *constant)
        weight, wide = self.proj_out.weight, self.time_text.text.first.weight.shape[1]
        pooled = checked("pooled_projections", given.pooled_projections, weight, wide, 2)
        check_count("pooled_projections", pooled, latents, copies)
        check_positions("img_ids", given.img_ids, weight, told[0], self.rotary)
        check_positions("txt_ids", given.txt_ids, weight, told[1], self.rotary)
        takes, guidance = self.time_text.guidance is not None, given.guidance
        require(takes == (guidance is not None), "guidance is missing, or not taken")
        if guidance is not None:
            fits = guidance.ndim == 1 and len(guidance) in (1, len(latents))
            require(fits, f"guidance has the shape {list(guidance.shape)}")
        images = given.ip_adapter_image_embeds
        what = "has" if self.ip_adapters is None else "needs"
        known = (self.ip_adapters is None) == (images is None)
        require(known, f"ip_adapter_image_embeds do not match the IP-Adapters that it {what}")
        for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
            controls = getattr(given, name)
            require(controls is None or len(controls) > 0, f"{name} is empty")
            for control in controls or ():
                checked(f"one of {name}", control, weight, self.embed.weight.shape[0], 3)
                check_count(f"one of {name}", control, latents, copies)
                require(control.shape[1] == told[0], f"{name} of other tokens")

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
        with scope("modulation"):
            if given.guidance is not None:
                guidance = given.guidance.to(self.dtype) * 1000
            times = self.in_thousands(timesteps, text)
            rows = project(F.silu(self.time_text(times, pooled, guidance)), self.modulation)
        turns = self.rotary(torch.cat((given.txt_ids, given.img_ids)))
        made = self.constants(text, turns, given.constant_channels, given.constant_tokens)
        images: tuple[Tensor, ...] = ()
        if self.ip_adapters is not None:
            # diffusers divides the tokens of all pictures evenly among the texts
            images = self.ip_adapters.rows(given.ip_adapter_image_embeds)
            even = all(image.shape[0] * image.shape[1] % len(text) == 0 for image in images)
            require(even, f"ip_adapter_image_embeds whose tokens do not divide among {len(text)}")
            images = tuple(image.view(len(text), -1, image.shape[-1]) for image in images)
        first, others = given.controlnet_block_samples, given.controlnet_single_block_samples
        controlled = self.controlled(
            *(made, torch.zeros_like(made.text), first or (), others or ()),
            given.controlnet_blocks_repeat,
        )
        return Hoisted(rows, controlled._replace(images=images))

    def controlled(
        self,
        made: Constants,
        blank: Tensor,
        first: Sequence[Tensor],
        others: Sequence[Tensor],
        in_turn: bool,
    ) -> Constants:
        """Constants with a ControlNet's residuals.

        Args:
            blank: [G·B, T, D] zeros: what others than the first blocks add to the text.
            first: [B or G·B, L, D] each, for the first blocks; or none.
            others: likewise, for the others.
            in_turn: whether the first blocks take theirs in turn, not in groups.
        """
        count = len(blank)
        first = [repeated(control, count) for control in first]
        padded = [joined(blank, repeated(control, count)) for control in others]
        turns = tuple(first[i % len(first)] for i in range(len(self.blocks)) if in_turn and first)
        return made._replace(
            controls=turns or _in_groups(first, len(self.blocks)),
            single_controls=_in_groups(padded, len(self.singles)),
        )


def _in_groups(controls: Sequence[Tensor], blocks: int) -> tuple[Tensor, ...]:
    """One for each block, if there is any: as many blocks in a row as possible share one."""
    each = math.ceil(blocks / len(controls)) if controls else 1
    return tuple(controls[i // each] for i in range(blocks) if controls)


def borrow_flux(module: Any, loan: Loan) -> Flux:
    """Borrow a FluxTransformer2DModel's weights; raises Unsupported for other structures."""
    net, rows = loan.open(module, "FluxTransformer2DModel"), Columns(loan)
    width = net.inner_dim
    layers, processors = loan.each(net.transformer_blocks), (PROCESSOR, IP_PROCESSOR)
    blocks = tuple(borrow_flux_block(layer, loan, rows, width, *processors) for layer in layers)
    singles = tuple(
        borrow_single_block(block, loan, rows, width)
        for block in loan.each(net.single_transformer_blocks)
    )
    require(len(blocks) > 0 and len(singles) > 0, "a FLUX without blocks of both kinds")
    norm_out = borrow_modulated(net.norm_out, loan, rows, width, "AdaLayerNormContinuous")
    attentions = [loan.open(layer.attn, "FluxAttention") for layer in layers]
    projection = getattr(net, "encoder_hid_proj", None)
    head = width // singles[0].heads
    flux = Flux(
        embed=loan.linear(net.x_embedder),
        rotary=borrow_rotary(net.pos_embed, loan, head),
        time_text=borrow_time_text(net.time_text_embed, loan),
        ip_adapters=borrow_ip_adapters(projection, attentions, loan, IP_PROCESSOR),
        modulation=loan.linear(*rows.layers, hoisted=True),
        context=loan.linear(net.context_embedder),
        blocks=blocks,
        singles=singles,
        norm_out=norm_out,
        proj_out=loan.linear(net.proj_out),
    )
    loan.seal()
    return flux
