"""Networks with the inputs and outputs that exported files have, all by position."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


class Text(nn.Module):
    """input_ids [B, L] -> the encoder's tensors and every hidden state [B, L, D]."""

    def __init__(self, net: nn.Module, first: tuple[str, str]) -> None:
        super().__init__()
        self.net, self.first = net, first

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        out = self.net(input_ids, output_hidden_states=True, return_dict=True)
        return (*(getattr(out, name) for name in self.first), *out.hidden_states)


class Frequencies(nn.Module):
    """diffusers' Timesteps [B] -> [B, C] with its frequencies as a constant of torch's own bits.

    A runtime whose exp differs by one rounding is 1e-4 rad away at timestep 999.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        half = source.num_channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32)
        table = source.scale * torch.exp(exponent / (half - source.downscale_freq_shift))
        self.cosine_first = source.flip_sin_to_cos
        self.register_buffer("table", table)

    def forward(self, timesteps: Tensor) -> Tensor:
        table: Any = self.table
        angles = timesteps[:, None].to(table.dtype) * table
        waves = (angles.cos(), angles.sin()) if self.cosine_first else (angles.sin(), angles.cos())
        return torch.cat(waves, dim=-1).to(timesteps.dtype)  # that of what it is joined to


class UNet(nn.Module):
    """sample [B, C, Y, X], timestep [] or [1], text [B, L, D] and `extra` inputs -> out_sample."""

    def __init__(self, net: nn.Module, extra: tuple[str, ...]) -> None:
        super().__init__()
        self.net, self.extra = copy.copy(net), extra  # its own children, the same weights
        self.net._modules = dict(net._modules)
        for name, child in net.named_children():
            if type(child).__name__ == "Timesteps":
                self.net.add_module(name, Frequencies(child))

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *more: Tensor
    ) -> tuple[Tensor, ...]:
        given = dict(zip(self.extra, more, strict=True))
        condition = given.pop("timestep_cond", None)
        out = self.net(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=condition,
            added_cond_kwargs=given or None,
            return_dict=False,
        )
        return (out[0],)


class Decoder(nn.Module):
    """Latents [B, C, Y, X], already divided by the scaling factor -> pixels in -1 to 1."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, latent_sample: Tensor) -> tuple[Tensor, ...]:
        net: Any = self.net
        return (net.decode(latent_sample, return_dict=False)[0],)


class Encoder(nn.Module):
    """Pixels [B, 3, Y, X] in -1 to 1 -> mean and log variance of the latents [B, 2C, …]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, sample: Tensor) -> tuple[Tensor, ...]:
        net: Any = self.net
        return (net.encode(sample, return_dict=False)[0].parameters,)
