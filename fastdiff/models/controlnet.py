"""ControlNets of SD1.x, SD2.x and SDXL: the down half of a U-Net, on borrowed weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.linear import linear
from fastdiff.models.blocks import channels_last, require
from fastdiff.models.borrow import Loan, Weights
from fastdiff.models.ip_adapter import borrow_ip_adapters
from fastdiff.models.trunk import Trunk, borrow_trunk


@dataclass(frozen=True)
class ControlNet(Trunk):
    """`controlnet(latents, timestep, text, picture)`: residuals for a U-Net; see `__call__`."""

    outs: tuple[Weights, ...]
    """1×1 convolutions: of every skip, then of the middle."""
    embedding: Any
    """diffusers' ControlNetConditioningEmbedding: called, not borrowed."""
    flipped: bool
    """Whether it wants the picture's channels in the opposite order."""
    pooled: bool
    """Whether each residual is to be averaged over the picture (`global_pool_conditions`)."""

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        condition: Tensor,
        *,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        predict: Callable[..., Tensor] | None = None,
    ) -> list[Tensor]:
        """Residuals of every skip, then of the middle: [B, C, Y, X] each, channels last in memory.

        Args:
            condition: [B, channels, rows, columns] the picture that controls.
            predict: stands for `self.predict`.

        All others are `UNet.__call__`'s.
        """
        picture = self.embedding(condition.flip(1) if self.flipped else condition)
        batch, shape = sample.shape[0], sample.shape[2:]
        require(
            picture.shape == (batch, self.conv_in.weight.shape[0], *shape),
            f"a ControlNet's picture becomes {list(picture.shape)} beside {list(sample.shape)}",
        )
        packed = (predict or self.predict)(
            channels_last(sample),
            self.time_rows(timestep, text_embeds, time_ids, timestep_cond),
            self.text_rows(encoder_hidden_states),
            channels_last(picture),
        )
        sizes = self._sizes(*shape)
        shapes = [
            (batch, *size, out.weight.shape[0]) for size, out in zip(sizes, self.outs, strict=True)
        ]
        parts = packed.split([b * y * x * c for b, y, x, c in shapes])
        return [
            part.view(shape).permute(0, 3, 1, 2) for part, shape in zip(parts, shapes, strict=True)
        ]

    def predict(self, x: Tensor, rows: Tensor, text: Tensor, picture: Tensor) -> Tensor:
        """The part that every step repeats: all residuals, channels last, one after another.

        `picture` [B, Y, X, C] of the embedding; all others as `UNet.predict`'s.
        """
        middle, skips = self.down(x, rows, text, condition=picture)
        outs = zip((*skips, middle), self.outs, strict=True)
        return torch.cat([linear(h.closed(), out.weight, out.bias).flatten() for h, out in outs])

    def _sizes(self, y: int, x: int) -> list[tuple[int, int]]:
        """Rows and columns of each residual."""
        sizes = [(y, x)]
        for stage in self.downs:
            sizes += [sizes[-1]] * len(stage.resnets)
            if stage.down is not None:
                rounded = sum(stage.down.padding) - 1
                y, x = (y + rounded) // 2, (x + rounded) // 2
                sizes.append((y, x))
        return [*sizes, sizes[-1]]


def borrow_controlnet(module: Any, loan: Loan) -> ControlNet:
    """Lend a ControlNetModel's weights; raises Unsupported for what this runtime is not."""
    controlnet, config = loan.open(module, "ControlNetModel"), loan.config(module)
    require(controlnet.encoder_hid_proj is None, "a projection of the text (encoder_hid_proj)")
    order = config.controlnet_conditioning_channel_order
    require(order in ("rgb", "bgr"), f"pictures in the order {order!r}")
    trunk, _, attentions = borrow_trunk(controlnet, config, loan)
    borrow_ip_adapters(None, attentions, loan)  # raises where it has any
    convolutions = loan.each(controlnet.controlnet_down_blocks)
    net = ControlNet(
        **trunk,
        outs=tuple(map(loan.linear, (*convolutions, controlnet.controlnet_mid_block))),
        embedding=loan.called(controlnet.controlnet_cond_embedding),
        flipped=order == "bgr",
        pooled=bool(config.global_pool_conditions),
    )
    require(len(net.outs) == net.skips + 1, "another number of 1×1 convolutions than of skips")
    loan.seal()
    return net
