"""The receipt against closed forms, skimage and a pipeline in float64 throughout."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from fastdiff.bench.receipt import PICTURE_FACTOR, STEP_FACTOR, Step, Truth, check, psnr, run_step
from fastdiff.bench.timing import GUIDANCE_SCALE
from fastdiff.demo import load_demo

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def plain():
    """A truth with round numbers: eager's error is 0.001 in a step and 0.01 in the picture."""
    picture = torch.rand(16, 16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    output = torch.linspace(-4, 4, 64, dtype=torch.float64).reshape(2, 2, 4, 4)
    return Truth(
        step=Step((), {}),
        picture=picture,
        picture_eager=picture + 0.01,
        output=output,
        outputs_eager=(output + 0.0005, output - 0.001),
        eps=EPS,
    )


def test_psnr_of_a_known_offset_and_against_skimage():
    a = np.random.default_rng(0).uniform(0, 0.8, (16, 16, 3))
    assert psnr(a, a + 0.1) == pytest.approx(20.0)
    b = np.random.default_rng(1).uniform(0, 1, (16, 16, 3))
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0))
    assert psnr(a, a) == math.inf


def test_figures_for_a_known_picture_and_step(plain):
    receipt = check(plain.picture, plain.output + 0.0015, plain)
    assert receipt.max_abs == pytest.approx(0.01)
    assert receipt.psnr_db == pytest.approx(40.0)
    assert receipt.picture_rms_vs_fp64 == 0
    assert receipt.picture_rms_eager_vs_fp64 == pytest.approx(0.01)
    assert receipt.err_vs_fp64 == pytest.approx(0.0015)
    assert receipt.err_eager_vs_fp64 == pytest.approx(0.001)  # the worse of eager's two layouts
    assert receipt.budget == pytest.approx(2 * (0.001 + EPS * 4))
    assert receipt.passed


def test_the_same_picture_has_ssim_one(plain):
    receipt = check(plain.picture_eager, plain.outputs_eager[0], plain)
    assert receipt.ssim == pytest.approx(1.0)
    assert receipt.psnr_db == math.inf


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(
    ("picture_off", "output_off", "passed"),
    [
        (0.0, STEP_FACTOR * 0.001, True),
        (0.0, STEP_FACTOR * 0.00101, False),
        (PICTURE_FACTOR * 0.0099, 0.0, True),
        (PICTURE_FACTOR * 0.0101, 0.0, False),
        (math.nan, 0.0, False),
        (0.0, math.nan, False),
        (math.inf, 0.0, False),
    ],
)
def test_each_limit_alone_fails_the_receipt(plain, picture_off, output_off, passed):
    picture = plain.picture.clone()
    picture += picture_off
    output = plain.output + torch.where(plain.output == 4, output_off, 0.0)
    assert check(picture, output, plain).passed is passed


def test_a_quarter_of_an_eight_bit_level_passes(plain):
    exact = replace(plain, picture_eager=plain.picture)
    assert check(plain.picture + 0.0009, plain.output, exact).passed
    assert not check(plain.picture + 0.0011, plain.output, exact).passed


def test_the_truth_is_what_a_float64_pipeline_draws(truth, request_):
    pipe = load_demo(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(
        request_.prompt,
        num_inference_steps=request_.steps,
        guidance_scale=GUIDANCE_SCALE,
        latents=request_.latents.double(),
        output_type="pt",
    ).images[0]
    torch.testing.assert_close(truth.picture, picture.permute(1, 2, 0), atol=1e-7, rtol=0)


def test_the_step_is_one_call_of_the_guided_batch(truth, demo):
    assert truth.step.args[0].shape == (2, 4, 16, 16)
    torch.testing.assert_close(run_step(demo.unet, truth.step), truth.outputs_eager[0])
    for eager in truth.outputs_eager:
        error = (eager - truth.output).abs().max()
        assert 0 < error < 1e3 * EPS * truth.output.abs().max()
