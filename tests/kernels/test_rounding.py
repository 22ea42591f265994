"""bfloat16 leaves a kernel rounded as torch rounds it; the error budget would let a cut pass."""

import pytest
import torch

from fastdiff.kernels.dispatch import NATIVE, implementation


@pytest.mark.parametrize("isa", NATIVE.isas() if NATIVE else [])
def test_sums_are_rounded_to_the_nearest_and_ties_to_even(isa, chosen):
    chosen(isa)
    positive = 1 + torch.arange(128) / 128  # every bfloat16 from 1 to 2
    x = torch.stack([positive, -positive])
    for places in (0.25, 0.5, 0.75):  # of the last one
        other = x.sign() * places / 128
        got = implementation("residual", "cpu")(x.bfloat16(), other.bfloat16())
        assert torch.equal(got, (x + other).bfloat16()), places
