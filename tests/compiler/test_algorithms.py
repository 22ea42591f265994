"""Whole pictures with each convolution algorithm: at most 1.1 times eager's error to float64."""

from functools import cache

import pytest
import torch

import fastdiff
from fastdiff.demo import PROMPTS, load_demo
from fastdiff.kernels import choices
from fastdiff.kernels.conv2d.cpu import ALGORITHMS
from fastdiff.kernels.dispatch import NATIVE

pytestmark = pytest.mark.skipif(NATIVE is None, reason="needs the C++ kernels")
WORSE = 1.1
PICTURES = 12
"""With so few steps the error of a single picture varies from 0.8 to 1.3 times eager's."""


def drawn(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(PICTURES)]
    noise = torch.randn(PICTURES, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = noise.bfloat16().to(pipe.dtype)  # the same numbers in every dtype
    options = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "pt"}
    return pipe(prompts, latents=latents, **options).images.double()


@cache
def eager(dtype: torch.dtype) -> torch.Tensor:
    return drawn(load_demo(dtype))


# 5 s each; kernels/test_winograd.py and test_contract.py check each call of these
@pytest.mark.product
@pytest.mark.parametrize(
    ("algorithm", "dtype"),
    [
        ("winograd24", torch.float32),
        ("direct", torch.float32),
        ("winograd22", torch.float32),
        ("direct", torch.bfloat16),
        ("winograd22", torch.bfloat16),
    ],
)
def test_pictures_are_as_exact_as_eager_ones(algorithm, dtype, monkeypatch):
    answer = choices.runs
    forced = []

    def runs(spec, a, isa):
        if spec.name == "conv2d" and a.weight.shape[2] == 3 and a.stride == 1:
            forced.append(a)
            return algorithm
        return answer(spec, a, isa)

    monkeypatch.setattr(choices, "runs", runs)
    pipe = load_demo(dtype)
    fastdiff.compile(pipe)
    ours = drawn(pipe)
    exact = eager(torch.float64)
    own, theirs = ((picture - exact).square().mean().sqrt() for picture in (ours, eager(dtype)))
    assert algorithm in ALGORITHMS
    assert forced
    assert own <= WORSE * theirs, (own, theirs)
