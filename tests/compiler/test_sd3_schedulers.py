"""Flow-matching schedulers and their options in Stable Diffusion 3 against diffusers: on the plan
if their steps are linear, otherwise in diffusers' own loop."""

import diffusers
import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline

import fastdiff

STEP = 5e-6
"""Relative error: the scheduler computes in float32."""
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
PLANNED = [
    ("FlowMatchEulerDiscrete", {}),
    ("FlowMatchEulerDiscrete", {"shift": 6.0}),
    ("FlowMatchEulerDiscrete", DYNAMIC),
    ("FlowMatchEulerDiscrete", DYNAMIC | {"time_shift_type": "linear"}),
    ("FlowMatchEulerDiscrete", DYNAMIC | {"shift_terminal": 0.1}),
    ("FlowMatchEulerDiscrete", {"use_karras_sigmas": True}),
    ("FlowMatchEulerDiscrete", {"use_exponential_sigmas": True}),
    ("FlowMatchEulerDiscrete", {"use_beta_sigmas": True}),
    ("FlowMatchEulerDiscrete", {"invert_sigmas": True}),
    ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}),
    ("FlowMatchHeunDiscrete", {"shift": 3.0}),
    ("FlowMatchLCM", {"shift": 3.0}),
    ("FlowMatchLCM", DYNAMIC),
    ("DPMSolverMultistep", FLOW),
    ("DPMSolverMultistep", FLOW | {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    ("DPMSolverMultistep", FLOW | {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistep", FLOW | {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverSinglestep", FLOW),
    ("UniPCMultistep", FLOW),
    ("UniPCMultistep", FLOW | {"solver_order": 3}),
    ("UniPCMultistep", FLOW | {"disable_corrector": [0, 1]}),
    ("DEISMultistep", FLOW),
    ("SASolver", FLOW),
]
OWN = [
    ("FlowMatchLCM", {"scale_factors": [0.5, 0.5, 1.0, 1.0], "upscale_mode": "nearest"}),
    ("DPMSolverMultistep", FLOW | {"thresholding": True}),
    ("UniPCMultistep", FLOW | {"thresholding": True}),
]
"""Schedulers whose steps are not linear."""


def ids(cases):
    return [name + ",".join(f"-{part}" for part in options) for name, options in cases]


def scheduler(name, options):
    return getattr(diffusers, f"{name}Scheduler")(**options)


@pytest.mark.parametrize(("name", "options"), PLANNED, ids=ids(PLANNED))
def test_linear_schedulers_run_as_plans(components_sd3, hold, name, options):
    parts = components_sd3() | {"scheduler": scheduler(name, options)}
    pipe = StableDiffusion3Pipeline(**parts)
    hold(pipe, "plan", STEP, num_inference_steps=7, max_sequence_length=5)
    hold(pipe, "plan", STEP, num_inference_steps=3, guidance_scale=1.0, num_images_per_prompt=2)


@pytest.mark.parametrize(("name", "options"), OWN, ids=ids(OWN))
def test_nonlinear_schedulers_run_in_diffusers_loop(components_sd3, hold, name, options):
    parts = components_sd3() | {"scheduler": scheduler(name, options)}
    pipe = StableDiffusion3Pipeline(**parts)
    hold(pipe, f"{name}Scheduler", STEP, num_inference_steps=5)
    (loop,) = [part for part in fastdiff.report(pipe).parts if part.name == "loop"]
    assert f"{name}Scheduler" in loop.why


@pytest.mark.parametrize("call", [{"mu": 0.9}, {"sigmas": [0.9, 0.5, 0.2]}, {"height": 32}])
def test_arguments_of_a_call_for_the_scheduler(components_sd3, hold, call):
    parts = components_sd3() | {"scheduler": scheduler("FlowMatchEulerDiscrete", DYNAMIC)}
    hold(StableDiffusion3Pipeline(**parts), "plan", STEP, **call)


ENTERED = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "UniPCMultistep")


@pytest.mark.parametrize("name", ENTERED)
def test_image_to_image_starts_in_the_middle(components_sd3, hold, picture, name):
    options = FLOW if "UniPC" in name else {"shift": 3.0}
    parts = components_sd3() | {"scheduler": scheduler(name, options)}
    pipe = StableDiffusion3Img2ImgPipeline(**parts)
    call = {"image": picture(), "height": 16, "width": 16, "num_inference_steps": 6}
    if "UniPC" in name:  # UniPC cannot add noise in the way SD3 calls it
        call |= {"latents": torch.randn(1, 16, 8, 8).double()}
    hold(pipe, "plan", STEP, strength=0.7, **call)


KEEPING = [
    ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}, True),
    ("FlowMatchLCM", {}, False),
    ("FlowMatchHeunDiscrete", {}, False),
    ("DPMSolverMultistep", FLOW, False),
    ("UniPCMultistep", FLOW, False),
]


@pytest.mark.parametrize(("name", "options", "plan"), KEEPING, ids=[one[0] for one in KEEPING])
def test_schedulers_with_a_callback(components_sd3, hold, name, options, plan):
    """A callback might read the predictions that a scheduler keeps, so diffusers' loop runs."""
    pipe = StableDiffusion3Pipeline(**components_sd3() | {"scheduler": scheduler(name, options)})

    def shrink(pipe, i, t, kwargs):
        return {"latents": kwargs["latents"] * (0.9 if i == 1 else 1)}

    loop = "plan" if plan else f"a callback might read {name}Scheduler's"
    hold(pipe, loop, STEP, callback_on_step_end=shrink)
