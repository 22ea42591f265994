"""The graph of a step: FLOPs against diffusers' network, launches by hand, committed tables."""

import json
import re
from pathlib import Path

import pytest
import torch
from command import run
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastdiff.bench.gpus import gpu_named
from fastdiff.bench.graph import SDPA, launched, rows
from fastdiff.bench.presets import blueprint
from fastdiff.kernels.attention import attention
from fastdiff.kernels.conv2d import conv2d
from fastdiff.kernels.group_norm_silu import group_norm_silu
from fastdiff.kernels.linear import linear

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "benchmarks/static"
README = (ROOT / "README.md").read_text()
TRANSFORMERS = {"sd3": 1217, "sd35-medium": 2323, "sd35-large": 3133}
HALF = {"dtype": torch.float16, "device": "meta"}


def table(preset):
    network, side = blueprint(preset)
    return rows(network, gpu_named("h200"), torch.float16, side)


def test_flops_are_those_of_diffusers_without_the_hoisted_work():
    """SDXL's guidance halves share only conv_in, so only that and the hoisted work is missing."""
    network, side = blueprint("sdxl")
    network = torch.nn.Module.to(network, dtype=torch.float16)
    hoisted = []
    for name, module in network.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            hoisted.append(2 * 2 * 77 * module.weight.numel())
        elif "time_emb" in name or "add_embedding" in name:
            weight = getattr(module, "weight", None)
            hoisted.append(2 * 2 * weight.numel() if weight is not None else 0)
    conv_in = 2 * side * side * network.conv_in.weight.numel()
    added = {
        "text_embeds": torch.empty(2, 1280, **HALF),
        "time_ids": torch.empty(2, 6, **HALF),
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(
            torch.empty(2, 4, side, side, **HALF),
            torch.empty(2, **HALF),
            torch.empty(2, 77, network.config.cross_attention_dim, **HALF),
            added_cond_kwargs=added,
        )
    expected = counter.get_total_flops() - sum(hoisted) - conv_in
    assert sum(row.flops for row in table("sdxl")) == expected


def test_launches_by_hand():
    x, weight = torch.empty(2, 8, 8, 16, **HALF), torch.empty(32, 16, 3, 3, **HALF)
    bias, residual = torch.empty(32, **HALF), torch.empty(2, 8, 8, 32, **HALF)
    pixels, size = 2 * 64, 2
    found = launched(lambda: conv2d(x, weight, bias, residual=residual), 90)
    assert [name for name, _ in found] == [
        "convolution (cuDNN)",
        "torch add (a convolution's bias)",
        "torch add",
    ]
    assert found[0][1].bytes == size * (pixels * (16 + 32) + 9 * 16 * 32)
    assert found[0][1].flops == 2 * pixels * 9 * 16 * 32
    found = launched(lambda: linear(x, weight[:, :, 0, 0], bias), 90)
    assert [name for name, _ in found] == ["matrix product (cuBLAS)"]
    q, k = torch.empty(1, 512, 2, 64, **HALF), torch.empty(1, 512, 2, 64, **HALF)
    (found,) = launched(lambda: attention(q, k, k), 90)
    assert found[0] == SDPA
    assert found[1].flops == 4 * 2 * 512 * 512 * 64
    large = torch.empty(1, 512, 512, 128, **HALF)
    norm = torch.empty(2, 128, **HALF).unbind(0)
    found = launched(lambda: group_norm_silu(large, *norm, 32, 1e-6), 90)
    assert [name for name, _ in found] == [
        "group_norm_silu _statistics_kernel",
        "group_norm_silu _apply_kernel",
    ]
    read, written = (work.bytes / large.nbytes for _, work in found)
    assert 1 < read < 1.01  # the input and its statistics
    assert 1 < written < 1.01  # the second read of the input comes from the cache
    picture = torch.empty(1, 16, 4, 4, **HALF).contiguous(memory_format=torch.channels_last)
    found = launched(lambda: F.interpolate(picture, scale_factor=2.0, mode="nearest"), 90)
    assert [work.bytes for _, work in found] == [5 * picture.nbytes]


UNETS = {"x4": 870, "ldm": 886}
"""Launches of a guided step in diffusers' own U-Nets."""
RICHEST = "sd35-medium"
"""It has all parts of the other transformers, a second attention, and norms of queries and keys."""


def of(presets):
    """Parameters of a test. Only `make test-all` runs the transformers that RICHEST covers, and
    latent diffusion's U-Net, which SD1.5 covers."""
    others = {*TRANSFORMERS, "ldm"} - {RICHEST}
    return [
        pytest.param(name, marks=[pytest.mark.product] if name in others else [])
        for name in presets
    ]


@pytest.mark.parametrize("preset", of(["sd15", "sdxl", "prior", *UNETS, *TRANSFORMERS]))
def test_the_committed_graph_is_the_networks_graph(preset):
    """A change must be intended: `fastdiff graph --preset … --json` writes the file again."""
    kept = json.loads((STATIC / f"graph-{preset}.json").read_text())
    assert kept["rows"] == [vars(row) for row in table(preset)]


@pytest.mark.parametrize("preset", of(TRANSFORMERS))
def test_diffusers_own_transformers_launch_more(preset):
    net, side = blueprint(preset)
    net, config = torch.nn.Module.to(net, dtype=torch.float16), net.config
    given = {
        "hidden_states": torch.empty(2, 16, side, side, **HALF),
        "encoder_hidden_states": torch.empty(2, 333, config.joint_attention_dim, **HALF),
        "pooled_projections": torch.empty(2, config.pooled_projection_dim, **HALF),
        "timestep": torch.empty(2, device="meta"),
    }
    theirs = launched(lambda: net(**given, return_dict=False), 90)
    ours = json.loads((STATIC / f"graph-{preset}.json").read_text())
    launches = TRANSFORMERS[preset]
    assert len(theirs) == launches
    gigabytes = f"{sum(work.bytes for _, work in theirs) / 1e9:.1f}"
    assert {f"{launches:,}", gigabytes} <= set(re.findall(r"[\d.,]*\d", README))
    assert ours["bytes"] < sum(work.bytes for _, work in theirs) / 2
    assert ours["flops"] < sum(work.flops for _, work in theirs)


def test_diffusers_own_prior_launches_more():
    """fastdiff's step computes 3 of the 81 tokens, and reads the same weights."""
    net = torch.nn.Module.to(blueprint("prior")[0], dtype=torch.float16)
    text = torch.empty(2, 77, 768, **HALF)
    wide, mask = text[:, 0].contiguous(), text[..., 0].bool()
    theirs = launched(lambda: net(wide, torch.empty((), device="meta"), wide, text, mask), 90)
    ours = json.loads((STATIC / "graph-prior.json").read_text())
    documented = re.findall(r"[\d.,]*\d", (ROOT / "docs/design.md").read_text())
    assert {str(len(theirs)), str(ours["launches"])} <= set(documented)
    assert 27 * ours["flops"] < sum(work.flops for _, work in theirs)
    assert ours["bytes"] < sum(work.bytes for _, work in theirs)


@pytest.mark.parametrize("preset", of(UNETS))
def test_diffusers_own_unets_launch_more(preset):
    net, side = blueprint(preset)
    net, config = torch.nn.Module.to(net, dtype=torch.float16), net.config
    given = {
        "sample": torch.empty(2, config.in_channels, side, side, **HALF),
        "timestep": torch.empty(2, device="meta"),
        "encoder_hidden_states": torch.empty(2, 77, config.cross_attention_dim, **HALF),
        "class_labels": torch.empty(2, dtype=torch.long, device="meta"),
    }
    theirs = launched(lambda: net(**given, return_dict=False), 90)
    ours = json.loads((STATIC / f"graph-{preset}.json").read_text())
    assert len(theirs) == UNETS[preset]
    assert ours["launches"] < 0.52 * len(theirs)
    assert ours["bytes"] < 0.8 * sum(work.bytes for _, work in theirs)
    assert ours["flops"] < sum(work.flops for _, work in theirs)


@pytest.mark.parametrize("preset", ["sd15", "sdxl"])
def test_the_graph_is_smaller_than_it_was(preset):
    kept = json.loads((STATIC / f"graph-{preset}.json").read_text())
    before = json.loads((ROOT / f"benchmarks/results/graph/{preset}-before.json").read_text())
    for total in ("launches", "bytes", "floor_ms"):
        assert kept[total] < before[total]
    assert kept["flops"] == before["flops"]


def test_command(tmp_path):
    file = tmp_path / "graph.json"
    code, out, _ = run("graph", "--preset", "sd21", "--gpu", "rtx4090", "--json", file)
    document = json.loads(file.read_text())
    assert (code, document["gpu"]) == (0, "rtx4090")
    assert document["launches"] == sum(row["launches"] for row in document["rows"])
    assert "convolution (cuDNN)" in out
    code, _, err = run("graph", "--preset", "sd9")
    assert code == 2
    assert "--preset is 'sd9'" in err
