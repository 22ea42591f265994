"""What a pipeline draws in float64, and the check that a compiled pipeline draws the same."""

import copy

import torch

import fastdiff
from fastdiff.bench.pixels import noise_as
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.kernels.contract import judge
from fastdiff.recipes import denoiser


def exact(pipe, draw, **call):
    """What `draw` makes of the pipeline in float64, from the noise that float32 draws."""
    double = copy.deepcopy(pipe).to(torch.float64)
    with noise_as(double, torch.float32):
        return draw(double, **call)


def as_eager(pipe, draw, steps=3, **call):
    """Check that the compiled `pipe` draws the call in `steps` fast steps of a plan, within the
    error budget, and that the restored one draws the eager picture bit for bit."""
    eager, truth = draw(pipe, **call), exact(pipe, draw, **call)
    fastdiff.compile(pipe)
    ours, loop, slot = draw(pipe, **call), loop_of(pipe), slot_of(denoiser(pipe))
    assert (loop.planned, dict(loop.own)) == (1, {})
    assert (slot.fast, dict(slot.eager)) == (steps, {})
    verdict = judge("drawn", ours, eager, truth)
    assert verdict.passed, verdict
    fastdiff.restore(pipe)
    assert torch.equal(draw(pipe, **call), eager)
