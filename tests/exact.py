"""What a pipeline draws without rounding."""

import copy

import torch

from fastdiff.bench.pixels import noise_as


def exact(pipe, draw, **call):
    """What `draw` makes of the pipeline in float64, from the noise that float32 draws."""
    double = copy.deepcopy(pipe).to(torch.float64)
    with noise_as(double, torch.float32):
        return draw(double, **call)
