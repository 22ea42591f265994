"""Presets are the real architectures: published sizes at scale 1, the same structure below."""

import pytest
import torch
from diffusers import AutoencoderKL

import fastdiff
from fastdiff.bench.calls import latents_of
from fastdiff.bench.pipelines import check_size
from fastdiff.bench.pixels import decodes_with
from fastdiff.bench.presets import PRESETS, autoencoder, blueprint, build
from fastdiff.bench.receipt import PICTURE_FLOOR
from fastdiff.bench.timing import Request, draw
from fastdiff.compiler.pipelines import loop_of
from fastdiff.errors import UserError

# Parameters of the published checkpoints' U-Nets; ldm's and x4's are counted from their sizes.
PUBLISHED = {
    "sd15": 859_520_964,
    "sd21": 865_910_724,
    "sdxl": 2_567_463_684,
    "ldm": 872_300_484,
    "x4": 473_398_020,
}
VAE = {"x4": 55_325_927}
"""Parameters of the VAE; the presets not named here share one."""


def count(net):
    return sum(weight.numel() for weight in net.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_scale_one_has_the_published_number_of_parameters(name):
    net, side = blueprint(name)
    assert side == net.config.sample_size == PRESETS[name].latent_size
    assert count(net) == PUBLISHED[name]
    vae = autoencoder(PRESETS[name])
    assert isinstance(vae, AutoencoderKL)
    assert count(vae) == VAE.get(name, 83_653_863)


@pytest.mark.parametrize(
    ("name", "scale", "widths"),
    [
        ("sd15", 1 / 8, {40, 80, 160}),
        ("sd21", 0.2, {64}),
        ("sdxl", 0.2, {64}),
        ("tiny", 0.5, {40, 80, 160}),
        ("x4", 1 / 8, {64, 128}),
    ],
)
def test_a_small_preset_draws_with_the_real_head_widths(name, scale, widths):
    pipe = build(name, scale, torch.float32, "cpu")
    pipe.set_progress_bar_config(disable=True)
    _, full = PRESETS[name].network(1.0)
    for key in ("down_block_types", "up_block_types", "transformer_layers_per_block"):
        assert list(pipe.unet.config[key]) == full[key]
    attentions = [m for m in pipe.unet.modules() if type(m).__name__ == "Attention"]
    assert {m.inner_dim // m.heads for m in attentions} == widths

    outputs = []
    hook = pipe.unet.register_forward_hook(lambda *call: outputs.append(call[-1][0]))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    side = 8 * pipe.vae_scale_factor
    drawing = draw(pipe, Request("red heart", 1, side, side, latents, seed=0))
    hook.remove()
    assert outputs[0].shape[0] == 2
    assert 0.2 < outputs[0].std() < 5
    assert torch.isfinite(drawing.image).all()
    assert drawing.image.std() > 0.01


def test_the_prior_has_karlos_billion_parameters():
    net, side = blueprint("prior")
    assert (count(net), side) == (1_022_030_080, 0)
    assert autoencoder(PRESETS["prior"]) is None


# shape of the smallest picture of each preset; the prior makes an embedding
LEAST = {
    "dit-256": (64, 64, 3),
    "pixart-alpha": (64, 64, 3),
    "unclip": (8, 8, 3),
    "kandinsky22": (64, 64, 3),
    "if": (8, 8, 3),
    "prior": (64,),
    "flux": (64, 64, 3),
    "flux2": (64, 64, 3),
    "z-image": (64, 64, 3),
    "qwen-image": (64, 64, 3),
}


@pytest.mark.parametrize("name", LEAST)
def test_each_other_preset_draws_eagerly_and_compiled(name):
    """Each call has the arguments of its pipeline, and the VAE's time is kept apart from the
    steps'."""
    pipe = build(name, 0.03, torch.float32, "cpu")
    pipe.set_progress_bar_config(disable=True)
    height, width = check_size(pipe, None, None)
    latents = latents_of(pipe, height, width, seed=0)
    request = Request("red heart", 2, height, width, latents, seed=0)
    drawing = draw(pipe, request)
    assert drawing.image.shape == LEAST[name]
    assert torch.isfinite(drawing.image).all()
    assert 0.01 < drawing.image.std() < 5
    assert (drawing.decode_ms > 0) == (decodes_with(pipe) is not None)
    assert 2 * drawing.step_ms == pytest.approx(drawing.image_ms - drawing.decode_ms)
    fastdiff.compile(pipe)
    apart = draw(pipe, request).image - drawing.image
    assert apart.square().mean().sqrt() < PICTURE_FLOOR
    assert (loop_of(pipe).planned, dict(loop_of(pipe).own)) == (2 if name == "unclip" else 1, {})


def test_a_small_latent_diffusion_draws():
    """Its pipeline returns no latents and always decodes."""
    pipe = build("ldm", 1 / 8, torch.float32, "cpu")
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawing = draw(pipe, Request("red heart", 1, 64, 64, latents, seed=0))
    assert drawing.image.shape == (64, 64, 3)
    assert drawing.image.std() > 0.01
    assert 0 < drawing.decode_ms < drawing.image_ms


def test_the_same_seed_builds_the_same_weights():
    first, second = (build("tiny", 0.5, torch.float32, "cpu", seed=3) for _ in range(2))
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(pipe, part).state_dict() for pipe in (first, second))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("name", "scale", "sentence"),
    [
        ("sd9", 1.0, "--preset is 'sd9'; choose one of sd15, .*, sd3, sd35-medium, sd35-large, "),
        ("sd35", 1.0, "--preset is 'sd35'"),
        ("sd15", 0.0, "--scale is 0; it must be above 0"),
        ("sd15", 2.0, "--scale is 2; .* at most 1"),
        ("sd3", -0.1, "--scale is -0.1"),
        ("sd35-large", float("nan"), "--scale is nan"),
    ],
)
def test_unknown_names_and_scales(name, scale, sentence):
    with pytest.raises(UserError, match=sentence):
        build(name, scale, torch.float32, "cpu")


def test_an_unknown_name_has_no_blueprint():
    with pytest.raises(UserError, match="--preset is 'sd9'; choose one of"):
        blueprint("sd9")
