"""Autoencoders: the encoder and decoder of diffusers' AutoencoderKL and VQModel."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.families import Family, Kind, Sizes, Taken, of_model, plain
from fastdiff.families.part import Part, Port, dtype_name, sides
from fastdiff.models import (
    Decoder,
    Encoder,
    Loan,
    Unsupported,
    borrow_decoder,
    borrow_encoder,
)
from fastdiff.models.blocks import channels_first, channels_last
from fastdiff.models.checks import checked
from fastdiff.runtime.planned import Run, coding, without_memory
from fastdiff.runtime.recordings import Recorded, runner

LARGE = 1 << 30
"""Bytes of intermediate pictures above which `Options(vae_tiling="exact")` decodes in strips."""
SHARE = 0.24
"""The least memory for strips, as a share of a whole decode's: a quarter with torch's overhead."""


@dataclass
class Coder:
    """The compact decoder or encoder, recorded, and the decoder in strips."""

    network: Decoder | Encoder
    run: Recorded
    searches: bool
    exact: bool
    """Whether large pictures are decoded in strips."""
    short: bool = False
    """Whether a picture was decoded in strips because a GPU's memory was short."""

    def __call__(self, x: Tensor) -> Tensor:
        """x channels last -> the network's result, channels last."""
        if self.cuts(x):
            return self.in_strips(x, LARGE)
        try:
            return self.run(x)
        except torch.OutOfMemoryError:
            if not isinstance(self.network, Decoder):
                raise
            self.short = True
        return self.in_strips(x)  # here the error no longer holds memory

    def cuts(self, x: Tensor) -> bool:
        """Whether to decode x in strips even if memory might suffice."""
        network = self.network
        return self.exact and isinstance(network, Decoder) and network.bytes(x) > LARGE

    def in_strips(self, x: Tensor, least: int = 0) -> Tensor:
        """The network's result, within a `SHARE` of its memory or within `least` bytes if more."""
        assert isinstance(self.network, Decoder)
        bytes = max(least, int(SHARE * self.network.bytes(x)))
        run = runner(x.device, self.searches)
        y: Tensor = run(self.network.run_in_strips, x, bytes)
        return y


def _borrow(
    module: nn.Module,
    loan: Loan,
    borrow: Callable[[Any, Loan], Decoder | Encoder],
    searches: bool = True,
    exact: bool = False,
) -> Coder:
    network = borrow(module, loan)
    return Coder(network, Recorded(network.run, searches), searches, exact)


def _call(coder: Coder, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
    """`Encoder.forward` and `Decoder.forward` on the compact network."""
    if latent_embeds is not None:
        raise Unsupported("it was given latent_embeds")
    weight = coder.network.conv_in.weight
    checked("sample", sample, weight, channels=weight.shape[1], dim=4)
    return channels_first(coder(channels_last(sample)))


def _notes(coder: Coder) -> list[str]:
    notes = [f"pictures above {LARGE >> 30} GiB in strips"] if coder.exact else []
    return notes + ["in strips since a GPU's memory was short"] * coder.short


def _planned(coder: Coder, sizes: Sizes) -> list[Run]:
    network = coder.network
    dtype = network.conv_in.weight.dtype
    if sizes.upcast and dtype == torch.float16:
        dtype = torch.float32
    side = sizes.side * (1 if isinstance(network, Decoder) else sizes.factor)
    own = without_memory(network, dtype)
    sample = torch.empty(1, side, side, own.conv_in.weight.shape[1], dtype=dtype, device="meta")
    if coder.cuts(sample):
        return [partial(replace(coder, network=own).in_strips, sample, LARGE)]
    return [coding(own, dtype, (side, side))]


class _Decoding(nn.Module):
    """Latents [B, C, Y, X], already divided by the scaling factor -> pixels from -1 to 1."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, latent_sample: Tensor) -> tuple[Tensor, ...]:
        net: Any = self.net
        return (net.decode(latent_sample, return_dict=False)[0],)


class _Encoding(nn.Module):
    """Pixels [B, 3, Y, X] from -1 to 1 -> mean and log variance of the latents [B, 2C, …]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, sample: Tensor) -> tuple[Tensor, ...]:
        net: Any = self.net
        return (net.encode(sample, return_dict=False)[0].parameters,)


