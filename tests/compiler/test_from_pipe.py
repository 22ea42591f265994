"""Pipelines that `from_pipe` makes from a compiled one share its compiled networks."""

import copy
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
)

import fastdiff
from fastdiff.compiler.pipelines import loop_of


def draw(pipe, **call):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    given = {"prompt": "red heart", "num_inference_steps": 4, "output_type": "latent"} | call
    return np.asarray(pipe(**given, generator=generator).images, dtype="float64")


def close(got, want):
    assert np.isfinite(want).all()
    assert np.linalg.norm(got - want) <= 1e-9 * np.linalg.norm(want)


def rows(pipe):
    return {part.name: part for part in fastdiff.report(pipe).parts}


@pytest.fixture
def pipe(components):
    return StableDiffusionPipeline(**components(), requires_safety_checker=False)


@pytest.fixture
def from_picture(picture):
    return {"image": picture(), "strength": 0.6}


def test_the_new_pipeline_uses_the_compiled_networks(pipe, from_picture):
    want = draw(StableDiffusionImg2ImgPipeline.from_pipe(pipe, dtype=torch.float64), **from_picture)
    fastdiff.compile(pipe)
    new = StableDiffusionImg2ImgPipeline.from_pipe(pipe, dtype=torch.float64)
    assert type(new) is StableDiffusionImg2ImgPipeline
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        close(draw(new, **from_picture), want)
    parts = rows(new)
    assert {parts[name].runs for name in ("unet", "vae.encoder")} == {"fastdiff"}
    assert parts["loop"].runs == "diffusers"
    assert parts["loop"].why.startswith("its network is compiled, but this pipeline is not")
    fastdiff.compile(new)
    close(draw(new, **from_picture), want)
    assert loop_of(new).planned == 1
    assert rows(new)["loop"].runs == "fastdiff"


@pytest.mark.parametrize("both", [False, True], ids=["one compiled", "both compiled"])
@pytest.mark.parametrize("first", ["old", "new"])
def test_restoring_either_makes_both_eager_bit_for_bit(pipe, from_picture, first, both):
    new = StableDiffusionImg2ImgPipeline.from_pipe(pipe, dtype=torch.float64)
    eager, eager_new = draw(pipe), draw(new, **from_picture)
    fastdiff.compile(pipe)
    new = StableDiffusionImg2ImgPipeline.from_pipe(pipe, dtype=torch.float64)
    if both:
        fastdiff.compile(new)
    one, other = (pipe, new) if first == "old" else (new, pipe)
    fastdiff.restore(one)
    assert np.array_equal(draw(pipe), eager)
    assert np.array_equal(draw(new, **from_picture), eager_new)
    assert rows(other)["unet"].why == "not compiled"
    if loop_of(other) is not None:
        assert "the unet is not compiled" in rows(other)["loop"].why
    fastdiff.restore(other)
    assert type(pipe) is StableDiffusionPipeline
    assert type(new) is StableDiffusionImg2ImgPipeline
    assert np.array_equal(draw(pipe), eager)


def test_a_dtype_change_by_from_pipe_is_followed(components):
    """Without a dtype argument, from_pipe converts the shared networks to float32."""
    parts = components()
    eager = StableDiffusionPipeline(**copy.deepcopy(parts), requires_safety_checker=False)
    StableDiffusionImg2ImgPipeline.from_pipe(eager)
    want = draw(eager)
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    fastdiff.compile(pipe)
    StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert pipe.unet.dtype == torch.float32
    assert np.abs(draw(pipe) - want).max() <= 1e-4 * np.abs(want).max()
    assert "eagerly" not in rows(pipe)["unet"].why


def test_the_report_of_a_class_with_other_components_lists_them(pipe, controlnet, picture, shaken):
    """Components that the new class does not take stay in its config, not in the report."""
    fastdiff.compile(pipe)
    adapter = shaken(T2IAdapter(3, (32, 64), 1, downscale_factor=2, adapter_type="full_adapter"))
    new = StableDiffusionAdapterPipeline.from_pipe(pipe, adapter=adapter, dtype=torch.float64)
    assert any(name.startswith("_") for name in new.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = rows(new)
    assert not any(name.startswith("_") for name in parts)
    assert parts["adapter"].runs == "diffusers"
    control = StableDiffusionControlNetPipeline.from_pipe(
        pipe, controlnet=controlnet(pipe.unet), dtype=torch.float64
    )
    assert rows(control)["controlnet"].why == "not compiled"
    want = draw(copy.deepcopy(control), image=picture())
    fastdiff.compile(control)
    assert rows(control)["controlnet"].runs == "fastdiff"
    close(draw(control, image=picture()), want)


def test_from_pipe_of_auto_classes_and_of_the_compiled_class(pipe, from_picture):
    fastdiff.compile(pipe)
    new = AutoPipelineForImage2Image.from_pipe(pipe, torch_dtype=torch.float64)
    assert type(new) is StableDiffusionImg2ImgPipeline
    want = draw(pipe)
    twin = type(pipe).from_pipe(pipe, dtype=torch.float64)
    assert loop_of(twin) is None
    close(draw(twin), want)
    assert rows(twin)["loop"].runs == "diffusers"
    fastdiff.compile(twin)
    close(draw(twin), want)
    assert loop_of(twin).planned == 1
