"""The LDM pipelines (before Stable Diffusion), compiled against eager, in float64."""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LDMSuperResolutionPipeline,
    LDMTextToImagePipeline,
    LMSDiscreteScheduler,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from small import noisy

import fastdiff
from fastdiff.compiler.slot import slot_of

BETAS = {"beta_start": 0.0015, "beta_end": 0.0155, "beta_schedule": "scaled_linear"}
SR = {
    "sample_size": 8,
    "in_channels": 6,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def codes(**config):
    """A VQ autoencoder with 16 codes; a latent is 2×2 pixels."""
    blocks = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return noisy(VQModel(**blocks | {"norm_num_groups": 8, "num_vq_embeddings": 16} | config))


def scheduler():
    return DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)


@pytest.fixture
def text_to_image(components, tokenizer):
    """text_to_image(vqvae): a pipeline with this autoencoder, by default a KL autoencoder."""

    def make(vqvae=None):
        parts = components()
        sizes = {"d_model": 32, "encoder_ffn_dim": 48, "head_dim": 16, "encoder_layers": 1}
        heads = {"vocab_size": len(tokenizer), "encoder_attention_heads": 2}
        bert = noisy(LDMBertModel(LDMBertConfig(**sizes, **heads)))
        vqvae = vqvae or parts["vae"]
        return LDMTextToImagePipeline(
            vqvae.double(), bert.double(), tokenizer, parts["unet"], scheduler()
        )

    return make


def upscaler(scheduler):
    unet = noisy(UNet2DModel(**SR)).double()
    return LDMSuperResolutionPipeline(codes().double(), unet, scheduler)


def picture(count=1, rows=8, columns=8):
    generator = torch.Generator().manual_seed(count)
    return 2 * torch.rand(count, 3, rows, columns, generator=generator, dtype=torch.float64) - 1


@pytest.mark.filterwarnings("ignore:The `scale_model_input` function:UserWarning")
def test_text_to_image(text_to_image, hold):
    pipe = text_to_image()
    small = {"height": 40, "width": 64, "output_type": "np"}
    single = hold(pipe, "plan", **small, guidance_scale=1.0, num_inference_steps=2)
    # unlike other pipelines, it uses guidance below 1, too
    guided = hold(pipe, "plan", **small, guidance_scale=0.5, num_inference_steps=2)
    assert not np.allclose(single, guided)
    two = {"prompt": ["a star", "a moon"], "eta": 0.6}  # its noise ignores the generator
    hold(pipe, "plan", **small, **two, num_inference_steps=2)
    given = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    kept = given.clone()
    # this scheduler scales inputs, but the pipeline's loop never calls scale_model_input
    pipe.scheduler = LMSDiscreteScheduler(**BETAS)
    hold(pipe, "plan", 2e-6, **small, latents=given)
    assert torch.equal(given, kept)


def test_text_to_image_with_a_vq_autoencoder(text_to_image, hold):
    pipe = text_to_image(codes(latent_channels=4, lookup_from_codebook=True))
    hold(pipe, "plan", height=64, width=64, output_type="np")
    assert {"vqvae.encoder", "vqvae.decoder"} < {part.name for part in fastdiff.report(pipe).parts}
    assert slot_of(pipe.vqvae.decoder).fast == 1


def test_super_resolution(hold):
    pipe = upscaler(scheduler())
    call = {"prompt": None, "guidance_scale": None, "output_type": "np"}
    first = hold(pipe, "plan", **call, image=picture())
    assert not np.allclose(first, hold(pipe, "plan", **call, image=-picture()))
    hold(pipe, "plan", **call, image=picture(3, 6, 4), eta=0.5, num_inference_steps=2)
    pipe.scheduler = EulerDiscreteScheduler(**BETAS)
    hold(pipe, "constant channels in every step", 2e-6, **call, image=picture())


@torch.no_grad()
@pytest.mark.parametrize("quantizes", [True, False])
def test_a_bare_vq_autoencoder(quantizes, budget):
    """fastdiff computes the encoder and the decoder, diffusers finds the nearest codes."""
    vqvae = codes(vq_embed_dim=5)
    eager = copy.deepcopy(vqvae)
    fastdiff.compile(vqvae)

    class Both(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            latents = self.net.encode(x).latents
            return self.net.decode(latents, force_not_quantize=not quantizes).sample

    for shape in ((1, 3, 16, 12), (3, 3, 10, 6)):
        budget(Both(vqvae), Both(eager), torch.rand(shape) * 2 - 1)
    assert (slot_of(vqvae.encoder).fast, slot_of(vqvae.decoder).fast) == (2, 2)


@torch.no_grad()
def test_a_decoder_with_norms_of_the_latents_runs_eagerly():
    blocks = {"up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")}
    movq = codes(**blocks, norm_type="spatial", block_out_channels=(32, 32))
    x = torch.rand(1, 3, 16, 16)
    want = movq(x).sample
    fastdiff.compile(movq)
    with pytest.warns(RuntimeWarning, match=r"decoder runs eagerly: norms that read the latents"):
        got = movq(x).sample
    assert slot_of(movq.encoder).fast == 1
    assert slot_of(movq.decoder).fast == 0
    torch.testing.assert_close(got, want)
