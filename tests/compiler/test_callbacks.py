"""Callbacks change and see the same at each step as in eager diffusers."""

import copy
import functools

import diffusers
import pytest
import torch
from covered import covered
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor

import fastdiff
from fastdiff.compiler.pipelines import loop_of
from fastdiff.errors import UserError

STEPS = 3


@pytest.fixture
def pipe(components):
    return StableDiffusionPipeline(**components(), requires_safety_checker=False)


def draw(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
    given["generator"] = torch.Generator().manual_seed(5)
    return pipe("red heart", **given | options).images


def traced(pipe, edit, when, **options):
    """The picture or the error, what the callback saw at each step, how far the progress bar moved,
    and the generator's state."""
    trace, moves, own = [], [], pipe.progress_bar

    def progress_bar(*args, **kwargs):
        bar = own(*args, **kwargs)
        update = bar.update
        bar.update = lambda n=1: (moves.append(n), update(n))
        return bar

    def callback(pipe, i, t, kwargs):
        state = {name: value for name, value in vars(pipe.scheduler).items() if name != "timesteps"}
        plain = {name: value for name, value in state.items() if isinstance(value, int | None)}
        trace.append((i, int(t), kwargs["latents"].clone(), plain))
        return (edit(pipe, kwargs["latents"]) if i == when else None) or {}

    pipe.progress_bar = progress_bar
    generator = torch.Generator().manual_seed(5)
    try:
        picture = draw(pipe, callback_on_step_end=callback, generator=generator, **options)
    except Exception as error:  # eager and compiled must raise the same
        picture = error
    return picture, trace, sum(moves), generator.get_state()


def noise_off(pipe, latents):
    """Change the weights of the middle block in place."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in pipe.unet.mid_block.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def another_unet(pipe, latents):
    unet = diffusers.UNet2DConditionModel.from_config(pipe.unet.config).double().eval()
    weights = {name: 0.9 * weight.detach() for name, weight in pipe.unet.state_dict().items()}
    unet.load_state_dict(weights)
    pipe.unet = unet


def another_scheduler(pipe, latents):
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(STEPS)


def other_tables(pipe, latents):
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod**1.3


def tables_in_place(pipe, latents):
    pipe.scheduler.alphas_cumprod.mul_(0.9)


def patched_step(pipe, latents):
    own = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: (0.9 * own(*args, **kwargs)[0],)


def other_scheduler_class(pipe, latents):
    class Shrinking(type(pipe.scheduler)):
        def step(self, *args, **kwargs):
            return (0.9 * super().step(*args, **kwargs)[0],)

    pipe.scheduler.__class__ = Shrinking


def other_steps(pipe, latents):
    pipe.scheduler.set_timesteps(7)


def guidance_off(pipe, latents):
    pipe._guidance_scale = 1.0


def guidance_off_with_its_prompt(pipe, latents):
    pipe._guidance_scale = 0.0
    return {"prompt_embeds": torch.full((1, 77, 32), 0.3).double()}


def hooked(pipe, latents):
    pipe.unet.mid_block.register_forward_hook(lambda module, args, output: output * 0.9)


def other_part(pipe, latents):
    block = copy.deepcopy(pipe.unet.mid_block)
    with torch.no_grad():
        block.resnets[0].conv1.weight.mul_(0.5)
    pipe.unet.mid_block = block


def restored(pipe, latents):
    fastdiff.restore(pipe)


def restored_and_compiled(pipe, latents):
    if loop_of(pipe) is not None:
        fastdiff.restore(pipe)
        fastdiff.compile(pipe)


def kept(pipe, latents):
    """Change nothing."""


PLANNED = [
    kept,
    noise_off,
    lambda pipe, x: {"latents": x * 0.9},
    lambda pipe, x: {"prompt_embeds": torch.full((2, 77, 32), 0.3).double()},
    lambda pipe, x: {"add_text_embeds": x},  # a name that this pipeline ignores
    lambda pipe, x: setattr(pipe, "_guidance_scale", 2.0),
    lambda pipe, x: setattr(pipe, "_interrupt", True),
]
FINISHED = [
    (lambda pipe, x: {"latents": x[:, :, :4]}, "latents of another shape, dtype"),
    (lambda pipe, x: {"latents": x.repeat(1, 1, 2, 2)}, "latents of another shape, dtype"),
    (lambda pipe, x: {"latents": x.float()}, "latents of another shape, dtype"),
    (lambda pipe, x: {"prompt_embeds": torch.full((2, 9, 32), 0.3).double()}, "another shape"),
    (lambda pipe, x: {"prompt_embeds": x}, "another shape"),
    (another_unet, "replaced the unet"),
    (another_scheduler, "replaced the scheduler"),
    (other_tables, "changed the scheduler"),
    (tables_in_place, "changed the scheduler"),
    (patched_step, "changed the scheduler"),
    (other_scheduler_class, "changed the scheduler"),
    (other_steps, "changed the scheduler"),
    (guidance_off, "guidance on or off"),
    (guidance_off_with_its_prompt, "another shape"),
    (lambda pipe, x: pipe.unet.enable_freeu(0.9, 0.2, 1.2, 1.4), "FreeU"),
    (lambda pipe, x: pipe.unet.set_attn_processor(AttnProcessor()), "replaced parts"),
    (hooked, "changed the unet"),
    (other_part, "replaced parts"),
    (restored, "replaced the unet"),
    (restored_and_compiled, "replaced the unet"),
]


def compare(pipe, edit, when, **options):
    """Run both pipelines with the edit, compare all they did; the compiled one and its loop."""
    fast = fastdiff.compile(copy.deepcopy(pipe))
    loop = loop_of(fast)
    want, seen, bar, drawn = traced(pipe, edit, when, **options)
    got, looked, moved, left = traced(fast, edit, when, **options)
    assert type(got) is type(want), got
    if isinstance(want, torch.Tensor):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))
        assert torch.isfinite(want).all()
    assert (moved, left.tolist()) == (bar, drawn.tolist())
    assert len(looked) == len(seen)
    for (i, t, latents, state), (j, s, others, theirs) in zip(looked, seen, strict=True):
        assert (i, t, state) == (j, s, theirs)
        torch.testing.assert_close(latents, others, rtol=1e-6, atol=1e-6)
    return fast, loop


@pytest.mark.filterwarnings("ignore:fastdiff. unet runs eagerly")
@pytest.mark.parametrize(
    ("edit", "reason", "when"),
    covered(
        [pytest.param(*row, id=f"{row[0].__name__}-{i}") for i, row in enumerate(FINISHED)],
        range(STEPS),
        together=1,
        always=lambda edit, reason, when: when == 1,  # steps run before and after
    ),
)
def test_a_change_that_no_plan_follows_is_finished_by_diffusers(pipe, edit, reason, when):
    _, loop = compare(pipe, edit, when)
    if when == STEPS - 1:
        assert (loop.planned, dict(loop.own)) == (1, {})  # no step follows
    else:
        assert loop.planned == 0
        assert reason in str(loop.own)


@pytest.mark.parametrize("when", range(STEPS))
@pytest.mark.parametrize("edit", PLANNED, ids=range(len(PLANNED)))
def test_a_change_that_a_plan_follows_stays_on_the_plan(pipe, edit, when):
    _, loop = compare(pipe, edit, when)
    assert (loop.planned, dict(loop.own)) == (1, {})


def test_the_generator_gives_the_same_noise_when_diffusers_takes_over(pipe):
    """The plan runs the first steps, diffusers the rest, with a scheduler that adds noise."""
    cls = diffusers.EulerAncestralDiscreteScheduler
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    for edit in (hooked, FINISHED[0][0]):
        compare(copy.deepcopy(pipe), edit, 0)


def test_changes_of_sdxls_conditions(components):
    xl = StableDiffusionXLPipeline(**components(xl=True), add_watermarker=False)

    def other_pooled(pipe, latents):
        pipe._guidance_scale = 0.0
        texts = torch.full((1, 77, 64), 0.3).double(), torch.full((1, 32), 0.2).double()
        ids = torch.tensor([[16, 16, 0, 0, 16, 16]]).double()
        names = ("prompt_embeds", "add_text_embeds", "add_time_ids")
        return dict(zip(names, (*texts, ids), strict=True))

    for when in range(STEPS):
        _, loop = compare(copy.deepcopy(xl), other_pooled, when)
        assert loop.planned == (when == STEPS - 1)
    _, loop = compare(xl, lambda pipe, x: {"add_text_embeds": torch.full((2, 32), 0.2).double()}, 0)
    assert loop.planned == 1


def test_a_pipeline_restored_by_a_callback_is_eager_afterwards(pipe):
    want = draw(pipe)
    fast, _ = compare(pipe, restored, 0)
    assert type(fast) is StableDiffusionPipeline
    assert loop_of(fast) is None
    assert torch.equal(draw(fast), want)


def test_changes_that_nothing_can_follow_are_one_sentence(pipe):
    """Neither the plan nor diffusers could continue with these."""
    fastdiff.compile(pipe)
    with pytest.raises(UserError, match="returned a NoneType as latents; return a tensor"):
        draw(pipe, callback_on_step_end=lambda pipe, i, t, kwargs: {"latents": None})

    class Mine(StableDiffusionPipeline):
        pass

    with pytest.raises(UserError, match="made the pipeline a Mine"):
        draw(
            pipe,
            callback_on_step_end=lambda pipe, i, t, kwargs: setattr(pipe, "__class__", Mine) or {},
        )


# The scheduler's state, in callbacks and after the picture

SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
]
"""Their only state is the index of the step."""
KEEPING = [
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
]
"""Their state includes predictions or samples of earlier steps."""


def made(cls, pipe):
    options = {"skip_prk_steps": True} if issubclass(cls, diffusers.PNDMScheduler) else {}
    return cls.from_config(pipe.scheduler.config, **options)


def shown(value):
    """A comparable form of a value: tensors as their norms."""
    if isinstance(value, torch.Tensor):
        return f"{float(value.double().norm()):.4f}"  # some are NaN
    if isinstance(value, list | tuple):
        return [shown(item) for item in value]
    return value if isinstance(value, int | float | str | None) else None


def state_of(scheduler):
    return {name: shown(value) for name, value in vars(scheduler).items()}


@pytest.mark.parametrize("name", [*SCHEDULERS, *KEEPING])
def test_callbacks_see_the_same_scheduler_state_as_in_eager(pipe, name):
    pipe.scheduler = made(getattr(diffusers, name), pipe)
    fast = fastdiff.compile(copy.deepcopy(pipe))
    seen = []
    for which in (pipe, fast):
        states = []

        def look(pipe, i, t, kwargs, states=states):
            states.append(state_of(pipe.scheduler))
            return {}

        picture = draw(which, callback_on_step_end=look)
        seen.append((states, state_of(which.scheduler), shown(picture)))
    assert seen[0] == seen[1]
    assert loop_of(fast).planned == (name in SCHEDULERS)
    draw(pipe)
    draw(fast)
    assert loop_of(fast).planned == 1 + (name in SCHEDULERS)
    plain = [
        {key: value for key, value in state_of(which.scheduler).items() if isinstance(value, int)}
        for which in (pipe, fast)
    ]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("name", [*SCHEDULERS, *KEEPING])
def test_a_users_scheduler_class_is_called_as_in_eager(pipe, name):
    log = []

    own = getattr(diffusers, name)

    class Logging(own):
        @functools.wraps(own.step)  # pipelines inspect its signature
        def step(self, model_output, timestep, sample, *args, **kwargs):
            plain = not torch._C._functorch.is_batchedtensor(model_output)
            log.append(("step", float(timestep), tuple(sample.shape), plain))
            return super().step(model_output, timestep, sample, *args, **kwargs)

        def scale_model_input(self, sample, *args, **kwargs):
            log.append(("scale", tuple(sample.shape)))
            return super().scale_model_input(sample, *args, **kwargs)

    pipe.scheduler = made(Logging, pipe)
    fast = fastdiff.compile(copy.deepcopy(pipe))
    want = draw(pipe)
    expected, log[:] = list(log), []
    torch.testing.assert_close(draw(fast), want, rtol=1e-6, atol=1e-6)
    assert log == expected
    assert "not its library's own" in str(loop_of(fast).own)


# Calls that do not go through the compiled class


def test_a_call_of_the_original_class_runs_diffusers_loop(pipe):
    want = draw(pipe)
    fast = fastdiff.compile(pipe)
    options = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
    given = torch.randn(1, 4, 8, 8).double()
    kept = given.clone()
    for _ in range(3):
        options["generator"] = torch.Generator().manual_seed(5)
        got = StableDiffusionPipeline.__call__(fast, "red heart", **options).images
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(draw(fast), want, rtol=1e-6, atol=1e-6)
    StableDiffusionPipeline.__call__(fast, "red heart", latents=given, **options)
    assert torch.equal(given, kept)
    assert loop_of(fast).planned == 3
    assert "by something other than" in str(loop_of(fast).own)


def test_a_callback_may_call_the_original_class(pipe):
    """`interrupt` keeps its eager value for callbacks during and after such calls."""
    want = draw(pipe)
    fast = fastdiff.compile(pipe)
    inner, interrupts = [], []

    def again(pipe, i, t, kwargs):
        interrupts.append(pipe.interrupt)
        state = copy.deepcopy(vars(pipe.scheduler))
        options = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
        options["generator"] = torch.Generator().manual_seed(5)
        inner.append(StableDiffusionPipeline.__call__(pipe, "red heart", **options).images)
        vars(pipe.scheduler).update(state)
        return {}

    got = draw(fast, callback_on_step_end=again)
    for picture in (got, *inner):
        torch.testing.assert_close(picture, want, rtol=1e-6, atol=1e-6)
    assert interrupts == [False] * STEPS
    assert fast.interrupt is False
    assert loop_of(fast).planned == 1


def test_a_patched_call_runs(pipe, monkeypatch):
    """This one runs the pipeline twice."""
    own, calls = StableDiffusionPipeline.__call__, []

    def patched(self, *args, **kwargs):
        calls.append(1)
        own(self, *args, **kwargs)
        kwargs["generator"] = torch.Generator().manual_seed(5)
        return own(self, *args, **kwargs)

    want = draw(pipe)
    fast = fastdiff.compile(pipe)
    draw(fast)
    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusionPipeline, "__call__", patched)
        torch.testing.assert_close(draw(fast), want, rtol=1e-6, atol=1e-6)
    assert calls == [1]
    torch.testing.assert_close(draw(fast), want, rtol=1e-6, atol=1e-6)
    assert loop_of(fast).planned == 2


def test_another_pipeline_of_the_compiled_class_draws_eagerly(pipe):
    want = draw(pipe)
    fast = fastdiff.compile(pipe)
    other = type(fast)(**fast.components, requires_safety_checker=False)
    torch.testing.assert_close(draw(other), want, rtol=1e-6, atol=1e-6)
    assert loop_of(other) is None


def test_a_call_that_raises_leaves_no_state(pipe):
    want = draw(pipe)
    fast = fastdiff.compile(pipe)
    options = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
    for error in (KeyboardInterrupt, ValueError, StopIteration, GeneratorExit):

        def fail(pipe, i, t, kwargs, error=error):
            raise error

        with pytest.raises(error):
            draw(fast, callback_on_step_end=fail)
        options["generator"] = torch.Generator().manual_seed(5)
        got = StableDiffusionPipeline.__call__(fast, "red heart", **options).images
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert loop_of(fast).running == 0


def test_a_patched_rescale_noise_cfg_is_honoured(components, monkeypatch):
    module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion
    pipe = StableDiffusionPipeline(**components(), requires_safety_checker=False)
    own = module.rescale_noise_cfg
    monkeypatch.setattr(module, "rescale_noise_cfg", lambda *args, **kw: 0.9 * own(*args, **kw))
    want = draw(pipe, guidance_rescale=0.7)
    fast = fastdiff.compile(pipe)
    got = draw(fast, guidance_rescale=0.7)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert "rescale_noise_cfg was replaced" in str(loop_of(fast).own)
