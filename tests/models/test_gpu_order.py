"""The networks with the calls that a GPU gets, run on a CPU: sums are left to the next norm, skip
connections are not concatenated, GEGLU takes two calls."""

import copy
from importlib import import_module

import pytest
import torch
from covered import covered
from diffusers import AutoencoderKL, PriorTransformer, UNet2DConditionModel
from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0
from small import NETWORKS, PRIOR, SD15, inputs_for, noisy, shallow

from fastdiff.kernels.contract import judge
from fastdiff.kernels.dispatch import all_kernels
from fastdiff.models import (
    Loan,
    PriorConditions,
    blocks,
    borrow,
    borrow_decoder,
    borrow_encoder,
    borrow_prior,
    borrow_unet,
    resnets,
    sums,
)
from fastdiff.models.trunk import Conditions

DECIDES = (resnets, sums)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for module in DECIDES:
        monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    geglu = all_kernels()["geglu"]
    monkeypatch.setattr(import_module("fastdiff.kernels.geglu"), "_op", geglu.library)
    monkeypatch.setattr(borrow, "NATIVE", None)  # weights are stored as GPU libraries want them


@pytest.fixture
def in_triton(monkeypatch, as_on_a_gpu):
    """Every kernel that has one runs as its Triton kernel, under the interpreter."""
    for name, kernel in all_kernels().items():
        if "triton" in kernel.implementations:
            module = import_module(f"fastdiff.kernels.{name}")
            monkeypatch.setattr(module, "_op", kernel.implementations["triton"]())


def hold_unet(budget, config, shape, dtype=torch.float32, perturbed=""):
    """Check a guided step as the loop calls it: one picture with two texts and, if `perturbed`, the
    second text again, with perturbed attention in the blocks whose names start with `perturbed`.
    Channels beside the latents are constant."""
    torch.manual_seed(1)
    module = UNet2DConditionModel(**config).eval().to(dtype)
    processor = PAGCFGIdentitySelfAttnProcessor2_0()
    for name, part in module.named_modules() if perturbed else ():
        if name.startswith(perturbed) and name.endswith("attn1"):
            part.processor = processor
    eager = copy.deepcopy(module)
    network = borrow_unet(module, Loan(module))
    sample, text, added = inputs_for(module, (2, *shape), dtype)
    sample, labels, others = sample[:1], None, config.get("in_channels", 4) - 4
    constant = torch.randn(1, others, *shape, dtype=dtype) if others else None
    if module.class_embedding is not None:
        labels = torch.tensor([3])
    if perturbed:
        text = torch.cat([text, text[1:]])
        added = added and {name: torch.cat([value, value[1:]]) for name, value in added.items()}

    def run(sample, timestep, text):
        options = dict(added or {}, repeats=bool(perturbed))
        options |= {"class_labels": labels, "constant_channels": constant}
        given, sides = Conditions(text, **options), sample.shape[2:]
        (row,), constants = network.hoist(given, timestep.reshape(1, 1), sides)
        x = network.pack(sample).contiguous()
        return network.unpack(network.predict(x, row, constants), sides)

    class Eager(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = eager

        def forward(self, sample, timestep, text):
            given = {k: v.to(sample.dtype) for k, v in (added or {}).items()}
            if constant is not None:
                sample = torch.cat([sample, constant.to(sample.dtype)], dim=1)
            both = sample.repeat(len(text), 1, 1, 1)
            more = {"added_cond_kwargs": given or None, "class_labels": labels}
            return self.unet(both, timestep, text, **more)

    budget(run, Eager(), sample, torch.tensor(301), text)


@pytest.mark.parametrize("shape", [(16, 16), (9, 5)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_unet(name, shape, as_on_a_gpu, budget):
    hold_unet(budget, NETWORKS[name], shape)


@pytest.mark.parametrize(("name", "where"), [("sdxl", "mid_block"), ("sd15", "down_blocks.0")])
def test_unet_with_perturbed_attention(name, where, as_on_a_gpu, budget):
    hold_unet(budget, shallow(name), (9, 5), perturbed=where)


def test_unet_of_an_upscaler(as_on_a_gpu, budget):
    more = {"in_channels": 7, "num_class_embeds": 9, "only_cross_attention": (True, False)}
    hold_unet(budget, shallow("sd21") | more, (9, 5))


def test_unet_in_half_precision(as_on_a_gpu, budget):
    hold_unet(budget, SD15, (16, 16), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("config", "shape"),
    [
        pytest.param(shallow("sd15"), (8, 12), id="two blocks"),
        pytest.param(SD15, (16, 16), id="all blocks", marks=pytest.mark.product),
    ],
)
def test_unet_of_triton_kernels(config, shape, dtype, in_triton, budget):
    hold_unet(budget, config, shape, dtype)


def autoencoder():
    return AutoencoderKL(
        block_out_channels=(32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=16,
    ).eval()


def test_autoencoder(in_triton, budget):
    vae = autoencoder()
    eager = copy.deepcopy(vae)
    decoder = borrow_decoder(vae.decoder, Loan(vae.decoder))
    encoder = borrow_encoder(vae.encoder, Loan(vae.encoder))
    budget(decoder, eager.decoder, torch.randn(1, 4, 8, 8))
    budget(encoder, eager.encoder, torch.randn(1, 3, 19, 16))


@pytest.mark.parametrize(
    ("share", "dtype"), covered([0.24, 0.05], [torch.float32, torch.float16], together=1)
)
def test_decoder_in_strips(share, dtype, in_triton, budget):
    vae = autoencoder().to(dtype)
    eager = copy.deepcopy(vae)
    decoder = borrow_decoder(vae.decoder, Loan(vae.decoder))

    def run(sample):
        x = blocks.channels_last(sample)
        bytes = int(share * decoder.bytes(x))
        return blocks.channels_first(decoder.run_in_strips(x, bytes))

    budget(run, eager.decoder, torch.randn(1, 4, 7, 6).to(dtype))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prior_of_triton_kernels(dtype, in_triton):
    """Two pictures with guidance: their tokens form one sequence, with a row of the mask for each
    token."""
    module = noisy(PriorTransformer(**PRIOR | {"num_layers": 2})).to(dtype)
    mine = copy.deepcopy(module)
    network = borrow_prior(mine, Loan(mine))
    x, text = torch.randn(2, 24).to(dtype), torch.randn(4, 7, 24).to(dtype)
    mask = torch.arange(7)[None] < torch.tensor([[2], [7], [1], [5]])
    given = PriorConditions(text[:, 3], text, mask)
    rows, constants = network.hoist(given, torch.tensor([[301]]), ())
    ours = network.predict(x, rows[0], constants)
    exact = PriorConditions(given.proj_embedding.double(), text.double(), mask)
    both = torch.cat([x, x])
    eager = module(both, 301, *given)[0]
    truth = copy.deepcopy(module).double()(both.double(), 301, *exact)[0]
    verdict = judge("prediction", ours, eager, truth)
    assert verdict.passed, verdict
