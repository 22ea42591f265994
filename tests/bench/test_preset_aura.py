"""AuraFlow, Z-Image, Qwen-Image: published sizes, and launches against diffusers' own."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastdiff.bench.gpus import gpu_named
from fastdiff.bench.graph import launched, rows
from fastdiff.bench.preset_aura import AURAFLOW
from fastdiff.bench.presets import blueprint

STATIC = Path(__file__).parents[2] / "benchmarks/static"
# parameters, the latents' side
SIZES = {
    "auraflow": (6_858_605_568, 128),
    "z-image": (6_154_908_736, 128),
    "qwen-image": (20_430_401_088, 128),
}
# launches of diffusers' own step, most launches allowed for ours
LAUNCHES = {"auraflow": (1410, 419), "z-image": (2629, 361), "qwen-image": (11_117, 912)}


def step(name, net):
    """diffusers' own guided step on the meta device."""
    half = {"dtype": torch.float16, "device": "meta"}
    times = torch.empty(2, **half)
    if name == "auraflow":
        latents, text = torch.empty(2, 4, 128, 128, **half), torch.empty(2, 256, 2048, **half)
        return lambda: net(latents, text, times, return_dict=False)
    if name == "z-image":
        latents, captions = (
            torch.empty(2, 16, 1, 128, 128, **half),
            torch.empty(2, 64, 2560, **half),
        )
        return lambda: net([*latents], times.float(), [*captions], return_dict=False)
    latents, text = torch.empty(1, 4096, 64, **half), torch.empty(1, 64, 3584, **half)

    def both():
        shapes = [[(1, 64, 64)]]
        own, other = (
            net(latents, text, None, times[:1], shapes, return_dict=False)[0] for _ in range(2)
        )
        made = other + 4.0 * (own - other)
        norms = (torch.norm(part, dim=-1, keepdim=True) for part in (own, made))
        return made * torch.div(*norms)

    return both


@pytest.mark.parametrize("name", SIZES)
def test_scale_one_has_the_published_sizes(name):
    net, side = blueprint(name)
    assert (sum(weight.numel() for weight in net.parameters()), side) == SIZES[name]


@pytest.mark.parametrize(
    "name", ["auraflow", "z-image", pytest.param("qwen-image", marks=pytest.mark.product)]
)
def test_launches(name):
    """The committed graph is the network's graph; `fastdiff graph` writes it again."""
    (net, side), (theirs, most) = blueprint(name), LAUNCHES[name]
    kept = json.loads((STATIC / f"graph-{name}.json").read_text())
    assert kept["rows"] == [vars(row) for row in rows(net, gpu_named("h200"), torch.float16, side)]
    assert kept["launches"] <= most
    net = torch.nn.Module.to(net, dtype=torch.float16)
    assert len(launched(step(name, net), 90)) == theirs


def test_a_small_auraflow_draws():
    pipe = replace(AURAFLOW, blocks=(1, 1)).pipeline(0.06, torch.float32, "cpu", seed=0)
    pipe.set_progress_bar_config(disable=True)
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    size = {"height": side, "width": side, "num_inference_steps": 1}
    latents = pipe("red heart", **size, output_type="latent").images
    assert latents.shape == (1, 4, side // 8, side // 8)
    assert latents.isfinite().all()
