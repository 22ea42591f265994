"""Denoising loops that run as plans, against diffusers' own loop on the same pipeline."""

import copy
import pickle
import threading

import diffusers
import numpy as np
import pytest
import torch
from covered import covered
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from small import ONE_LEVEL

import fastdiff
from fastdiff.bench.presets import build
from fastdiff.kernels.contract import poisoned_memory

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {**BETAS, "steps_offset": 1}
# (scheduler, config, allowed relative error): 1e-10 if the scheduler computes in float64, 2e-6 if
# its step casts to float32
SCHEDULERS = [
    ("DDIMScheduler", {"clip_sample": False}, 1e-10),
    ("DDPMScheduler", {"clip_sample": False}, 1e-10),
    ("PNDMScheduler", {"skip_prk_steps": True}, 1e-10),
    ("EulerDiscreteScheduler", {}, 2e-6),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, 2e-6),
    ("EulerAncestralDiscreteScheduler", {}, 2e-6),
    ("DPMSolverMultistepScheduler", {}, 2e-6),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 2e-6),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 2e-6),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, 2e-6),
    ("DPMSolverSinglestepScheduler", {"lower_order_final": True}, 1e-10),
    ("UniPCMultistepScheduler", {}, 1e-10),
    ("DEISMultistepScheduler", {}, 1e-10),
    ("LMSDiscreteScheduler", {}, 1e-10),
    ("HeunDiscreteScheduler", {}, 1e-10),
    ("KDPM2DiscreteScheduler", {}, 1e-10),
    ("KDPM2AncestralDiscreteScheduler", {}, 1e-10),
    ("LCMScheduler", {}, 1e-10),
    ("TCDScheduler", {}, 1e-10),
    ("SASolverScheduler", {}, 1e-10),
]
NAMED = [
    pytest.param(name, options, allowed, id=name + ",".join(f"-{v}" for v in options.values()))
    for name, options, allowed in SCHEDULERS
]


@pytest.fixture(scope="module")
def tiny():
    """A pipeline of a small U-Net and VAE without text encoder: it takes prompt embeddings."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        attention_head_dim=4,
        cross_attention_dim=24,
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    pipe = StableDiffusionPipeline(
        vae.eval(),
        None,
        None,
        unet.eval(),
        diffusers.DDIMScheduler(**LEADING, clip_sample=False),
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(tiny):
    return copy.deepcopy(tiny)


def draw(pipe, steps=4, **options):
    """The latents of a picture whose prompt embeddings are noise."""
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, 1, 7, 24, generator=generator).to(pipe.unet.dtype)
    options = {"guidance_scale": 3.0, "output_type": "latent"} | options
    return pipe(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        num_inference_steps=steps,
        generator=generator,
        **options,
    ).images


def relative_error(got, want):
    assert torch.isfinite(want).all()
    return float((got - want).abs().max() / want.abs().max())


def loops(pipe):
    (part,) = [part for part in fastdiff.report(pipe).parts if part.name == "loop"]
    return part


def planned(pipe):
    return "own loop" not in loops(pipe).why


@pytest.mark.parametrize(
    ("name", "options", "allowed", "prediction"),
    # runtime/test_schedulers.py checks every table for every prediction type
    covered(NAMED, ["epsilon", "v_prediction"], together=1),
)
def test_float64_latents_follow_every_scheduler(pipe, name, options, allowed, prediction):
    config = {**BETAS, **options, "prediction_type": prediction}
    torch.manual_seed(4)
    pipe.unet = UNet2DConditionModel(**ONE_LEVEL).eval()  # few layers, because of 2,000 steps
    pipe.to(torch.float64)
    pipe.scheduler = getattr(diffusers, name).from_config(config)
    plan = fastdiff.compile(copy.deepcopy(pipe))
    for steps in (4, 25):  # runtime/test_schedulers.py has 50, too
        assert relative_error(draw(plan, steps), draw(pipe, steps)) <= allowed, steps
    assert planned(plan), loops(plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"guidance_scale": 1.0}, {"guidance_rescale": 0.7}, {"height": 24, "width": 40}],
    ids=["guided", "unguided", "rescaled", "other shape"],
)
def test_latents_are_within_the_budget(pipe, dtype, options):
    """The error to float64 is at most twice that of diffusers' loop in the same dtype."""
    exact = draw(copy.deepcopy(pipe).to(torch.float64), 6, **options)
    pipe.to(dtype)
    eager = draw(pipe, 6, **options).double()
    got = draw(fastdiff.compile(pipe), 6, **options).double()
    assert planned(pipe)
    scale = torch.finfo(dtype).eps * float(exact.abs().max())
    assert float((got - exact).abs().max()) <= 2 * (float((eager - exact).abs().max()) + scale)


