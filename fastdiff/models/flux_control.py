"""FLUX.1's ControlNets on borrowed weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.linear import linear
from fastdiff.kernels.observe import scope
from fastdiff.models.blocks import Columns, require
from fastdiff.models.borrow import Loan, Weights
from fastdiff.models.checks import check_count, checked
from fastdiff.models.embeddings import TimeText, borrow_time_text
from fastdiff.models.flux_blocks import borrow_flux_block, borrow_single_block
from fastdiff.models.flux_trunk import Constants, FluxBlocks, cut
from fastdiff.models.hoisted import Hoisted
from fastdiff.models.rotary import borrow_rotary, check_positions
from fastdiff.models.weights import project


class ControlConditions(NamedTuple):
    """A ControlNet's inputs besides latents and timesteps."""

    encoder_hidden_states: Tensor | None
    """[B, T, D'] text."""
    pooled_projections: Tensor | None
    """[B, D''] pooled text."""
    img_ids: Tensor | None
    """[L, axes] positions of the picture's tokens."""
    txt_ids: Tensor | None
    """[T, axes] positions of the text's tokens."""
    guidance: Tensor | None
    """[B] the distilled guidance, if the network takes one."""
    controlnet_cond: Tensor | None
    """[B, L, C] the control picture, packed as the latents; [B, 3, Y, X] pixels for a network with
    convolutions of its own."""
    controlnet_mode: Tensor | None
    """[B, 1] the kind of the control picture, for a network that takes several kinds."""


class Control(NamedTuple):
    """What a ControlNet in the step of a transformer is told, and how its residuals count."""

    given: ControlConditions
    """Without positions, which are the transformer's; without texts, if both are told the same."""
    scales: tuple[float, ...]
    """What its residuals are multiplied by in each step."""

    def beside(self, conditions: Any) -> ControlConditions:
        """Its conditions in the step of a transformer that is told `conditions`."""
        names = "encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids"
        shared = {name: getattr(conditions, name) for name in names}
        own = {n: v for n, v in self.given._asdict().items() if n not in names or v is not None}
        return ControlConditions(**shared | own)


