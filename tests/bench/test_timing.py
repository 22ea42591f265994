"""Backends take turns in random order, and the timed picture is the pipeline's own."""

import gc

import numpy as np
import pytest
import torch

from fastdiff.bench.timing import GUIDANCE_SCALE, draw, interleave


def test_each_backend_runs_once_a_round_in_random_order():
    calls = []
    runs = {name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}
    done = []
    results = interleave(runs, rounds=20, seed=0, after_round=lambda round_, _: done.append(round_))
    orders = [tuple(calls[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) == 6  # all permutations occur
    assert done == list(range(1, 21))
    assert all(calls[call - 1] == name for name in "abc" for call in results[name])


def test_the_garbage_collector_pauses_while_timing_and_resumes_after_an_error():
    seen = []
    interleave({"a": lambda: seen.append(gc.isenabled())}, rounds=1, seed=0)
    assert seen == [False]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 / 0}, rounds=1, seed=0)
    assert gc.isenabled()


def test_the_timed_picture_is_the_pipelines_own(demo, request_):
    drawing = draw(demo, request_)
    expected = demo(
        request_.prompt,
        num_inference_steps=request_.steps,
        guidance_scale=GUIDANCE_SCALE,
        latents=request_.latents.clone(),
        output_type="np",
    ).images[0]
    assert drawing.image.dtype == torch.float64
    np.testing.assert_allclose(drawing.image.numpy(), expected, atol=1e-6)
    assert 0 < request_.steps * drawing.step_ms < drawing.image_ms