def test_one_plan_serves_any_number_of_steps_and_any_guidance_scale(pipe):
    plan = fastdiff.compile(copy.deepcopy(pipe))
    for steps, guidance in ((3, 2.0), (9, 5.0), (3, 7.5)):
        want = draw(pipe, steps, guidance_scale=guidance)
        assert relative_error(draw(plan, steps, guidance_scale=guidance), want) <= 1e-4
    steps = plan.unet._compiled_call_impl.network.plans._steps._values
    assert len(steps) == 1


def test_equal_calls_return_equal_latents_in_separate_memory(pipe):
    fastdiff.compile(pipe)
    first = draw(pipe)
    kept = first.clone()
    second = draw(pipe)
    assert torch.equal(first, second)
    assert torch.equal(first, kept)
    assert first.data_ptr() != second.data_ptr()


def test_given_latents_are_not_changed(pipe):
    fastdiff.compile(pipe)
    given = torch.randn(1, 4, 8, 8)
    kept = given.clone()
    draw(pipe, latents=given)
    assert torch.equal(given, kept)


def test_a_second_loop_during_the_first_reads_no_stale_memory(pipe):
    """KDPM2Ancestral adds noise in every second step only."""
    pipe.scheduler = diffusers.KDPM2AncestralDiscreteScheduler(**BETAS)
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    other.set_progress_bar_config(disable=True)
    want, pictures = draw(other), []
    fastdiff.compile(pipe)
    fastdiff.compile(other)
    own = pipe.progress_bar

    def progress_bar(*args, **kwargs):  # a callback would see diffusers' loop
        bar = own(*args, **kwargs)
        update = bar.update
        bar.update = lambda n=1: (pictures.append(draw(other)), update(n))
        return bar

    pipe.progress_bar = progress_bar
    with poisoned_memory():
        draw(pipe)
    assert planned(pipe), loops(pipe)
    assert len(pictures) == 4
    assert all(relative_error(picture, want) <= 1e-4 for picture in pictures)


def test_image_to_image_of_sdxl_does_not_change_given_latents(components):
    parts = components(xl=True, dtype=torch.float32)
    pipe = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    given = torch.randn(1, 4, 8, 8)
    options = {
        "image": torch.rand(1, 3, 16, 16),
        "strength": 0.5,
        "num_inference_steps": 4,
        "output_type": "latent",
    }
    want = pipe("red heart", latents=given.clone(), **options).images
    fastdiff.compile(pipe)
    kept = given.clone()
    for _ in range(2):
        assert relative_error(pipe("red heart", latents=given, **options).images, want) <= 1e-4
        assert torch.equal(given, kept)
    twice = pipe(["a", "b"], latents=given.expand(2, -1, -1, -1), **options).images
    assert torch.isfinite(twice).all()


def test_a_user_class_with_its_own_call_keeps_its_loop(pipe):
    class Own(StableDiffusionPipeline):
        @torch.no_grad()
        def __call__(self, **options):
            return super().__call__(**options | {"guidance_scale": 6.0})

    Own.__name__ = "StableDiffusionPipeline"
    pipe.__class__ = Own
    want = draw(pipe)
    fastdiff.compile(pipe)
    assert relative_error(draw(pipe), want) <= 1e-4
    assert loops(pipe).runs == "diffusers"


def test_a_negative_rescale_is_ignored_as_in_diffusers(pipe):
    want = draw(pipe, guidance_rescale=-0.7)
    assert relative_error(draw(fastdiff.compile(pipe), guidance_rescale=-0.7), want) <= 1e-4


