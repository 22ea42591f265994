"""DiT-XL/2 and PixArt-Σ-XL/2: published sizes, and launches against diffusers' own."""

import json
from pathlib import Path

import pytest
import torch

from fastdiff.bench.gpus import gpu_named
from fastdiff.bench.graph import launched, rows
from fastdiff.bench.presets import blueprint

STATIC = Path(__file__).parents[2] / "benchmarks/static"
# parameters, the latents' side
SIZES = {
    "dit-256": (749_826_464, 32),  # 675 M and 27 more embeddings: diffusers has one per block
    "dit-512": (749_826_464, 64),
    "pixart-sigma": (610_856_096, 128),
    "pixart-alpha": (611_349_152, 128),
}
# launches of diffusers' own step, most launches allowed for ours
LAUNCHES = {"dit-256": (1148, 230), "pixart-sigma": (872, 300)}


@pytest.mark.parametrize("name", SIZES)
def test_scale_one_has_the_published_sizes(name):
    net, side = blueprint(name)
    assert (sum(weight.numel() for weight in net.parameters()), side) == SIZES[name]


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(name):
    """The committed graph is the network's graph; `fastdiff graph` writes it again."""
    (net, side), (theirs, most) = blueprint(name), LAUNCHES[name]
    kept = json.loads((STATIC / f"graph-{name}.json").read_text())
    assert kept["rows"] == [vars(row) for row in rows(net, gpu_named("h200"), torch.float16, side)]
    assert kept["launches"] <= most
    net = torch.nn.Module.to(net, dtype=torch.float16)
    half = {"dtype": torch.float16, "device": "meta"}
    latents, steps = torch.empty(2, 4, side, side, **half), torch.zeros(2, device="meta").long()
    conditions = {"class_labels": steps}
    if name == "pixart-sigma":
        conditions = {
            "encoder_hidden_states": torch.empty(2, 300, 4096, **half),
            "encoder_attention_mask": torch.empty(2, 300, **half),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
    run = lambda: net(latents, timestep=steps, **conditions, return_dict=False)  # noqa: E731
    assert len(launched(run, 90)) == theirs
