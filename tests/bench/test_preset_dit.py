"""DiT-XL/2: its size, and its launches beside diffusers' own."""

import json
from pathlib import Path

import pytest
import torch

from fastdiff.bench.gpus import gpu_named
from fastdiff.bench.graph import launched, rows
from fastdiff.bench.presets import blueprint, build
from fastdiff.errors import UserError

STATIC = Path(__file__).parents[2] / "benchmarks/static"
SIDES = {"dit-256": 32, "dit-512": 64}


@pytest.mark.parametrize("name", SIDES)
def test_scale_one_has_the_published_sizes(name):
    """675 M parameters, and 27 times a block's embeddings, which diffusers holds once a block."""
    net, side = blueprint(name)
    assert (sum(weight.numel() for weight in net.parameters()), side) == (749_826_464, SIDES[name])


def test_launches():
    """The committed graph is what the network does now; `fastdiff graph` writes it again."""
    net, side = blueprint("dit-256")
    kept = json.loads((STATIC / "graph-dit-256.json").read_text())
    assert kept["rows"] == [vars(row) for row in rows(net, gpu_named("h200"), torch.float16, side)]
    assert kept["launches"] <= 230
    net = torch.nn.Module.to(net, dtype=torch.float16)
    latents = torch.empty(2, 4, side, side, dtype=torch.float16, device="meta")
    told = [torch.zeros(2, dtype=torch.long, device="meta") for _ in range(2)]
    assert len(launched(lambda: net(latents, *told, return_dict=False), 90)) == 1149


def test_it_is_only_counted():
    with pytest.raises(UserError, match="give them to graph"):
        build("dit-256", 0.1, torch.float32, "cpu")
