"""Presets are the real architectures: their published sizes at scale 1, their structure below."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from fastdiff.bench.presets import PRESETS, build, unet_config, vae_config
from fastdiff.bench.timing import Request, draw
from fastdiff.errors import UserError

# Parameters of the published checkpoints' U-Nets.
PUBLISHED = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}
VAE = 83_653_863


def count(cls, config):
    with torch.device("meta"):
        return sum(weight.numel() for weight in cls(**config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_scale_one_has_the_published_number_of_parameters(name):
    preset = PRESETS[name]
    config = unet_config(preset, 1.0, list(preset.texts))
    assert count(UNet2DConditionModel, config) == PUBLISHED[name]
    assert count(AutoencoderKL, vae_config(preset, 1.0)) == VAE


@pytest.mark.parametrize(
    ("name", "scale", "widths"),
    [
        ("sd15", 1 / 8, {40, 80, 160}),
        ("sd21", 0.2, {64}),
        ("sdxl", 0.2, {64}),
        ("tiny", 0.5, {40, 80, 160}),
    ],
)
def test_scaled_down_it_still_draws_with_the_real_head_widths(name, scale, widths):
    pipe = build(name, scale, torch.float32, "cpu")
    pipe.set_progress_bar_config(disable=True)
    full = unet_config(PRESETS[name], 1.0, list(PRESETS[name].texts))
    for key in ("down_block_types", "up_block_types", "transformer_layers_per_block"):
        assert list(pipe.unet.config[key]) == full[key]
    attentions = [m for m in pipe.unet.modules() if type(m).__name__ == "Attention"]
    assert {m.inner_dim // m.heads for m in attentions} == widths

    outputs = []
    hook = pipe.unet.register_forward_hook(lambda *call: outputs.append(call[-1][0]))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawing = draw(pipe, Request("red heart", 1, 64, 64, latents, seed=0))
    hook.remove()
    assert outputs[0].shape[0] == 2
    assert 0.2 < outputs[0].std() < 5
    assert torch.isfinite(drawing.image).all()
    assert drawing.image.std() > 0.01


def test_the_same_seed_builds_the_same_weights():
    first, second = (build("tiny", 0.5, torch.float32, "cpu", seed=3) for _ in range(2))
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(pipe, part).state_dict() for pipe in (first, second))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("name", "scale"), [("sd9", 1.0), ("sd15", 0.0), ("sd15", 2.0)])
def test_unknown_names_and_scales(name, scale):
    with pytest.raises(UserError, match="--preset is 'sd9'|--scale is"):
        build(name, scale, torch.float32, "cpu")
