"""All kinds of ResnetBlock2D against diffusers in float64."""

import copy
from importlib import import_module

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from small import SD15, noisy
from torch import nn

from fastdiff.kernels.dispatch import all_kernels
from fastdiff.kernels.linear.spec import ACTIVATIONS
from fastdiff.models import Loan, Unsupported, borrow, borrow_unet, resnets, sums
from fastdiff.models.blocks import channels_first, channels_last
from fastdiff.models.resnets import TimeColumns, borrow_resnet
from fastdiff.models.sums import Sum
from fastdiff.models.trunk import Conditions
from fastdiff.runtime.denoiser import denoiser

SIZES = {"in_channels": 24, "temb_channels": 20, "groups": 4}
MODULATED = {"time_embedding_norm": "scale_shift"}
IMAGEN = {"non_linearity": "gelu", "skip_time_act": True, "output_scale_factor": 2**0.5}
KINDS = {
    "plain": {},
    "scale and shift": MODULATED,
    "pooling": {"down": True} | MODULATED,
    "pooling, more channels": {"down": True, "out_channels": 40},
    "enlarging": {"up": True} | MODULATED,
    "enlarging, fewer channels": {"up": True, "out_channels": 12} | IMAGEN,
    "DeepFloyd IF's": MODULATED | IMAGEN,
    "GELU before the projection": {"non_linearity": "gelu"},
}
SHAPES = ((1, 8, 8), (2, 5, 7), (3, 2, 9))


class Block(nn.Module):
    """A resnet, called with a picture and a time embedding."""

    def __init__(self, **options):
        super().__init__()
        self.resnet = ResnetBlock2D(**SIZES | options)

    def forward(self, x, embedding):
        return self.resnet(x, embedding)


def ours(block, resample=""):
    loan = Loan(block)
    columns = TimeColumns(loan)
    resnet = borrow_resnet(block.resnet, loan, columns, resample)
    rows = loan.linear(*columns.layers)

    def run(x, embedding):
        given = nn.functional.linear(ACTIVATIONS[columns.act](embedding), rows.weight, rows.bias)
        return channels_first(resnet(Sum(channels_last(x)), given).closed())

    return run


def resampling(kind):
    return {"pooling": "down", "enlarging": "up"}.get(kind.partition(",")[0], "")


def hold(kind, shape, budget):
    block = noisy(Block(**KINDS[kind]))
    run = ours(copy.deepcopy(block), resampling(kind))
    batch, rows, columns = shape
    budget(run, block, torch.randn(batch, 24, rows, columns), torch.randn(batch, 20))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_resnet(kind, shape, budget):
    hold(kind, shape, budget)


@pytest.mark.parametrize("kind", KINDS)
def test_resnet_in_the_order_of_a_gpu(kind, budget, monkeypatch):
    """Sums are left to the next norm, and Triton kernels run in the interpreter."""
    for module in (resnets, sums):
        monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(borrow, "NATIVE", None)
    for name in ("group_norm_silu", "residual"):
        kernel = all_kernels()[name].implementations["triton"]()
        monkeypatch.setattr(import_module(f"fastdiff.kernels.{name}"), "_op", kernel)
    hold(kind, (2, 4, 6), budget)


@pytest.mark.parametrize(
    ("options", "resample", "why"),
    [
        ({"down": True}, "", "a resnet that resamples down there"),
        ({"up": True}, "down", "a resnet that resamples up there"),
        ({}, "up", "a resnet that resamples nothing there"),
        ({"down": True, "kernel": "fir"}, "down", "where a Downsample2D was expected"),
        ({"up": True, "kernel": "sde_vp"}, "up", "where a Upsample2D was expected"),
        ({"non_linearity": "mish"}, "", "an activation other than SiLU and GELU"),
        ({"output_scale_factor": 0.0}, "", "an output_scale_factor of 0.0"),
        ({"temb_channels": None}, "", "a missing or unexpected time embedding"),
    ],
    ids=str,
)
def test_other_resnets_are_refused(options, resample, why):
    with pytest.raises(Unsupported, match=why):
        ours(noisy(Block(**options)), resample)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda r: setattr(r.downsample.conv, "ceil_mode", True), r"\(2, 2, 0, True\)"),
        (lambda r: setattr(r.downsample.conv, "divisor_override", 3), "pooling by kernel"),
        (lambda r: setattr(r, "time_embedding_norm", "default"), "another width than the resnet"),
        (lambda r: setattr(r, "nonlinearity", nn.GELU("tanh")), "a GELU approximated by tanh"),
    ],
    ids=("ceil", "divisor", "norm", "gelu"),
)
def test_edits_that_change_the_result_are_refused(edit, why):
    block = noisy(Block(down=True, **MODULATED))
    edit(block.resnet)
    with pytest.raises(Unsupported, match=why):
        ours(block, "down")


def test_a_unet_of_such_resnets_that_attends_to_a_text(budget):
    """unCLIP's blocks without attention, an activation on the time embedding, GELU everywhere."""
    config = SD15 | {
        "down_block_types": ("CrossAttnDownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 64, 96),
        "resnet_time_scale_shift": "scale_shift",
        "act_fn": "gelu",
        "time_embedding_act_fn": "gelu",
        "layers_per_block": 1,
    }
    eager = noisy(UNet2DConditionModel(**config))
    network = denoiser(borrow_unet(module := copy.deepcopy(eager), Loan(module)))
    sample, text = torch.randn(2, 4, 8, 12), torch.randn(2, 5, 48)
    budget(lambda s, t, e: network(s, t, Conditions(e)), eager, sample, torch.tensor(301), text)
    with pytest.raises(Unsupported, match=r"latents of \(6, 8\), which are not multiples of 4"):
        network(torch.randn(1, 4, 6, 8), torch.tensor(1), Conditions(text[:1]))


def test_resnets_that_read_different_activations_are_refused():
    """For example if the middle block sets skip_time_act and the others do not."""
    config = SD15 | {"time_embedding_act_fn": "silu", "layers_per_block": 1}
    module = UNet2DConditionModel(**config).eval()
    module.mid_block.resnets[0].skip_time_act = True
    with pytest.raises(Unsupported, match="time embeddings differ in their activation"):
        borrow_unet(module, Loan(module, rehearsal=True))
