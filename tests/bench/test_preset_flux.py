"""FLUX.1-dev and FLUX.2-dev: published sizes, and launches against diffusers' own."""

import json
from pathlib import Path

import pytest
import torch

from fastdiff.bench.gpus import gpu_named
from fastdiff.bench.graph import launched, rows
from fastdiff.bench.presets import blueprint, build
from fastdiff.errors import UserError

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


def test_flux2_is_counted_but_not_built():
    with pytest.raises(UserError, match="flux2 can only be counted; use fastdiff graph"):
        build("flux2", 0.1, torch.float32, "cpu")
