"""The denoising U-Net of SD1.x, SD2.x and SDXL on borrowed weights."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.kernels.concat import concat
from fastdiff.kernels.conv2d import conv2d
from fastdiff.kernels.linear import linear
from fastdiff.models.blocks import (
    Columns,
    Down,
    Resnet,
    Transformer,
    Up,
    borrow_down,
    borrow_resnet,
    borrow_transformer,
    borrow_up,
    channels_first,
    channels_last,
    expect,
    group_norm,
    only,
    require,
)
from fastdiff.models.borrow import Loan, Norm, Weights

_BLOCKS = {
    "down": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "mid": ("UNetMidBlock2DCrossAttn",),
    "up": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_FREEU = ("s1", "s2", "b1", "b2")


@dataclass(frozen=True)
class Sinusoid:
    """Timesteps [n] -> [n, width] as in Attention Is All You Need, float32."""

    width: int
    cosine_first: bool
    shift: float

    def __call__(self, timesteps: Tensor) -> Tensor:
        half = self.width // 2
        steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        frequencies = torch.exp(-math.log(10000.0) * steps / (half - self.shift))
        angles = timesteps[:, None].float() * frequencies[None, :]
        parts = (angles.cos(), angles.sin()) if self.cosine_first else (angles.sin(), angles.cos())
        return F.pad(torch.cat(parts, dim=-1), (0, self.width % 2))


@dataclass(frozen=True)
class Embedding:
    """Two linear layers with a SiLU between them, and the LCM condition added before."""

    first: Weights
    second: Weights
    condition: Weights | None

    def __call__(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None and self.condition is not None:
            x = linear(condition, self.condition.weight, self.condition.bias) + x
        h = linear(x, self.first.weight, self.first.bias, act="silu")
        return linear(h, self.second.weight, self.second.bias)


@dataclass(frozen=True)
class Stage:
    """A block of the U-Net: resnets, each followed by a transformer or None, and a resampler."""

    resnets: tuple[Resnet, ...]
    transformers: tuple[Transformer | None, ...]
    down: Down | None = None
    up: Up | None = None


@dataclass(frozen=True)
class UNet:
    """`unet(latents, timestep, text)`: one prediction; see `__call__`."""

    sinusoid: Sinusoid
    time: Embedding
    added_sinusoid: Sinusoid | None
    added: Embedding | None
    rows: Weights
    """time_emb_proj of every resnet."""
    text: Weights
    """to_k and to_v of every cross-attention."""
    conv_in: Weights
    downs: tuple[Stage, ...]
    mid: Stage | None
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
        text_mask: Tensor | None = None,
        down_residuals: Sequence[Tensor] | None = None,
        mid_residual: Tensor | None = None,
        predict: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """The network's prediction for noisy latents.

        Args:
            sample: [B, C, Y, X] in the weights' dtype; any Y, X.
            timestep: [1] or [B], integer or float.
            encoder_hidden_states: [B, T, D] text.
            text_embeds, time_ids: [B, D'], [B, 6]: SDXL's added condition.
            timestep_cond: [B, D''] guidance embedding of distilled models (LCM).
            text_mask: [B, 1, 1, T], added to the scores of cross-attention.
            down_residuals, mid_residual: ControlNet's, channels first.
            predict: stands for `self.predict` where neither mask nor residuals are given.

        Returns:
            [B, C, Y, X], contiguous.
        """
        rows = self.time_rows(timestep, sample, text_embeds, time_ids, timestep_cond)
        text = self.text_rows(encoder_hidden_states)
        x = channels_last(sample)
        if predict is not None and text_mask is None and down_residuals is None:
            return channels_first(predict(x, rows, text))
        down = None if down_residuals is None else [channels_last(r) for r in down_residuals]
        mid = None if mid_residual is None else channels_last(mid_residual)
        return channels_first(self.predict(x, rows, text, text_mask, down, mid))

    def predict(
        self,
        x: Tensor,
        rows: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        down_residuals: Sequence[Tensor] | None = None,
        mid_residual: Tensor | None = None,
    ) -> Tensor:
        """The part that every step repeats, channels last throughout.

        Args:
            x: [B, Y, X, C] noisy latents.
            rows: [B, …] of `time_rows`; [1, …] where all pictures share a timestep.
            text: [B, T, …] of `text_rows`.
        """
        x = conv2d(x, self.conv_in.weight, self.conv_in.bias)
        rows = rows.expand(x.shape[0], -1)
        skips = [x]
        for stage in self.downs:
            for resnet, transformer in zip(stage.resnets, stage.transformers, strict=True):
                x = resnet(x, rows)
                x = x if transformer is None else transformer(x, text, text_mask)
                skips.append(x)
            if stage.down is not None:
                x = stage.down(x)
                skips.append(x)
        if down_residuals is not None:
            skips = [s + r for s, r in zip(skips, down_residuals, strict=True)]
        if self.mid is not None:
            x = self.mid.resnets[0](x, rows)
            for transformer, resnet in zip(
                self.mid.transformers, self.mid.resnets[1:], strict=True
            ):
                x = x if transformer is None else transformer(x, text, text_mask)
                x = resnet(x, rows)
        if mid_residual is not None:
            x = x + mid_residual
        for stage in self.ups:
            for resnet, transformer in zip(stage.resnets, stage.transformers, strict=True):
                x = resnet(concat(x, skips.pop()), rows)
                x = x if transformer is None else transformer(x, text, text_mask)
            if stage.up is not None:  # to the size of the skips it meets next, odd ones too
                x = stage.up(x, (skips[-1].shape[1], skips[-1].shape[2]))
        x = group_norm(x, self.norm_out, silu=True)
        return conv2d(x, self.conv_out.weight, self.conv_out.bias)

    def text_rows(self, encoder_hidden_states: Tensor) -> Tensor:
        """Keys and values of every cross-attention: [B, T, all their widths]."""
        return linear(encoder_hidden_states, self.text.weight, self.text.bias)

    def time_rows(
        self,
        timestep: Tensor,
        sample: Tensor,
        text_embeds: Tensor | None,
        time_ids: Tensor | None,
        timestep_cond: Tensor | None,
    ) -> Tensor:
        """Every resnet's projection of the time embedding: [B or 1, all their channels]."""
        embedding = self.time(self.sinusoid(timestep).to(sample.dtype), timestep_cond)
        if self.added is not None and self.added_sinusoid is not None:
            assert text_embeds is not None
            assert time_ids is not None
            sizes = self.added_sinusoid(time_ids.flatten()).reshape(len(text_embeds), -1)
            added = torch.cat([text_embeds, sizes], dim=-1).to(sample.dtype)
            embedding = embedding + self.added(added)
        return linear(F.silu(embedding), self.rows.weight, self.rows.bias)


def borrow_unet(module: Any, loan: Loan) -> UNet:
    """Lend a UNet2DConditionModel's weights; raises Unsupported for what this runtime is not."""
    _check(module)
    rows, text = Columns(), Columns()

    def stage(block: Any, part: str) -> Stage:
        expect(block, *_BLOCKS[part])
        require(all(getattr(block, name, None) is None for name in _FREEU), "FreeU")
        resnets = tuple(borrow_resnet(resnet, loan, rows) for resnet in block.resnets)
        attentions = getattr(block, "attentions", None) or [None] * len(resnets)
        down, up = (only(getattr(block, name, None)) for name in ("downsamplers", "upsamplers"))
        return Stage(
            resnets,
            tuple(a if a is None else borrow_transformer(a, loan, text) for a in attentions),
            down if down is None else borrow_down(down, loan),
            up if up is None else borrow_up(up, loan),
        )

    downs = tuple(stage(block, "down") for block in module.down_blocks)
    mid = None if module.mid_block is None else stage(module.mid_block, "mid")
    ups = tuple(stage(block, "up") for block in module.up_blocks)
    require(bool(text.layers), "a U-Net without cross-attention")
    added = getattr(module, "add_embedding", None)
    return UNet(
        sinusoid=_sinusoid(module.time_proj),
        time=_embedding(module.time_embedding, loan),
        added_sinusoid=None if added is None else _sinusoid(module.add_time_proj),
        added=None if added is None else _embedding(added, loan),
        rows=loan.linear(*rows.layers),
        text=loan.linear(*text.layers),
        conv_in=loan.conv(module.conv_in),
        downs=downs,
        mid=mid,
        ups=ups,
        norm_out=loan.norm(module.conv_norm_out),
        conv_out=loan.conv(module.conv_out),
    )


def _check(module: Any) -> None:
    config = module.config
    require(
        config.addition_embed_type in (None, "text_time"),
        f"addition_embed_type {config.addition_embed_type!r}",
    )
    require(module.class_embedding is None, "class embeddings")
    require(module.time_embed_act is None, "an activation on the time embedding")
    require(
        config.time_embedding_type == "positional",
        f"time_embedding_type {config.time_embedding_type!r}",
    )
    require(not config.center_input_sample, "center_input_sample")
    require(
        getattr(module, "encoder_hid_proj", None) is None,
        "a projection of the text (encoder_hid_proj: IP-Adapter, Kandinsky)",
    )
    require(getattr(module, "position_net", None) is None, "GLIGEN")
    require(module.conv_norm_out is not None, "a U-Net without a norm before its output")
    require(type(module.conv_act) is nn.SiLU, "an activation other than SiLU")


def _sinusoid(module: Any) -> Sinusoid:
    require(module.scale == 1, "scaled sinusoids")
    return Sinusoid(module.num_channels, module.flip_sin_to_cos, module.downscale_freq_shift)


def _embedding(module: Any, loan: Loan) -> Embedding:
    require(type(module.act) is nn.SiLU, "an activation other than SiLU in the time embedding")
    require(module.post_act is None, "an activation after the time embedding")
    condition = module.cond_proj
    return Embedding(
        loan.linear(module.linear_1),
        loan.linear(module.linear_2),
        None if condition is None else loan.linear(condition),
    )
