"""Kernels round to bfloat16 as torch does; the error budget alone would also allow truncation."""

import pytest
import torch

from fastdiff.kernels.dispatch import NATIVE, implementation


@pytest.mark.parametrize("isa", NATIVE.isas() if NATIVE else [])
def test_sums_are_rounded_to_the_nearest_and_ties_to_even(isa, chosen):
    chosen(isa)
    positive = 1 + torch.arange(128) / 128  # every bfloat16 from 1 to 2
    x = torch.stack([positive, -positive])
    for fraction in (0.25, 0.5, 0.75):  # of a unit in the last place
        other = x.sign() * fraction / 128
        got = implementation("residual", "cpu")(x.bfloat16(), other.bfloat16())
        assert torch.equal(got, (x + other).bfloat16()), fraction