@dataclass(frozen=True)
class FluxControl(FluxBlocks):
    """FluxControlNetModel."""

    time_text: TimeText
    cond: Weights
    """The control picture's embedding."""
    outs: tuple[Weights, ...]
    """A linear layer for each block's result."""
    hint: Any
    """diffusers' convolutions of the control picture's pixels, which are called rather than
    borrowed; None if it comes packed."""
    patch: int
    """The rows and columns that become a token, of what they make."""
    modes: Tensor | None
    """[kinds, D] the token before the text for each kind of control picture."""

    def check(self, latents: Tensor, given: ControlConditions, copies: int = 1) -> None:
        """Raise Unsupported if diffusers itself would refuse a tensor, or convert it.

        Args:
            latents: [B, L, C].
            copies: 1.
        """
        own, count = self.check_trunk(latents, given.encoder_hidden_states, copies)
        weight, wide = self.embed.weight, self.time_text.text.first.weight.shape[1]
        pooled = checked("pooled_projections", given.pooled_projections, weight, wide, 2)
        channels, dim = (self.cond.weight.shape[1], 3) if self.hint is None else (3, 4)
        cond = checked("controlnet_cond", given.controlnet_cond, weight, channels, dim)
        for name, told in (("pooled_projections", pooled), ("controlnet_cond", cond)):
            check_count(name, told, latents, copies)
        check_positions("img_ids", given.img_ids, weight, own, self.rotary)
        check_positions("txt_ids", given.txt_ids, weight, count, self.rotary)
        takes = self.time_text.guidance is not None
        require(takes == (given.guidance is not None), "guidance is missing, or not taken")
        mode = given.controlnet_mode
        if self.modes is not None:
            fits = mode is not None and list(mode.shape) == [len(latents), 1]
            require(fits, "controlnet_mode is missing, or not of one number for each picture")

    def hoist(self, given: ControlConditions, timesteps: Tensor, sides: Sequence[int]) -> Hoisted:
        """Compute everything that does not depend on the latents; arguments as for
        `Flux.hoist`."""
        text, pooled, cond = given[0], given.pooled_projections, given.controlnet_cond
        ids, guidance = given.txt_ids, None
        assert text is not None
        assert pooled is not None
        assert cond is not None
        assert ids is not None
        assert given.img_ids is not None
        with scope("modulation"):
            if given.guidance is not None:
                guidance = given.guidance.to(self.dtype) * 1000
            times = self.in_thousands(timesteps, text)
            rows = project(F.silu(self.time_text(times, pooled, guidance)), self.modulation)
        if self.modes is not None:
            ids = torch.cat((ids[:1], ids))
        turns = self.rotary(torch.cat((ids, given.img_ids)))
        made: Constants = self.constants(text, turns, None, None)
        if self.modes is not None:
            assert given.controlnet_mode is not None
            kind = F.embedding(given.controlnet_mode, self.modes)
            made = made._replace(text=torch.cat((kind, made.text), dim=1))
        with scope("picture"):
            cond = cond if self.hint is None else self._packed(self.hint(cond))
            own = len(given.img_ids)
            require(cond.shape[1] == own, f"controlnet_cond of {cond.shape[1]} tokens, not {own}")
            picture = linear(cond.contiguous(), self.cond.weight, self.cond.bias)
            if self.embed.bias is not None:
                picture = picture + self.embed.bias
        return Hoisted(rows, made._replace(made=picture))

    def predict(self, x: Tensor, row: Tensor, constants: Constants) -> Tensor:
        """The part that every step repeats: [B, L, C] -> [blocks, B, L, D].

        What to add to the transformer's blocks, without any conditioning scale: of the first
        blocks, then of the others.
        """
        return torch.stack(self.residuals(x, row, constants))

    def _packed(self, picture: Tensor) -> Tensor:
        """[B, C, Y, X] -> [B, L, C·patch²]"""
        count, channels, y, x = picture.shape
        side = self.patch
        require(y % side == x % side == 0, f"a control picture of {y}×{x} in patches of {side}")
        parts = picture.reshape(count, channels, y // side, side, x // side, side)
        return parts.permute(0, 2, 4, 1, 3, 5).reshape(count, (y // side) * (x // side), -1)

    @property
    def counts(self) -> tuple[int, int]:
        """How many residuals are for the transformer's first blocks, and for the others."""
        return len(self.blocks), len(self.singles)

    def residuals(self, x: Tensor, row: Tensor, constants: Constants) -> list[Tensor]:
        """`predict`, with a tensor for each block."""
        found, tokens = list(self.streams(x, row, constants)), constants.text.shape[1]
        with scope("out"):
            made = []
            for i, (stream, out) in enumerate(zip(found, self.outs, strict=True)):
                h = stream.closed()
                if i >= len(self.blocks):
                    h = cut(h, tokens, tokens + x.shape[1])
                made.append(linear(h, out.weight, out.bias))
            return made


def borrow_flux_control(module: Any, loan: Loan) -> FluxControl:
    """Borrow a FluxControlNetModel's weights; raises Unsupported for other structures."""
    net, rows = loan.open(module, "FluxControlNetModel"), Columns(loan)
    hint = net.input_hint_block
    width, layers = net.inner_dim, loan.each(net.transformer_blocks)
    alone = loan.each(net.single_transformer_blocks)
    blocks = tuple(borrow_flux_block(layer, loan, rows, width) for layer in layers)
    singles = tuple(borrow_single_block(layer, loan, rows, width) for layer in alone)
    require(len(blocks) > 0, "a ControlNet without blocks of two streams")
    outs = loan.each(net.controlnet_blocks, len(blocks))
    outs += loan.each(net.controlnet_single_blocks, len(singles))
    control = FluxControl(
        embed=loan.linear(net.x_embedder),
        rotary=borrow_rotary(net.pos_embed, loan, width // blocks[0].attention.heads),
        modulation=loan.linear(*rows.layers, hoisted=True),
        context=loan.linear(net.context_embedder),
        blocks=blocks,
        singles=singles,
        time_text=borrow_time_text(net.time_text_embed, loan),
        cond=loan.linear(net.controlnet_x_embedder),
        outs=tuple(map(loan.linear, outs)),
        hint=None if hint is None else loan.called(hint),
        patch=loan.config(module).patch_size,
        modes=loan.table(net.controlnet_mode_embedder) if net.union else None,
    )
    loan.seal()
    return control
