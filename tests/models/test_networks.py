"""Compact networks against diffusers in float64: real block structures at reduced widths."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from small import NETWORKS, SD15, inputs_for

from fastdiff.models import (
    Loan,
    Unsupported,
    borrow_decoder,
    borrow_encoder,
    borrow_unet,
)
from fastdiff.models.trunk import Conditions
from fastdiff.runtime.denoiser import denoiser

# batch, rows, columns; odd sizes do not divide by the network's factor of downsampling
SHAPES = ((1, 8, 8), (2, 16, 16), (3, 9, 5), (1, 33, 17), (2, 10, 18))


@pytest.fixture(scope="module", params=NETWORKS)
def unet(request):
    torch.manual_seed(1)
    return UNet2DConditionModel(**NETWORKS[request.param]).eval()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unet(unet, shape, budget):
    module = copy.deepcopy(unet)
    network = denoiser(borrow_unet(module, Loan(module)))
    sample, text, added = inputs_for(unet, shape)
    options = {"added_cond_kwargs": added} if added else {}

    def run(sample, timestep, text, added_cond_kwargs=None):
        return network(sample, timestep, Conditions(text, **(added_cond_kwargs or {})))

    class Eager(torch.nn.Module):
        """Casts the nested condition along with the rest when it is made float64."""

        def __init__(self):
            super().__init__()
            self.unet = copy.deepcopy(unet)

        def forward(self, sample, timestep, text, added_cond_kwargs=None):
            added = {k: v.to(sample.dtype) for k, v in (added_cond_kwargs or {}).items()}
            return self.unet(sample, timestep, text, added_cond_kwargs=added or None)

    budget(run, Eager(), sample, torch.tensor(301), text, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unet_in_other_dtypes(dtype, budget):
    torch.manual_seed(1)
    module = UNet2DConditionModel(**SD15).eval().to(dtype)
    eager = copy.deepcopy(module)
    network = denoiser(borrow_unet(module, Loan(module)))
    sample, text, _ = inputs_for(module, (2, 16, 16), dtype)
    budget(lambda s, t, e: network(s, t, Conditions(e)), eager, sample, torch.tensor(301), text)


def test_unet_with_controlnet_residuals_mask_and_lcm_condition(budget):
    module = UNet2DConditionModel(**SD15, time_cond_proj_dim=24).eval()
    eager = copy.deepcopy(module)
    sample, text, _ = inputs_for(module, (2, 16, 16))
    with torch.no_grad():  # the residuals have the shapes of the skips
        x = eager.conv_in(sample)
        shapes = [x.shape]
        emb = torch.zeros(2, 128)
        for block in eager.down_blocks:
            extra = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
            x, skips = block(hidden_states=x, temb=emb, **extra)
            shapes += [skip.shape for skip in skips]
    down = [torch.randn(shape) for shape in shapes]
    middle = torch.randn(x.shape)
    keep = torch.ones(2, 13)
    keep[:, 9:] = 0
    condition = torch.randn(2, 24)
    network = denoiser(borrow_unet(module, Loan(module)))

    class Eager(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = eager

        def forward(self, sample, timestep, text):
            to = sample.dtype
            return self.unet(
                sample,
                timestep,
                text,
                timestep_cond=condition.to(to),
                encoder_attention_mask=keep.to(to),
                down_block_additional_residuals=[r.to(to) for r in down],
                mid_block_additional_residual=middle.to(to),
            )

    def run(sample, timestep, text):
        given = Conditions(
            text,
            timestep_cond=condition,
            encoder_attention_mask=keep,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        )
        return network(sample, timestep, given)

    budget(run, Eager(), sample, torch.tensor(301), text)


@pytest.mark.parametrize("middle_attention", [True, False])
@pytest.mark.parametrize("size", [(1, 16, 16), (2, 9, 7), (3, 1, 5)], ids=str)
def test_autoencoder(size, middle_attention, budget):
    vae = AutoencoderKL(
        block_out_channels=(32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=16,
        mid_block_add_attention=middle_attention,
    ).eval()
    eager = copy.deepcopy(vae)
    batch, rows, columns = size
    decoder = borrow_decoder(vae.decoder, Loan(vae.decoder))
    encoder = borrow_encoder(vae.encoder, Loan(vae.encoder))
    budget(decoder, eager.decoder, torch.randn(batch, 4, rows, columns))
    budget(encoder, eager.encoder, torch.randn(batch, 3, rows * 4 + 3, columns * 4))


def test_demo_networks(demo, budget):
    unet, vae = copy.deepcopy(demo.unet), copy.deepcopy(demo.vae)
    network = denoiser(borrow_unet(unet, Loan(unet)))
    decoder = borrow_decoder(vae.decoder, Loan(vae.decoder))
    for batch, rows, columns in ((2, 16, 16), (1, 72, 40), (3, 33, 17)):
        sample, text = torch.randn(batch, 4, rows, columns), torch.randn(batch, 24, 128)
        budget(
            lambda s, t, e: network(s, t, Conditions(e)),
            demo.unet,
            sample,
            torch.tensor(500),
            text,
        )
    budget(decoder, demo.vae.decoder, torch.randn(2, 4, 16, 16))


@pytest.mark.slow
def test_full_size_sd15_step(budget):
    """860 M parameters, one step at 512²: about two minutes and 12 GB, mostly for float64."""
    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8
    ).eval()
    eager = copy.deepcopy(unet)
    network = denoiser(borrow_unet(unet, Loan(unet)))
    sample, text = torch.randn(1, 4, 64, 64), torch.randn(1, 77, 768)
    budget(lambda s, t, e: network(s, t, Conditions(e)), eager, sample, torch.tensor(981), text)


def test_loan_lends_views_and_takes_them_back():
    module = UNet2DConditionModel(**SD15).eval()
    values = {name: p.detach().clone() for name, p in module.named_parameters()}
    identities = {name: id(p) for name, p in module.named_parameters()}
    loan = Loan(module)
    network = borrow_unet(module, loan)
    block = module.down_blocks[0].attentions[0].transformer_blocks[0]
    assert all(torch.equal(p, values[name]) for name, p in module.named_parameters())
    with torch.no_grad():  # an edit in place is seen by the packed buffer
        block.attn1.to_k.weight[3, 5] = 123.0
    packed = network.downs[0].attentions[0].blocks[0].qkv.weight
    assert (packed == 123.0).nonzero().tolist() == [[32 + 3, 5]]
    assert loan.intact()
    loan.end()
    assert {name: id(p) for name, p in module.named_parameters()} == identities
    assert all(p.is_contiguous() for p in module.parameters())
    owned = [p.untyped_storage() for p in module.parameters()]
    assert all(s.nbytes() == p.nbytes for s, p in zip(owned, module.parameters(), strict=True))
    assert block.attn1.to_k.weight[3, 5] == 123.0


PROJECTED = {"projection_class_embeddings_input_dim": 8}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"class_embed_type": "simple_projection"} | PROJECTED, "class embeddings"),
        ({"act_fn": "mish"}, "SiLU and GELU"),
        ({"down_block_types": ("SimpleCrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)}, "Simple"),
    ],
)
def test_other_structures_are_refused_by_name(change, reason):
    module = UNet2DConditionModel(**(SD15 | change)).eval()
    loan = Loan(module)
    with pytest.raises(Unsupported, match=reason):
        borrow_unet(module, loan)
