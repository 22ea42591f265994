"""One request and one truth for all of these tests."""

import gc

import pytest
import torch

from fastdiff.bench.receipt import find_truth
from fastdiff.bench.timing import Request


@pytest.fixture(scope="session")
def request_():
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    return Request("dog face", steps=3, height=64, width=64, latents=latents, seed=7)


@pytest.fixture(scope="session")
def truth(demo, request_):
    return find_truth(demo, request_)


@pytest.fixture(scope="module")
def young():
    """Each measure of memory collects garbage first; what is older than these tests is left out."""
    gc.collect()
    gc.freeze()
