"""unCLIP's decoder, Kandinsky 2.2's decoder and DeepFloyd IF's first stage: published sizes, and
launches against diffusers' own."""

import json
from pathlib import Path

import pytest
import torch

from fastdiff.bench.gpus import gpu_named
from fastdiff.bench.graph import launched, rows
from fastdiff.bench.presets import PRESETS, blueprint
from fastdiff.families.unet import example
from fastdiff.models import Loan, borrow_unet

STATIC = Path(__file__).parents[2] / "benchmarks/static"
# parameters, launches of diffusers' own step, most launches allowed for ours
KNOWN = {
    "unclip": (885_439_686, 1096, 400),
    "kandinsky22": (1_253_057_288, 1100, 400),
    "if": (4_304_695_110, 1212, 430),
}
RICHEST = "if"
"""It has all parts of the others, and GELU, a scaled residual and a pooled text."""
NAMES = [
    pytest.param(name, marks=[] if name == RICHEST else [pytest.mark.product]) for name in KNOWN
]


@pytest.mark.parametrize("name", KNOWN)
def test_scale_one_has_the_published_sizes(name):
    net, side = blueprint(name)
    assert (sum(weight.numel() for weight in net.parameters()), side) == (KNOWN[name][0], 64)


@pytest.mark.parametrize("name", NAMES)
def test_launches(name):
    """The committed graph is the network's graph; `fastdiff graph` writes it again."""
    _, theirs, most = KNOWN[name]
    net, side = blueprint(name)
    kept = json.loads((STATIC / f"graph-{name}.json").read_text())
    assert kept["rows"] == [vars(row) for row in rows(net, gpu_named("h200"), torch.float16, side)]
    assert kept["launches"] <= most
    given = example(borrow_unet(net, Loan(net, rehearsal=True)), 2, 77)
    latents = torch.empty(2, net.config.in_channels, side, side, dtype=torch.float16, device="meta")
    added = {"image_embeds": given.image_embeds} if given.image_embeds is not None else None
    conditions = (given.encoder_hidden_states, given.class_labels)
    step = torch.empty(2, device="meta")
    run = lambda: net(latents, step, *conditions, added_cond_kwargs=added)  # noqa: E731
    assert len(launched(run, 90)) == theirs


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("scale", [1e-6, 0.1, 0.77])
def test_any_scale_has_sizes_that_fit_together(name, scale):
    cls, config = PRESETS[name].network(scale)
    with torch.device("meta"):
        net = cls(**config).eval()
    network = borrow_unet(net, Loan(net, rehearsal=True))
    assert all(a.heads * 64 == a.out.weight.shape[0] for a in network.mid.attentions)
    assert network.conv_out.weight.shape[0] == 2 * network.conv_in.weight.shape[1]
