"""The kernels that are compiled ahead: for each part of a pipeline, at the pipeline's own size."""

from dataclasses import replace

import pytest
import torch
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

import fastdiff
from fastdiff.compiler.own_size import own_size
from fastdiff.compiler.parts import parts
from fastdiff.compiler.slot import slot_of
from fastdiff.families import Sizes
from fastdiff.kernels.jobs import job_from, job_of, launch_of
from fastdiff.kernels.planned import specialised
from fastdiff.runtime.planned import kernels_of

HALF = torch.float16


def asked(target, upcast=None):
    """The planned launches of a compiled target, by part."""
    sizes = own_size(target)
    sizes = sizes if upcast is None else replace(sizes, upcast=upcast)
    slots = {name: slot_of(module) for name, (module, _) in parts(target).items()}
    return {
        name: kernels_of(slot.kind.planned(slot.network, sizes), 90) for name, slot in slots.items()
    }


def names(launches):
    return {launch.kernel.__name__ for launch in launches}


def test_every_part_of_a_pipeline_is_planned(components, controlnet):
    given = components(dtype=HALF)
    net = controlnet(given["unet"]).to(HALF)
    pipe = StableDiffusionControlNetPipeline(**given, controlnet=net)
    found = asked(fastdiff.compile(pipe))
    assert set(found) == {"unet", "controlnet", "vae.encoder", "vae.decoder"}
    assert all(found.values())
    assert "_ada_norm_kernel" in names(found["controlnet"])
    steps = [one for one in found["unet"] if one.kernel.__name__ == "_guided_step_kernel"]
    depths = {(one.constants["DEPTH"], one.arguments["noise_ptr"] is None) for one in steps}
    assert depths == {(depth, drawn) for depth in range(4) for drawn in (True, False)}


def test_sizes_are_the_pipelines_own(components):
    pipe = StableDiffusionPipeline(**components(dtype=HALF))
    assert own_size(pipe) == Sizes(8, 2)
    assert own_size(pipe.unet) == Sizes(8, 8)
    assert own_size(pipe.vae) == Sizes(8, 2)


@pytest.mark.parametrize("upcast", [False, True])
def test_a_vae_that_diffusers_upcasts_is_planned_in_float32(upcast, components):
    given = components(xl=True, dtype=HALF)
    given["vae"].register_to_config(force_upcast=upcast)
    pipe = fastdiff.compile(StableDiffusionXLPipeline(**given))
    assert own_size(pipe).upcast == upcast
    dtypes = {
        one.arguments["x_ptr"].dtype
        for one in asked(pipe)["vae.decoder"]
        if "x_ptr" in one.arguments
    }
    assert dtypes == {torch.float32 if upcast else HALF}


def test_bare_models_are_planned(unet, controlnet):
    net = controlnet(unet)
    for model in (unet, net):
        assert all(asked(fastdiff.compile(model)).values())


def test_a_job_describes_the_same_specialisation_as_its_launch(unet):
    """Jobs are sent as JSON to the processes that compile."""
    for launch in asked(fastdiff.compile(unet))["unet"]:
        job = job_of(launch, 90)
        assert job_from(job.json()) == job
        rebuilt = launch_of(job)
        assert rebuilt.kernel is launch.kernel
        assert {*rebuilt.arguments, *rebuilt.constants} == {*launch.arguments, *launch.constants}
        types, constants, divisible = specialised(launch)
        assert (job.types, job.divisible) == (types, tuple(sorted(divisible)))
        assert {**job.constants} == constants
        for name, value in rebuilt.arguments.items():
            number = value if isinstance(value, int) else value.data_ptr()
            if name not in launch.unspecialised:
                assert (number % 16 == 0) == (name in divisible), name
