"""Tables against diffusers' own loop in float64, with a nonlinear network between the steps."""

import copy

import diffusers
import pytest
import torch

from fastdiff.kernels.guided_step import guided_step
from fastdiff.runtime.schedulers import NotLinear, probe

BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
# name, options, relative error allowed: 1e-10 where the scheduler computes in float64, 2e-6 where
# it casts to float32 inside its step
SCHEDULERS = [
    ("DDIMScheduler", {"clip_sample": False}, 1e-10),
    ("DDPMScheduler", {"clip_sample": False}, 1e-10),
    ("PNDMScheduler", {"skip_prk_steps": True}, 1e-10),
    ("EulerDiscreteScheduler", {}, 2e-6),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, 2e-6),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, 2e-6),
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
FLOW = [("FlowMatchEulerDiscreteScheduler", {}), ("FlowMatchHeunDiscreteScheduler", {})]
IDS = [name + ",".join(f"-{v}" for v in options.values()) for name, options, _ in SCHEDULERS]
SHAPE = (2, 4, 3, 5)


def network(x, timestep):
    """Any smooth nonlinear function of sample and time."""
    mixed = x.roll(1, dims=-1) * 0.3 + x.roll(1, dims=1) * 0.2
    return torch.tanh(x * 0.7 - mixed) + 0.1 * torch.sin(timestep.double() * 0.01 + mixed)


def own_loop(scheduler, generator):
    """As every diffusers pipeline runs it."""
    x = first_sample(scheduler)
    takes = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    for t in scheduler.timesteps:
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        x = scheduler.step(network(scale(x, t), t), t, x, return_dict=False, **takes)[0]
    return x


def table_loop(scheduler, generator):
    """The same by `guided_step` on the probed table."""
    table = probe(scheduler)
    x = first_sample(scheduler).clone()
    history = torch.full((2, table.depth, *SHAPE), float("nan"), dtype=torch.float64)
    rows, following = table.rows(guidance_scale=1.0), table.scales[0] * x
    for i, t in enumerate(table.timesteps):
        noise = torch.zeros(SHAPE, dtype=torch.float64)
        if table.draws[i]:
            dtype = table.noise_dtype or torch.float64
            noise = torch.randn(SHAPE, generator=generator, dtype=dtype).double()
        output = network(following, t)
        following = guided_step(output, x, history, rows, torch.tensor([i]), noise)
    return x


def first_sample(scheduler):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x * getattr(scheduler, "init_noise_sigma", 1.0)


def relative_error(got, want):
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("name", "options", "allowed"), SCHEDULERS, ids=IDS)
def test_table_follows_the_scheduler(name, options, allowed, prediction):
    config = {**BETAS, **options, "prediction_type": prediction}
    scheduler = getattr(diffusers, name).from_config(config)
    for steps in (4, 25, 50):
        scheduler.set_timesteps(steps)
        got = table_loop(scheduler, torch.Generator().manual_seed(2))
        want = own_loop(copy.deepcopy(scheduler), torch.Generator().manual_seed(2))
        assert relative_error(got, want) <= allowed, steps


@pytest.mark.parametrize(("name", "options"), FLOW)
def test_flow_matching(name, options):
    scheduler = getattr(diffusers, name)(**options)
    for steps in (4, 25):
        scheduler.set_timesteps(steps)
        got = table_loop(scheduler, torch.Generator())
        want = own_loop(copy.deepcopy(scheduler), torch.Generator())
        assert relative_error(got, want) <= 2e-6


def test_timesteps_by_hand_and_a_start_in_the_middle():
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS)
    scheduler.set_timesteps(timesteps=[900, 700, 420, 111, 7])
    got = table_loop(scheduler, torch.Generator())
    assert relative_error(got, own_loop(copy.deepcopy(scheduler), torch.Generator())) <= 2e-6
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(20)
    whole = probe(scheduler)
    scheduler.set_begin_index(12)  # as img2img does
    scheduler.timesteps = scheduler.timesteps[12:]
    part = probe(scheduler)
    torch.testing.assert_close(part.rows(1.0), whole.rows(1.0)[12:], rtol=1e-6, atol=1e-9)


def test_step_options_are_part_of_the_table():
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(10)
    plain, noisy = probe(scheduler), probe(scheduler, {"eta": 0.8})
    assert not any(plain.draws)
    assert all(noisy.draws[:-1])
    assert float(noisy.noises.abs().max()) > 0.01
    assert probe(scheduler) is plain  # remembered


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {"clip_sample": True}),
        ("DDPMScheduler", {"clip_sample": True}),
        ("DPMSolverMultistepScheduler", {"thresholding": True}),
    ],
)
def test_what_clips_is_refused(name, options):
    scheduler = getattr(diffusers, name).from_config(BETAS | options)
    for steps in (4, 25):
        scheduler.set_timesteps(steps)
        with pytest.raises(NotLinear):
            probe(scheduler)


def test_depth_is_the_schedulers_own():
    """Rounding is not fitted by a deeper history."""
    depths = {
        ("EulerDiscreteScheduler", "epsilon"): 0,
        ("EulerDiscreteScheduler", "v_prediction"): 0,
        ("EulerDiscreteScheduler", "sample"): 0,
        ("DPMSolverMultistepScheduler", "epsilon"): 1,
        ("DPMSolverMultistepScheduler", "v_prediction"): 1,
        ("LMSDiscreteScheduler", "epsilon"): 3,
    }
    for (name, prediction), depth in depths.items():
        scheduler = getattr(diffusers, name)(**BETAS, prediction_type=prediction)
        scheduler.set_timesteps(25)
        assert probe(scheduler).depth == depth, (name, prediction)


def test_another_table_inside_is_another_scheduler():
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(5)
    before = probe(scheduler)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.3
    assert not torch.equal(probe(scheduler).outputs, before.outputs)


def test_probing_leaves_the_scheduler_as_it_was():
    scheduler = diffusers.UniPCMultistepScheduler(**BETAS)
    scheduler.set_timesteps(8)
    before = copy.deepcopy(vars(scheduler))
    probe(scheduler)
    assert before["_step_index"] == scheduler._step_index
    assert before["model_outputs"] == scheduler.model_outputs
