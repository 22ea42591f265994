"""Puts the repository on the path, because the trainer is in tools/, outside the package."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """One torch thread: sums have a fixed order, and busy cores do not slow the training down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
