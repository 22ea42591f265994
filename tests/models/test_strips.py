"""Decoders in strips of rows against diffusers' in float64; how much memory and work they take."""

import copy
import weakref
from functools import cache

import pytest
import torch
from covered import covered
from diffusers import AutoencoderKL
from torch.nn.functional import group_norm, silu
from torch.utils._pytree import tree_leaves

from fastdiff.families.vae import SHARE
from fastdiff.kernels.planned import Planning
from fastdiff.models import Loan, borrow_decoder
from fastdiff.models.blocks import channels_first, channels_last
from fastdiff.models.borrow import Norm
from fastdiff.models.strips import Picture, Room, Strips, normed
from fastdiff.models.sums import Sum
from fastdiff.runtime.planned import without_memory

SD15 = {"latent_channels": 4, "block_out_channels": (32, 64, 96, 96), "norm_num_groups": 16}
SDXL = SD15 | {"layers_per_block": 2, "scaling_factor": 0.13025, "force_upcast": True}
SD3 = SD15 | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
NARROWING = SD15 | {"block_out_channels": (48, 32, 80), "layers_per_block": 1}
DECODERS = {
    "sd15": SD15 | {"layers_per_block": 2},
    "sdxl": SDXL,
    "sd3": SD3 | {"layers_per_block": 2},
    "without attention": SD15 | {"mid_block_add_attention": False},
    "narrowing": NARROWING,
    "full": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
}
SHAPES = ((1, 9, 5), (2, 6, 8), (1, 17, 3), (1, 1, 7))
"""Pictures, rows and columns of latents."""
SHARES = (0.9, 0.24, 0.05, 0.002)
"""Limits of memory, as parts of what a decoder needs without strips: some levels in strips, a
quarter, low strips, one row at a time."""


def autoencoder(name="sd15", dtype=torch.float32):
    return copy.deepcopy(made(name)).to(dtype)


@cache
def made(name):
    config = DECODERS[name]
    levels = len(config["block_out_channels"])
    torch.manual_seed(3)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **config,
    ).eval()


def in_strips(decoder, share):
    """The decoder as a function of a tensor [B, C, Y, X], within `share` of the bytes that it takes
    without strips."""

    def run(sample):
        x = channels_last(sample)
        return channels_first(decoder.run_in_strips(x, int(share * decoder.bytes(x))))

    return run


@pytest.mark.parametrize(
    ("name", "shape", "share"),
    covered([name for name in DECODERS if name != "full"], SHAPES, SHARES),
)
def test_decoders_in_strips_are_inside_the_budget(name, shape, share, budget):
    vae = autoencoder(name)
    eager = copy.deepcopy(vae.decoder)
    decoder = borrow_decoder(vae.decoder, Loan(vae.decoder))
    batch, rows, columns = shape
    sample = torch.randn(batch, vae.config.latent_channels, rows, columns)
    budget(in_strips(decoder, share), eager, sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_strips_in_half_precision(dtype, budget):
    vae = autoencoder(dtype=dtype)
    eager = copy.deepcopy(vae.decoder)
    decoder = borrow_decoder(vae.decoder, Loan(vae.decoder))
    budget(in_strips(decoder, 0.1), eager, torch.randn(2, 4, 7, 6).to(dtype))


def test_pooled_moments_are_exact_far_from_zero():
    """Channels of mean 1000 and deviation 0.01: E[t²] - E[t]² would lose every digit."""
    x = torch.randn(1, 24, 10, 32) * 0.01 + 1000
    norm = Norm(torch.rand(32) + 0.5, torch.randn(32), 8, 1e-6)
    picture = Strips(1 << 20).held(Sum(x), 1 << 14)
    assert len(picture.spans) > 2
    got = normed(picture, norm)(3, 20)
    of = x.double().permute(0, 3, 1, 2)
    exact = group_norm(of, 8, norm.weight.double(), norm.bias.double(), 1e-6)
    exact = silu(exact).permute(0, 2, 3, 1)[:, 3:20]
    assert (got - exact).abs().max() < 1e-3


class Memory(Planning):
    """The peak memory and the FLOPs of a network on a GPU, found on tensors without memory."""

    def __init__(self):
        super().__init__(90)
        self.peak = self.flops = self._now = 0
        self._alive = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(op, types, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def planned(self, name, args, kwargs, launches):
        """Keep no launch, because launches hold tensors."""

    def other(self, op, name, args, kwargs, result):
        if name == "bmm":
            self.flops += 2 * result.numel() * args[0].shape[-1]

    def convolution(self, args):
        made, weight = super().convolution(args), args[1]
        self.flops += 2 * made.numel() * weight[0].numel()
        return made

    def _note(self, storage):
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key):
        self._now -= self._alive.pop(key)


# counts at full size; the decoders above are small
@pytest.mark.product
def test_a_picture_of_2048_takes_less_than_a_quarter_of_the_memory_and_not_a_third_more_work():
    """SD1.5's decoder at its own widths in float16, as it runs on a GPU."""
    vae = autoencoder("full")
    decoder = without_memory(borrow_decoder(vae.decoder, Loan(vae.decoder)), torch.float16)
    latents = torch.empty(1, 256, 256, 4, dtype=torch.float16, device="meta")
    with torch.no_grad(), Memory() as whole:
        decoder.run(latents)
    with torch.no_grad(), Memory() as cut:
        decoder.run_in_strips(latents, int(SHARE * decoder.bytes(latents)))
    assert decoder.bytes(latents) == 6 << 30
    assert whole.peak == pytest.approx(6 << 30, rel=0.01)
    assert cut.peak < whole.peak / 4
    assert cut.flops < 1.3 * whole.flops


def test_dropped_rows_free_their_room():
    room = Room(10_000)
    asked = []

    def make(first, last):
        asked.append((first, last))
        return torch.arange(first, last).float().view(1, -1, 1, 1).expand(1, -1, 5, 4).contiguous()

    picture = Picture((7, 5), 2, room, make)
    strips = [strip[0, :, 0, 0].tolist() for strip in picture.strips()]
    assert strips == [[0, 1], [2, 3], [4, 5], [6]]
    assert room.left == 10_000 - 7 * 5 * 4 * 4
    picture.drop(3)
    assert picture.rows(3, 7)[0, :, 0, 0].tolist() == [3, 4, 5, 6]
    assert picture.rows(1, 3)[0, :, 0, 0].tolist() == [1, 2]  # made again
    picture.drop(7)
    assert room.left == 10_000
    assert asked == [(0, 2), (2, 4), (4, 6), (6, 7), (1, 2)]
