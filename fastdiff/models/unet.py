"""The denoising U-Net of SD1.x, SD2.x and SDXL on borrowed weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

from torch import Tensor

from fastdiff.kernels.conv2d import conv2d
from fastdiff.kernels.observe import scope
from fastdiff.models.blocks import channels_first, channels_last, require
from fastdiff.models.borrow import Loan, Norm, Weights
from fastdiff.models.ip_adapter import IPAdapters, borrow_ip_adapters
from fastdiff.models.sums import Sum
from fastdiff.models.trunk import Stage, Trunk, borrow_trunk


@dataclass(frozen=True)
class UNet(Trunk):
    """`unet(latents, timestep, text)`: one prediction; see `__call__`."""

    recordable: ClassVar[bool] = True
    ip_adapters: IPAdapters | None
    ups: tuple[Stage, ...]
    norm_out: Norm
    conv_out: Weights

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        images: Sequence[Tensor] = (),
        controls: Sequence[Tensor] = (),
        inners: Sequence[Tensor] = (),
        text_mask: Tensor | None = None,
        predict: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """The network's prediction for noisy latents.

        Args:
            sample: [B, C, Y, X] in the weights' dtype; any Y, X.
            timestep: [1] or [B], integer or float.
            encoder_hidden_states: [B, T, D] text.
            text_embeds, time_ids: [B, D'], [B, 6]: SDXL's added condition.
            timestep_cond: [B, D''] guidance embedding of distilled models (LCM).
            images: [B, tokens, …] of `image_rows`.
            controls: a ControlNet's residuals, channels first: of every skip, then the middle one.
            inners: a T2I-Adapter's residuals, channels first.
            text_mask: [B, 1, 1, T], added to the scores of cross-attention.
            predict: stands for `self.predict`.

        Returns:
            [B, C, Y, X], contiguous.
        """
        return channels_first(
            (predict or self.predict)(
                channels_last(sample),
                self.time_rows(timestep, text_embeds, time_ids, timestep_cond),
                self.text_rows(encoder_hidden_states),
                *images,
                *map(channels_last, controls),
                *map(channels_last, inners),
                text_mask=text_mask,
                controls=len(controls),
                inners=len(inners),
            )
        )

    def predict(
        self,
        x: Tensor,
        rows: Tensor,
        text: Tensor,
        *more: Tensor,
        text_mask: Tensor | None = None,
        controls: int = 0,
        inners: int = 0,
    ) -> Tensor:
        """The part that every step repeats, channels last throughout.

        Args:
            x: [B, Y, X, C] noisy latents.
            rows: [B, …] of `time_rows`; [1, …] where all pictures share a timestep.
            text: [B, T, …] of `text_rows`.
            more: [B, tokens, …] of every IP-Adapter (`image_rows`), then `controls` residuals of a
                ControlNet, then `inners` residuals of a T2I-Adapter.
            text_mask: [B, 1, 1, T].

        For guidance `text` and the IP-Adapters', and `rows` where the halves differ in them, may be
        of 2B: what comes before the first of them is computed once for both halves.

        Returns:
            [B, Y, X, C], or 2B where `text` is.
        """
        given = iter(more)
        images = list(islice(given, len(more) - controls - inners))
        control, inner = list(islice(given, controls)), list(given)
        h, skips = self.down(x, rows, text, images, text_mask, inner=inner)
        if control:
            skips = [Sum(s.closed() + r) for s, r in zip(skips, control[:-1], strict=True)]
            h = Sum(h.closed() + control[-1])
        for i, stage in enumerate(self.ups):
            with scope(f"up {i}"):
                for resnet, transformer in zip(stage.resnets, stage.transformers, strict=True):
                    h = resnet(h, rows, beside=skips.pop().closed())
                    h = h if transformer is None else transformer(h, text, images, text_mask)
                if stage.up is not None:  # to the size of the skips it meets next, odd ones too
                    _, rows_next, columns_next, _ = skips[-1].closed().shape
                    h = stage.up(h, (rows_next, columns_next))
        with scope("out"):
            x = h.group_normed(self.norm_out, silu=True)
            return conv2d(x, self.conv_out.weight, self.conv_out.bias)

    def image_rows(self, image_embeds: Any) -> tuple[Tensor, ...]:
        """Keys and values of every cross-attention for the IP-Adapters' pictures; see there."""
        adapters = self.ip_adapters
        return () if adapters is None or image_embeds is None else adapters.rows(image_embeds)


def borrow_unet(module: Any, loan: Loan) -> UNet:
    """Lend a UNet2DConditionModel's weights; raises Unsupported for what this runtime is not."""
    net, config = loan.open(module, "UNet2DConditionModel"), loan.config(module)
    require(net.time_embed_act is None, "an activation on the time embedding")
    require(not config.center_input_sample, "center_input_sample")
    projection = getattr(net, "encoder_hid_proj", None)
    require(
        config.encoder_hid_dim_type == (None if projection is None else "ip_image_proj"),
        f"a projection of the text (encoder_hid_dim_type {config.encoder_hid_dim_type!r})",
    )
    require(
        getattr(net, "text_encoder_hid_proj", None) is None,
        "a projection of the text beside IP-Adapters (Kolors)",
    )
    require(getattr(net, "position_net", None) is None, "GLIGEN")
    require(net.conv_norm_out is not None, "a U-Net without a norm before its output")
    loan.silu(net.conv_act)
    trunk, ups, attentions = borrow_trunk(net, config, loan, loan.each(net.up_blocks))
    times = sum(stage.up is not None for stage in ups)
    require(net.num_upsamplers == times, f"num_upsamplers {net.num_upsamplers}")
    unet = UNet(
        **trunk,
        ip_adapters=borrow_ip_adapters(projection, attentions, loan),
        ups=ups,
        norm_out=loan.norm(net.conv_norm_out),
        conv_out=loan.conv(net.conv_out),
    )
    loan.seal()
    return unet
