"""ControlNets of SD1.x, SD2.x and SDXL: the down half of a U-Net, on borrowed weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.linear import linear
from fastdiff.models.blocks import PERTURBING, channels_last, require
from fastdiff.models.borrow import Loan, Weights
from fastdiff.models.hoisted import Hoisted
from fastdiff.models.ip_adapter import borrow_ip_adapters
from fastdiff.models.perturbed import perturbed_of
from fastdiff.models.trunk import Conditions, Trunk, borrow_trunk


class Constants(NamedTuple):
    """What all steps of a picture share."""

    text: Tensor | None
    """[B, T, …] result of `Trunk.text_rows`."""
    picture: Tensor
    """[B, Y, X, C] the embedded control picture."""


@dataclass(frozen=True)
class ControlNet(Trunk):
    """Residuals for a U-Net, from noisy latents [B, C, Y, X] and a control picture."""

    recordable: ClassVar[bool] = True
    outs: tuple[Weights, ...]
    """1×1 convolutions: one for each skip, then one for the middle."""
    embedding: Any
    """diffusers' ControlNetConditioningEmbedding, which is called rather than borrowed."""
    flipped: bool
    """Whether it takes the picture's channels in reverse order."""
    pooled: bool
    """Whether to average each residual over the picture (`global_pool_conditions`)."""

    def hoist(self, given: Conditions, timesteps: Tensor, sides: Sequence[int]) -> Hoisted:
        """See `UNet.hoist`; the constants include the control picture's embedding."""
        perturbed = perturbed_of(self.switches, PERTURBING, given.encoder_hidden_states)
        require(perturbed is None, "perturbed attention in a ControlNet")
        condition = given.controlnet_cond
        assert condition is not None
        picture = self.embedding(condition.flip(1) if self.flipped else condition)
        text = given.encoder_hidden_states
        assert text is not None
        shape = (len(text), self.conv_in.weight.shape[0], *sides)
        require(
            picture.shape == shape,
            f"a ControlNet's picture is embedded as {list(picture.shape)}; expected {list(shape)}",
        )
        constants = Constants(self.text_rows(given), channels_last(picture))
        return Hoisted(self.time_rows(timesteps, given), constants)

    def predict(self, x: Tensor, row: Tensor, constants: Constants) -> Tensor:
        """The part that every step repeats: all residuals, channels last, in one flat tensor."""
        middle, skips = self.down(x, row, constants.text, condition=constants.picture)
        outs = zip((*skips, middle), self.outs, strict=True)
        return torch.cat([linear(h.closed(), out.weight, out.bias).flatten() for h, out in outs])

    def unpack(self, x: Tensor, sides: Sequence[int]) -> list[Tensor]:
        """The residuals of every skip, then of the middle: each [B, C, Y, X] with channels-last
        memory."""
        each = zip(self._sizes(*sides), self.outs, strict=True)
        shapes = [(*size, out.weight.shape[0]) for size, out in each]
        counts = [y * x * c for y, x, c in shapes]
        batch = x.numel() // sum(counts)
        parts = x.split([batch * count for count in counts])
        return [
            part.view(batch, *shape).permute(0, 3, 1, 2)
            for part, shape in zip(parts, shapes, strict=True)
        ]

    def _sizes(self, y: int, x: int) -> list[tuple[int, int]]:
        """The rows and columns of each residual."""
        sizes = [(y, x)]
        for stage in self.downs:
            sizes += [sizes[-1]] * len(stage.resnets)
            if stage.down is not None:
                y, x = stage.down.side(y), stage.down.side(x)
                sizes.append((y, x))
        return [*sizes, sizes[-1]]


def borrow_controlnet(module: Any, loan: Loan) -> ControlNet:
    """Borrow a ControlNetModel's weights; raises Unsupported for other structures."""
    controlnet, config = loan.open(module, "ControlNetModel"), loan.config(module)
    require(controlnet.encoder_hid_proj is None, "a projection of the text (encoder_hid_proj)")
    order = config.controlnet_conditioning_channel_order
    require(order in ("rgb", "bgr"), f"a picture's channels in the order {order!r}")
    more = config.addition_embed_type
    require(more in (None, "text_time"), f"addition_embed_type {more!r}")
    trunk, _, text = borrow_trunk(controlnet, config, loan)
    borrow_ip_adapters(None, text.attentions, loan)  # raises if it has any
    convolutions = loan.each(controlnet.controlnet_down_blocks)
    net = ControlNet(
        **trunk,
        outs=tuple(map(loan.linear, (*convolutions, controlnet.controlnet_mid_block))),
        embedding=loan.called(controlnet.controlnet_cond_embedding),
        flipped=order == "bgr",
        pooled=bool(config.global_pool_conditions),
    )
    require(len(net.outs) == net.skips + 1, "not one 1×1 convolution for each skip")
    loan.seal()
    return net
