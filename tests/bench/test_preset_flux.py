"""FLUX, and what FLUX.2, Z-Image and Qwen-Image need besides: published sizes, launches against
diffusers' own, parts that are no weights, noise."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2, AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

from fastdiff.bench.gpus import gpu_named
from fastdiff.bench.graph import launched, rows
from fastdiff.bench.pixels import noise_as
from fastdiff.bench.presets import PRESETS, blueprint, build

STATIC = Path(__file__).parents[2] / "benchmarks/static"
# parameters, launches of diffusers' own step, launches of ours
COUNTS = {"flux": (11_901_408_320, 2732, 558), "flux2": (32_223_281_152, 2171, 479)}


@pytest.mark.parametrize("name", COUNTS)
def test_launches(name):
    """The committed graph is the network's graph; `fastdiff graph` writes it again."""
    (net, side), (weights, theirs, ours) = blueprint(name), COUNTS[name]
    assert (sum(weight.numel() for weight in net.parameters()), side) == (weights, 128)
    kept = json.loads((STATIC / f"graph-{name}.json").read_text())
    assert kept["case"] == f"{name}, fp16, latents 128×128"
    assert kept["rows"] == [vars(row) for row in rows(net, gpu_named("h200"), torch.float16, side)]
    assert kept["launches"] == ours
    net = torch.nn.Module.to(net, dtype=torch.float16)
    config, half = net.config, {"dtype": torch.float16, "device": "meta"}
    axes, time = len(config.axes_dims_rope), torch.empty(1, device="meta")
    given = {
        "encoder_hidden_states": torch.empty(1, 512, config.joint_attention_dim, **half),
        "img_ids": torch.empty(4096, axes, **half),
        "txt_ids": torch.empty(512, axes, **half),
        "guidance": time,
    }
    if name == "flux":
        given["pooled_projections"] = torch.empty(1, 768, **half)
    latents = torch.empty(1, 4096, config.in_channels, **half)
    assert len(launched(lambda: net(latents, timestep=time, **given), 90)) == theirs


def test_parts_without_memory_get_what_diffusers_gives_them():
    """The running statistics of FLUX.2's autoencoder and Qwen-Image's positions are no weights."""
    coder = build("flux2", 0.01, torch.float32, "cpu").vae
    own = AutoencoderKLFlux2(**dict(coder.config)).bn.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in coder.bn.state_dict().items())
    net = build("qwen-image", 0.01, torch.float32, "cpu").transformer
    own = QwenEmbedRope(10000, [16, 56, 56], scale_rope=True)
    for name in ("pos_freqs", "neg_freqs"):
        assert torch.equal(getattr(net.pos_embed, name), getattr(own, name))


def test_autoencoders_have_the_published_sizes():
    """Those of diffusers' default config."""
    coders = {"flux2": AutoencoderKLFlux2, "qwen-image": AutoencoderKLQwenImage}
    for name, cls in coders.items():
        with torch.device("meta"):
            own, scaled = cls(), cls(**PRESETS[name].coder(1.0))
        shapes = [{key: w.shape for key, w in net.named_parameters()} for net in (own, scaled)]
        assert shapes[0] == shapes[1]


def test_z_images_noise_is_float32_for_a_network_of_any_dtype():
    """Its pipeline asks for float32, so the float64 copy of a bfloat16 one draws float32, too."""
    pipe, drawn = build("z-image", 0.01, torch.bfloat16, "cpu"), []
    for noise in (nullcontext(), noise_as(pipe, torch.bfloat16)):
        with noise:
            given = {"generator": torch.Generator().manual_seed(3), "latents": None}
            drawn.append(pipe.prepare_latents(1, 16, 64, 64, torch.float32, "cpu", **given))
    assert torch.equal(*drawn)
