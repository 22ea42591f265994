"""FLUX.1-dev: its size, and its launches beside diffusers' own."""

import json
from pathlib import Path

import pytest
import torch

from fastdiff.bench.gpus import gpu_named
from fastdiff.bench.graph import launched, rows
from fastdiff.bench.presets import blueprint, build
from fastdiff.errors import UserError

KEPT = Path(__file__).parents[2] / "benchmarks/static/graph-flux.json"


def test_launches():
    """The committed graph is what the network does now; `fastdiff graph` writes it again."""
    net, side = blueprint("flux")
    assert (sum(weight.numel() for weight in net.parameters()), side) == (11_901_408_320, 128)
    kept = json.loads(KEPT.read_text())
    assert kept["case"] == "flux, fp16, latents 128×128"
    assert kept["rows"] == [vars(row) for row in rows(net, gpu_named("h200"), torch.float16, side)]
    assert kept["launches"] <= 600
    net = torch.nn.Module.to(net, dtype=torch.float16)
    half = {"dtype": torch.float16, "device": "meta"}
    told = {"encoder_hidden_states": (512, 4096), "pooled_projections": (768,)}
    given = {name: torch.empty(1, *shape, **half) for name, shape in told.items()}
    given |= {"img_ids": torch.empty(4096, 3, **half), "txt_ids": torch.empty(512, 3, **half)}
    time = torch.empty(1, device="meta")
    latents = torch.empty(1, 4096, 64, **half)
    run = lambda: net(latents, timestep=time, guidance=time, **given)  # noqa: E731
    assert len(launched(run, 90)) == 2732


def test_it_is_only_counted():
    with pytest.raises(UserError, match="give it to graph"):
        build("flux", 0.1, torch.float32, "cpu")
