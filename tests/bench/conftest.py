"""One request and its float64 truth, shared by all tests of the bench."""

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
    """Exempts older objects from garbage collection, which each measurement of memory runs."""
    gc.collect()
    gc.freeze()
