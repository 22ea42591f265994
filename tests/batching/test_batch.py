"""A batch draws what the compiled pipeline draws alone."""

import threading

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

import fastdiff
from fastdiff.batching import Batch, Cancelled, Request


@pytest.fixture(scope="module")
def pipe():
    return fastdiff.compile(fastdiff.load_demo())


def test_pictures_errors_and_cancelled_requests(pipe):
    euler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    seen, begun, go_on = [], threading.Event(), threading.Event()

    def look(step, steps, latents):
        seen.append((step, steps, tuple(latents.shape)))
        begun.set()
        assert go_on.wait(600)

    with Batch(pipe, capacity=2) as batch:
        first = batch.submit(Request("dog face", num_inference_steps=3, seed=5, on_step=look))
        assert begun.wait(600)
        second = batch.submit(
            Request("red heart", num_inference_steps=4, seed=6, guidance_scale=3.0, scheduler=euler)
        )
        wrong = batch.submit(Request("sunflower", height=63, width=64))
        ended = batch.submit(Request("sunflower", num_inference_steps=1000))
        ended.cancel()
        with pytest.raises(TimeoutError):
            first.result(timeout=0.01)
        go_on.set()
        pictures = [first.result(600), second.result(600)]
        with pytest.raises(ValueError, match="divisible by 8"):
            wrong.result(600)
        with pytest.raises(Cancelled):
            ended.result(600)
        assert first.done()
        assert first.alone is None
    assert seen == [(step, 3, (1, 4, 16, 16)) for step in (1, 2, 3)]
    assert batch.stats().active == batch.stats().waiting == 0
    with pytest.raises(ValueError, match="closed"):
        batch.submit(Request("dog face"))
    own, kept = pipe.scheduler, pipe.scheduler.config
    wanted = [pipe("dog face", num_inference_steps=3, generator=torch.Generator().manual_seed(5))]
    pipe.scheduler = euler
    generator = torch.Generator().manual_seed(6)
    wanted += [pipe("red heart", num_inference_steps=4, guidance_scale=3.0, generator=generator)]
    pipe.scheduler = own
    for picture, want in zip(pictures, wanted, strict=True):
        apart = np.asarray(picture, int) - np.asarray(want.images[0], int)
        assert abs(apart).max() <= 1
    assert pipe.scheduler.config == kept


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"prompt": 3}, "prompt is 3; expected a string"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; expected a finite number"),
        ({"seed": -1}, "seed is -1"),
        ({"width": 0.5, "height": 8}, "width is 0.5"),
        ({"height": 64}, "width is None; expected one beside a height, or neither"),
        ({"scheduler": EulerDiscreteScheduler}, "scheduler is <class"),
    ],
)
def test_a_wrong_request_is_refused_at_once(wrong, told):
    with pytest.raises(ValueError, match=told):
        Request(**{"prompt": "dog face"} | wrong)
