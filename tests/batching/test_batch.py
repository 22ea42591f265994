"""Each picture of a batch is the one that the compiled pipeline draws alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPAGPipeline,
)

import fastdiff
from benchmarks.batching.check import check
from benchmarks.batching.parting import parting
from benchmarks.batching.requests import called
from benchmarks.batching.speed import speed
from fastdiff.batching import Batch, Cancelled, Request
from fastdiff.demo import PROMPTS


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


def test_random_requests_at_their_own_steps_are_within_the_budget():
    """A small run of `python -m benchmarks.batching check`: schedulers with and without noise and
    history, with and without guidance, and pictures that move to other places of the batch."""
    found = check(count=7, seed=5, capacity=3, least=3, most=6)
    assert [one["wrong"] for one in found] == [None] * 7


def test_where_two_drawings_part_and_what_float64_makes_of_that(pipe):
    """Without noise and history, a distance after the last step but one is carried by one step: of
    float64, which `parting` finds, and of our own."""
    kind = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    told = {"num_inference_steps": 3, "guidance_scale": 3.0, "seed": 5}
    request = Request("dog face", scheduler=kind, **told)
    steps = []
    with Batch(pipe, capacity=1) as batch:
        batch.submit(replace(request, on_step=lambda *told: steps.append(told[2]))).result(600)
    exact = fastdiff.load_demo().to(torch.float64)
    exact.scheduler = kind
    assert parting(pipe, exact, request, steps) is None
    other = [steps[0], steps[1] + 1e-3, steps[2] + 1e-2]
    found = parting(pipe, exact, request, other)
    assert (found.step, found.steps) == (2, 3)
    assert found.distances == [pytest.approx(1e-3, rel=0.01), pytest.approx(1e-2, rel=0.01)]
    ends = []
    for apart in (0, 1e-3):
        ends.append(called(pipe, request, lambda i, now, apart=apart: now + apart * (i == 1)))
    assert found.exact == pytest.approx(float((ends[1] - ends[0]).abs().max()), rel=0.05)


def test_a_batch_invariant_picture_has_the_same_bits_alone_and_in_any_place():
    pipe = fastdiff.compile(fastdiff.load_demo(), batch_invariant=True)
    pipe.set_progress_bar_config(disable=True)
    kinds = (None, EulerDiscreteScheduler, DPMSolverMultistepScheduler)
    schedulers = [kind and kind.from_config(pipe.scheduler.config) for kind in kinds]
    asked = [
        Request(prompt, num_inference_steps=1 + i % 3, seed=i, guidance_scale=2.0 + i, scheduler=s)
        for i, (prompt, s) in enumerate(zip(PROMPTS + PROMPTS[:2], schedulers * 2, strict=True))
    ]
    with Batch(pipe, capacity=6) as batch:
        last = [[] for _ in asked]
        tickets = [
            batch.submit(replace(request, on_step=lambda *told, to=to: to.append(told[2])))
            for request, to in zip(asked, last, strict=True)
        ]
        for ticket in tickets:
            ticket.result(600)
    for request, got in zip(asked, last, strict=True):
        assert torch.equal(got[-1], called(pipe, request))
    three = pipe(list(PROMPTS[:3]), num_inference_steps=2, output_type="latent", **seeds(3))
    one = pipe(PROMPTS[0], num_inference_steps=2, output_type="latent", **seeds(1))
    assert torch.equal(three.images[:1], one.images)
    with pytest.raises(ValueError, match="it draws 5 pictures; at most 4 go together"):
        pipe(["a"] * 5, num_inference_steps=1)
    with pytest.raises(ValueError, match="another batch_invariant already; restore it first"):
        fastdiff.compile(pipe)


def test_workers_draw_side_by_side_the_bits_of_one_alone(pipe):
    """Two workers with one place each: each picture has the same bits as alone on half of the
    threads, whatever the other worker draws; the process keeps its number of threads."""
    threads = torch.get_num_threads()
    asked = [
        Request(PROMPTS[i % 3], num_inference_steps=2 + i % 2, seed=i, guidance_scale=3.0)
        for i in range(6)
    ]
    last, both = [[] for _ in asked], threading.Barrier(2)

    def meet(step, steps, latents, to):
        if step == 1 and len(to) == 0:
            both.wait(60)  # passes only if the other worker draws at the same time
        to.append(latents)

    with Batch(pipe, capacity=1, workers=2) as batch:
        tickets = [
            batch.submit(replace(request, on_step=lambda *told, to=to: meet(*told, to)))
            for request, to in zip(asked, last, strict=True)
        ]
        for ticket in tickets:
            assert ticket.result(600).size == (64, 64)
    assert batch.stats().filled == batch.stats().steps == sum(len(got) for got in last)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == threads
    torch.set_num_threads(max(1, threads // 2))
    try:
        for request, got in zip(asked, last, strict=True):
            assert torch.equal(got[-1], called(pipe, request))
    finally:
        torch.set_num_threads(threads)


class Own(DDIMScheduler):
    """A user's scheduler, with which diffusers runs the loop."""

    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


@pytest.mark.parametrize(
    ("scheduler", "alone"), [(DDIMScheduler, "perturbs the network"), (Own, "Own")]
)
def test_a_request_drawn_alone_is_encoded_once(scheduler, alone):
    """On its own plan, and in diffusers' loop: the picture is the pipeline's own."""
    parts = fastdiff.load_demo().components
    pipe = fastdiff.compile(StableDiffusionPAGPipeline(**parts, pag_applied_layers="mid"))
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    request = Request("dog face", num_inference_steps=3, seed=5, guidance_scale=3.0)
    encoded, seen = [], []
    pipe.text_encoder.register_forward_hook(lambda *call: encoded.append(call[1]))
    want = called(pipe, request)
    own = len(encoded)
    with Batch(pipe) as batch:
        ticket = batch.submit(replace(request, on_step=lambda *told: seen.append(told)))
        ticket.result(600)
    assert alone in ticket.alone
    assert len(encoded) == 2 * own
    assert [told[:2] for told in seen] == [(1, 3), (2, 3), (3, 3)]
    torch.testing.assert_close(seen[-1][2], want)


def seeds(count):
    return {"generator": [torch.Generator().manual_seed(i) for i in range(count)]}


def test_every_way_of_the_benchmark_draws():
    """A run of `python -m benchmarks.batching speed` with few steps."""
    found = speed(rounds=2, count=2, seed=1, least=2, most=3)
    assert {len(values) for values in found["seconds"].values()} == {2}
    assert {len(values) for values in found["short"].values()} == {2}
    assert min(min(values) for values in found["short"].values()) > 0
