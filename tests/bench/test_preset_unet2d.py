"""Presets that draw pixels without a prompt: published sizes, and each command that takes them."""

import json

import pytest
import torch
from command import run

from fastdiff.bench.pixels import noise_as
from fastdiff.bench.presets import blueprint, build
from fastdiff.bench.receipt import find_truth
from fastdiff.bench.timing import Request, draw

# parameters of google/ddpm-cifar10-32, google/ddpm-celebahq-256, openai/diffusers-cd_imagenet64_l2
PUBLISHED = {
    "ddpm-cifar": (32, 35_746_307),
    "ddpm-256": (256, 113_673_219),
    "consistency-64": (64, 295_899_267),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_scale_one_has_the_published_number_of_parameters(name):
    net, side = blueprint(name)
    assert (side, sum(weight.numel() for weight in net.parameters())) == PUBLISHED[name]


@pytest.mark.parametrize(("name", "side"), [("ddpm-cifar", 8), ("consistency-64", 8)])
def test_a_small_preset_draws_a_picture(name, side):
    pipe = build(name, 0.1, torch.float32, "cpu")
    pipe.set_progress_bar_config(disable=True)
    image = draw(pipe, Request("", 2, side, side, torch.empty(0), seed=0)).image
    assert image.shape == (side, side, 3)
    assert image.std() > 0.01


def test_the_truth_is_drawn_from_the_same_noise():
    """Otherwise the float64 pipeline would sample its own noise and draw another picture."""
    pipe = build("ddpm-cifar", 0.1, torch.float32, "cpu")
    pipe.set_progress_bar_config(disable=True)
    truth = find_truth(pipe, Request("", 3, 8, 8, torch.empty(0), seed=0))
    assert 0 < (truth.picture - truth.picture_eager).abs().max() < 1e-4
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    with noise_as(pipe, torch.float32):
        from diffusers.pipelines.ddpm.pipeline_ddpm import randn_tensor

        drawn = randn_tensor((4,), generator=generators[0], dtype=torch.float64)
    assert torch.equal(drawn, torch.randn(4, generator=generators[1]).double())


SMALL = ("--preset", "ddpm-cifar", "--scale", 0.1)


def test_bench_times_a_preset_and_checks_it_against_float64(tmp_path):
    file = tmp_path / "bench.json"
    code, out, err = run(
        *("bench", *SMALL, "--backends", "fastdiff", "--device", "cpu"),
        *("--rounds", 2, "--steps", 2, "--json", file),
    )
    assert code == 0, err
    assert "ddpm-cifar scale 0.1, float32, cpu, 8×8, 2 steps" in out
    rows = json.loads(file.read_text())["rows"]
    assert [row["backend"] for row in rows] == ["eager", "fastdiff"]
    assert all(row["receipt"]["passed"] for row in rows)
    assert not any(row["decode_samples_ms"] or row["text_samples_ms"] for row in rows)


def test_count_graph_and_roofline_take_the_presets():
    code, out, err = run("count", *SMALL, "--device", "cpu", "--steps", 2)
    assert code == 0, err
    assert "fastdiff" in out
    code, out, err = run("graph", "--preset", "ddpm-cifar")
    assert code == 0, err
    assert "ddpm-cifar, fp16, 32×32 pixels" in out
    code, out, err = run("roofline", *SMALL, "--device", "cpu", "--gpu", "h200", "--dtype", "fp32")
    assert code == 0, err
    assert "up 3" in out
    code, _, err = run("roofline", *SMALL, "--device", "cpu", "--gpu", "h200")
    assert code == 2
    assert "a DDPMPipeline of diffusers returns no bfloat16 picture; give --dtype fp32" in err


def test_another_size_is_refused():
    code, _, err = run("bench", *SMALL, "--height", 64)
    assert (code, err) == (2, err)
    assert "--height is 64; this pipeline draws 8×8 pixels only" in err