def test_noise_comes_from_the_users_generator_in_diffusers_order(pipe):
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler(**BETAS)
    plan = fastdiff.compile(copy.deepcopy(pipe))
    for options in ({}, {"num_images_per_prompt": 2}):
        after = []
        for which in (pipe, plan):
            generator = torch.Generator().manual_seed(1)
            embeds = torch.randn(2, 1, 7, 24, generator=generator)
            latents = which(
                prompt_embeds=embeds[0],
                negative_prompt_embeds=embeds[1],
                num_inference_steps=5,
                generator=generator,
                output_type="latent",
                **options,
            ).images
            after.append((latents, generator.get_state()))
        assert relative_error(after[1][0], after[0][0]) <= 1e-4
        assert torch.equal(after[0][1], after[1][1])


def test_a_nonlinear_scheduler_keeps_diffusers_loop(pipe):
    pipe.scheduler = diffusers.UniPCMultistepScheduler(**LEADING, thresholding=True)
    want = draw(pipe)
    fastdiff.compile(pipe)
    assert relative_error(draw(pipe), want) <= 1e-4
    assert "thresholds" in loops(pipe).why
    assert "4 calls" in str(fastdiff.report(pipe))


class TestCallbacks:
    def compare(self, pipe, make, steps=5):
        """Assert that plan and diffusers agree in the latents and in what the callback saw."""
        seen, results = [], []
        for which in (pipe, fastdiff.compile(copy.deepcopy(pipe))):
            trace = []
            results.append(draw(which, steps, callback_on_step_end=make(trace)))
            seen.append(trace)
        assert planned(which), loops(which)
        assert relative_error(results[1], results[0]) <= 1e-4
        assert len(seen[0]) == len(seen[1])
        for (i, t, latents), (j, s, others) in zip(*seen, strict=True):
            assert (i, int(t)) == (j, int(s))
            assert relative_error(others, latents) <= 1e-4

    def test_that_looks(self, pipe):
        self.compare(pipe, lambda trace: looking(trace, lambda pipe, i, latents: {}))

    def test_that_changes_latents(self, pipe):
        self.compare(
            pipe, lambda trace: looking(trace, lambda pipe, i, x: {"latents": x * 0.9 + 0.1})
        )

    def test_that_changes_latents_in_place(self, pipe):
        def halve(pipe, i, latents):
            latents.mul_(0.5)
            return {}

        self.compare(pipe, lambda trace: looking(trace, halve))

    def test_that_changes_guidance(self, pipe):
        def guide(pipe, i, latents):
            pipe._guidance_scale = 2.0 + i
            return {}

        self.compare(pipe, lambda trace: looking(trace, guide))

    def test_that_interrupts(self, pipe):
        def stop(pipe, i, latents):
            pipe._interrupt = i == 2
            return {}

        self.compare(pipe, lambda trace: looking(trace, stop))

    def test_that_edits_weights(self, pipe):
        def edit(pipe, i, latents):
            with torch.no_grad():
                block = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0]
                block.attn2.to_v.weight.mul_(1.5)
                pipe.unet.time_embedding.linear_2.bias.add_(0.1)
            return {}

        self.compare(pipe, lambda trace: looking(trace, edit))

    def test_that_draws_with_the_same_pipeline(self, pipe):
        def another(pipe, i, latents):
            pipe.set_progress_bar_config(disable=True)
            kept, count = copy.deepcopy(vars(pipe.scheduler)), pipe._num_timesteps
            inner = draw(pipe, 2)
            vars(pipe.scheduler).update(kept)
            pipe._guidance_scale, pipe._num_timesteps = 3.0, count
            return {"latents": latents + 0.01 * inner}

        self.compare(pipe, lambda trace: looking(trace, another))

    def test_that_fails(self, pipe):
        want = draw(pipe)
        fastdiff.compile(pipe)
        for error in (ValueError("mine"), AttributeError("mine"), KeyboardInterrupt()):

            def fail(pipe, i, t, kwargs, error=error):
                raise error

            with pytest.raises(type(error)):
                draw(pipe, callback_on_step_end=fail)
            assert relative_error(draw(pipe), want) <= 1e-4

    def test_that_returns_embeddings_unasked(self, pipe):
        other = torch.randn(2, 7, 24)
        self.compare(
            pipe, lambda trace: looking(trace, lambda pipe, i, x: {"prompt_embeds": other + i})
        )

    def test_that_keeps_the_latents_it_got(self, pipe):
        """Its tensors are its own and never overwritten, even for a single latent pixel."""
        for size in ({}, {"height": 2, "width": 2}):
            if size:
                pipe.check_inputs = lambda *args: None
            kept, copies = [], []

            def keep(pipe, i, t, kwargs, kept=kept, copies=copies):
                kept.append(kwargs["latents"])
                copies.append(kwargs["latents"].clone())
                return {}

            draw(fastdiff.compile(pipe), callback_on_step_end=keep, **size)
            assert all(map(torch.equal, kept, copies))

    def test_that_looks_up_its_sigma(self, pipe):
        pipe.scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
        seen = []
        for which in (pipe, fastdiff.compile(copy.deepcopy(pipe))):
            steps = []

            def look(pipe, i, t, kwargs, steps=steps):
                steps.append(pipe.scheduler.step_index)
                return {}

            draw(which, callback_on_step_end=look)
            seen.append(steps)
        assert seen[0] == seen[1] == [1, 2, 3, 4]

    def test_that_requests_more_tensors_runs_diffusers_loop(self, pipe):
        options = {
            "callback_on_step_end": lambda pipe, i, t, kwargs: {
                "prompt_embeds": kwargs["prompt_embeds"] * 0.9
            },
            "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        }
        want = draw(pipe, **options)
        fastdiff.compile(pipe)
        assert relative_error(draw(pipe, **options), want) <= 1e-4
        assert "more than the latents" in loops(pipe).why


def looking(trace, change):
    def callback(pipe, i, t, kwargs):
        trace.append((i, t, kwargs["latents"].clone()))
        return change(pipe, i, kwargs["latents"])

    return callback


def test_the_progress_bar_moves_as_in_diffusers(pipe, monkeypatch):
    pipe.scheduler = diffusers.HeunDiscreteScheduler(**BETAS)  # two network calls per step
    plan = fastdiff.compile(copy.deepcopy(pipe))
    moves = []
    for which in (pipe, plan):
        bars = []
        own = type(which).progress_bar

        def progress_bar(self, *args, own=own, bars=bars, **kwargs):
            bar = own(self, *args, **kwargs)
            bars.append([bar.total, 0])
            update = bar.update
            bar.update = lambda n=1: (bars[-1].__setitem__(1, bars[-1][1] + n), update(n))
            return bar

        with monkeypatch.context() as patch:
            patch.setattr(type(which), "progress_bar", progress_bar)
            draw(which, 6)
        moves.append(bars)
    assert moves[0] == moves[1]
    assert moves[0][0][1] > 0


def test_two_threads_on_one_pipeline(pipe):
    want = {g: draw(pipe, guidance_scale=g) for g in (2.0, 5.0)}
    fastdiff.compile(pipe)
    wrong = []

    def work(guidance):
        for _ in range(8):
            if relative_error(draw(pipe, guidance_scale=guidance), want[guidance]) > 1e-4:
                wrong.append(guidance)

    threads = [threading.Thread(target=work, args=(g,)) for g in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_pipelines_share_a_network_in_two_threads(pipe):
    other = copy.deepcopy(pipe)  # schedulers and tokenizers keep state, so threads need their own
    other.unet = pipe.unet
    want = [draw(pipe), draw(other, guidance_scale=5.0)]
    fastdiff.compile(pipe)
    fastdiff.compile(other)
    wrong = []

    def work(which, guidance, want):
        for _ in range(8):
            if relative_error(draw(which, guidance_scale=guidance), want) > 1e-4:
                wrong.append(guidance)

    threads = [
        threading.Thread(target=work, args=(pipe, 3.0, want[0])),
        threading.Thread(target=work, args=(other, 5.0, want[1])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_and_pickles_are_eager(pipe):
    want = draw(pipe)
    fastdiff.compile(pipe)
    draw(pipe)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert type(other) is StableDiffusionPipeline
        assert loops(other).runs == "diffusers"
        assert relative_error(draw(other), want) <= 1e-4
    assert isinstance(pipe, StableDiffusionPipeline)
    fastdiff.restore(pipe)
    assert type(pipe) is StableDiffusionPipeline
    assert "_fastdiff_loop" not in vars(pipe)


def test_moves_between_dtypes_are_followed(pipe):
    fastdiff.compile(pipe)
    for dtype, allowed in ((torch.float64, 1e-10), (torch.float32, 1e-4), (torch.float64, 1e-10)):
        pipe.to(dtype)
        plain = copy.deepcopy(pipe)
        assert relative_error(draw(pipe), draw(plain)) <= allowed
    assert planned(pipe)


def test_a_method_replaced_on_the_pipeline_is_honoured(pipe):
    own = pipe.prepare_latents
    pipe.prepare_latents = lambda *args, **kwargs: own(*args, **kwargs) * 0.5
    want = draw(copy.copy(pipe))
    fastdiff.compile(pipe)
    assert relative_error(draw(pipe), want) <= 1e-4
    assert "prepare_latents was replaced" in loops(pipe).why
    given = torch.randn(1, 4, 8, 8)  # a replaced method may return a tensor that it keeps
    pipe.prepare_latents = lambda *args, **kwargs: given
    kept = given.clone()
    assert torch.equal(draw(pipe), draw(pipe))
    assert torch.equal(given, kept)


class TestOverflow:
    """After an overflow in float16, the part runs in float32 and the report says where."""

    def test_in_the_decoder(self, pipe):
        with torch.no_grad():
            pipe.vae.decoder.up_blocks[0].resnets[1].conv2.weight.mul_(3e5)
        exact = draw(copy.deepcopy(pipe).to(torch.float32), output_type="pt").double()
        pipe.to(torch.float16)
        fastdiff.compile(pipe)
        got = draw(pipe, output_type="pt").double()
        assert torch.isfinite(got).all()
        assert -10 * np.log10(float(((got - exact) ** 2).mean())) >= 40
        assert "up_blocks.0.resnets.1.conv2" in str(fastdiff.report(pipe))
        assert torch.equal(draw(pipe, output_type="pt").double(), got)

    @pytest.mark.parametrize("callback", [False, True], ids=["", "callback"])
    def test_in_the_unet(self, pipe, callback):
        pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler(**BETAS)
        with torch.no_grad():
            pipe.unet.mid_block.resnets[0].conv2.weight.mul_(3e5)
        options = {}
        if callback:
            options["callback_on_step_end"] = lambda p, i, t, k: {"latents": k["latents"] * 0.9}
        exact = draw(copy.deepcopy(pipe).to(torch.float32), **options)
        pipe.to(torch.float16)
        fastdiff.compile(pipe)
        got = draw(pipe, **options)
        assert got.dtype == torch.float16
        assert relative_error(got.float(), exact) <= 0.02
        assert "mid_block.resnets.0.conv2" in str(fastdiff.report(pipe))

    def test_of_weights_loaded_in_inference_mode(self):
        with torch.inference_mode():
            pipe = build("tiny", 0.5, torch.float16, "cpu")
            pipe.unet.mid_block.resnets[0].conv2.weight.mul_(3e5)
        pipe.set_progress_bar_config(disable=True)
        fastdiff.compile(pipe)
        got = pipe(
            "red heart",
            num_inference_steps=2,
            output_type="latent",
            callback_on_step_end=lambda pipe, i, t, kwargs: {},
        ).images
        assert torch.isfinite(got).all()
        assert "mid_block.resnets.0.conv2" in str(fastdiff.report(pipe))

    def test_is_forgotten_when_the_weights_change(self, pipe):
        with torch.no_grad():
            pipe.unet.mid_block.resnets[0].conv2.weight.mul_(3e5)
        pipe.to(torch.float16)
        fastdiff.compile(pipe)
        draw(pipe)
        slot = pipe.unet._compiled_call_impl
        assert slot.promotion is not None
        with torch.no_grad():
            pipe.unet.mid_block.resnets[0].conv2.weight.mul_(1 / 3e5)
        plain = copy.deepcopy(pipe)
        assert relative_error(draw(pipe).float(), draw(plain).float()) <= 0.02
        assert slot.promotion is None