def _parts(net: nn.Module, dtype: torch.dtype, side: int, upcasts: bool) -> tuple[Part, Part]:
    kind, supported = type(net).__name__, ("AutoencoderKL", "AutoencoderKLFlux2")
    if kind not in supported:
        raise UserError(f"vae is a {kind}; supported are {' and '.join(supported)}")
    config: Any = net.config
    source = net
    if upcasts and dtype is torch.float16 and config.force_upcast:
        dtype = torch.float32
    if next(net.parameters()).dtype != dtype:
        net = copy.deepcopy(net).to(dtype)
    factor = 2 ** (len(config.block_out_channels) - 1)
    free, kind, latent = "batch_size", dtype_name(dtype), config.latent_channels
    sizes = ((2, 6, 8), (1, side, side), (3, 5, 7), (2, 9, 4))
    example, *cases = (sides(*size) for size in sizes)
    pixels, *pixel_cases = (sides(b, factor * y, factor * x) for b, y, x in sizes)
    picture = (f"{factor}*height", f"{factor}*width")
    return (
        Part(
            folder="vae_decoder",
            source=source,
            module=_Decoding(net).eval(),
            dtype=dtype,
            inputs=(Port("latent_sample", kind, (free, latent, "height", "width")),),
            outputs=(Port("sample", kind, (free, config.out_channels, *picture)),),
            example=example,
            cases=tuple(cases),
        ),
        Part(
            folder="vae_encoder",
            source=source,
            module=_Encoding(net).eval(),
            dtype=dtype,
            inputs=(Port("sample", kind, (free, config.in_channels, "height", "width")),),
            outputs=(
                Port(
                    "latent_parameters",
                    kind,
                    (free, 2 * latent, f"height//{factor}", f"width//{factor}"),
                ),
            ),
            example=pixels,
            cases=tuple(pixel_cases),
        ),
    )


CODERS = {
    "encoder": Kind(partial(_borrow, borrow=borrow_encoder), _call, _planned, guarded=True),
    "decoder": Kind(
        partial(_borrow, borrow=borrow_decoder),
        _call,
        _planned,
        guarded=True,
        cuts=False,
        notes=_notes,
    ),
}


def _taken(name: str, vae: Any) -> Taken:
    """Only encoder and decoder: slicing, tiling and quant convolutions stay with diffusers."""
    if not of_model(vae, *FAMILY.models):
        return {}
    halves = {half: getattr(plain(vae), half, None) for half in CODERS}
    return {
        f"{name}.{half}".strip("."): (module, CODERS[half])
        for half, module in halves.items()
        if module is not None
    }


def _asked(vae: Any) -> dict[str, str]:
    """diffusers' own memory savers around encoder and decoder, if they are on."""
    rows = {
        "use_tiling": (
            "tiling",
            "by diffusers: overlapping tiles are blended, which changes pictures larger than"
            ' a tile; disable_tiling() and Options(vae_tiling="exact") save memory exactly',
        ),
        "use_slicing": ("slicing", "by diffusers: one picture after another, all unchanged"),
    }
    return dict(row for flag, row in rows.items() if getattr(plain(vae), flag, False) is True)


FAMILY = Family(
    models=("AutoencoderKL", "VQModel", "AutoencoderKLFlux2"),
    taken=_taken,
    left={
        "quant_conv": "a 1×1 convolution of a few channels",
        "post_quant_conv": "a 1×1 convolution of a few channels",
        "bn": "mean and deviation of the latents, once per picture",
        "quantize": "the nearest code of every latent, once per picture",
    },
    asked=_asked,
    parts=_parts,
)
