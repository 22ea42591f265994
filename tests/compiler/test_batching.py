"""Batches of several pipelines whose requests are at different steps, against diffusers, in
float64."""

import copy
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxPipeline,
    PNDMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from small import AURAFLOW, noisy

import fastdiff
from fastdiff.batching import Batch, Cancelled, Request
from fastdiff.compiler.loop_state import loop_of
from fastdiff.runtime.recordings import made

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = {
    "sd": (None, DPMSolverMultistepScheduler(), EulerAncestralDiscreteScheduler(), PNDMScheduler()),
    "xl": (None, DPMSolverMultistepScheduler(solver_order=3), UniPCMultistepScheduler()),
    "sd3": (None, FlowMatchHeunDiscreteScheduler(shift=3.0), UniPCMultistepScheduler(**FLOW)),
}
ALONE = "its steps are not a linear recurrence of depth 3"


@pytest.fixture
def alone(components_flux):
    """Pipelines whose networks take one timestep for all pictures."""

    def make(kind):
        parts = components_flux(torch.float32)
        if kind == "flux":
            pipe = FluxPipeline(**parts)
        else:
            vae = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
            pipe = AuraFlowPipeline(
                tokenizer=parts["tokenizer_2"],
                text_encoder=parts["text_encoder_2"],
                vae=noisy(AutoencoderKL(**vae)),
                transformer=noisy(AuraFlowTransformer2DModel(**AURAFLOW)),
                scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
            )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def pipeline(components, components_sd3):
    def make(kind):
        if kind == "sd3":
            return StableDiffusion3Pipeline(**components_sd3())
        if kind == "xl":
            return StableDiffusionXLPipeline(**components(xl=True))
        return StableDiffusionPipeline(**components())

    def quiet(kind):
        pipe = make(kind)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return quiet


def eager(pipe, request):
    pipe = copy.copy(pipe)
    pipe.scheduler = copy.deepcopy(request.scheduler or pipe.scheduler)
    return pipe(
        request.prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        height=request.height,
        width=request.width,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
    ).images


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_each_request_is_drawn_as_diffusers_draws_it(pipeline, kind):
    pipe, plain = fastdiff.compile(pipeline(kind)), pipeline(kind)
    asked = [
        Request(prompt, None, 4 + i % 2, scale, i, size, size, scheduler)
        for i, (prompt, scale, size, scheduler) in enumerate(
            zip(
                ("red heart", "dog face", "sunflower", "purple car"),
                (4.0, 2.5, 4.0, 1.0),
                (16, 16, 24, 16),  # the third and the last have recordings of their own
                SCHEDULERS[kind] + (None,) * 3,
                strict=False,
            )
        )
    ]
    last = [[] for _ in asked]
    with Batch(pipe, capacity=3) as batch:  # the last request joins when another leaves
        tickets = [
            batch.submit(replace(request, on_step=lambda *given, to=to: to.append(given)))
            for request, to in zip(asked, last, strict=True)
        ]
        for ticket in tickets:
            assert ticket.result().size == (ticket.request.width,) * 2
    for request, ticket, seen in zip(asked, tickets, last, strict=True):
        want, (done, steps, got) = eager(plain, request), seen[-1]
        assert done == steps == len(seen)
        assert torch.linalg.norm(got - want) <= 5e-6 * torch.linalg.norm(want), request
        assert ALONE in (ticket.alone or ALONE)
        assert (ticket.alone is not None) == isinstance(request.scheduler, PNDMScheduler)
    stats, loop = batch.stats(), loop_of(pipe)
    assert stats.filled > stats.steps
    assert sum(loop.ran.values()) == sum(ticket.alone is None for ticket in tickets)
    assert loop.driver is None


@pytest.mark.parametrize("kind", ["flux", "auraflow"])
def test_requests_that_share_no_steps_use_the_plan_in_turn(alone, kind):
    """Two at a time: each has the same bits as when it is drawn alone, although they share a
    recording."""
    pipe = fastdiff.compile(alone(kind))
    call = {"num_inference_steps": 3, "guidance_scale": 3.5, "height": 16, "width": 12}
    requests = [Request(p, seed=i, **call) for i, p in enumerate(("red heart", "dog face", "moon"))]
    order, last = [], {}

    def note(number):
        return lambda step, steps, latents: (order.append(number), last.update({number: latents}))

    with Batch(pipe, capacity=2) as batch:
        tickets = [batch.submit(replace(one, on_step=note(i))) for i, one in enumerate(requests)]
        for ticket in tickets:
            assert ticket.result().size == (12, 16)
            assert ticket.alone == "its network takes one timestep for all pictures"
    assert order[:4] in ([0, 1, 0, 1], [0, 0, 1, 0])  # the second may start one step later
    loop, kept = loop_of(pipe), made()
    assert loop.planned == 3
    assert not loop.own
    for number, request in enumerate(requests):
        generator = torch.Generator().manual_seed(request.seed)
        want = pipe(request.prompt, generator=generator, output_type="latent", **call).images
        assert torch.equal(last[number], want)
    assert made() == kept


def test_a_failed_request_does_not_end_the_others(pipeline):
    pipe, plain = fastdiff.compile(pipeline("sd")), pipeline("sd")
    last = []
    right = Request("red heart", None, 4, 4.0, 1, on_step=lambda *given: last.append(given[2]))

    def stumble(step, steps, latents):
        latents.fill_(torch.nan)  # on_step receives a copy
        if step == 2:
            raise RuntimeError("my preview failed")

    with Batch(pipe, capacity=5) as batch:
        with pytest.raises(ValueError, match="5000"):
            batch.submit(replace(right, num_inference_steps=5000, on_step=None)).result()
        ended = batch.submit(right)  # the only request; the batch continues after it
        ended.cancel()
        with suppress(Cancelled):
            ended.result()
        last.clear()
        ticket = batch.submit(right)
        stumbles = batch.submit(replace(right, on_step=stumble))
        many = batch.submit(replace(right, num_inference_steps=5000, on_step=None))
        endless = batch.submit(replace(right, guidance_scale=1e308, on_step=None))
        ends = batch.submit(replace(right, num_inference_steps=500, on_step=None))
        assert ticket.result() is not None
        ends.cancel()
        with pytest.raises(RuntimeError, match="my preview failed"):
            stumbles.result()
        with pytest.raises(ArithmeticError, match="not finite after 4 steps of DDIMScheduler"):
            endless.result()
        with pytest.raises(ValueError, match="5000"):
            many.result()
        with pytest.raises(Cancelled):
            ends.result()
    assert torch.allclose(last[-1], eager(plain, replace(right, on_step=None)), rtol=1e-9)
    assert batch.stats().active == 0
