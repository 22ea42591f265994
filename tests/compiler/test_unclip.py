"""Pipelines with a prior, whose latents are embeddings: plans against diffusers' loops."""

import copy
from unittest.mock import patch

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    KandinskyV22PriorEmb2EmbPipeline,
    KandinskyV22PriorPipeline,
    StableUnCLIPPipeline,
    UnCLIPImageVariationPipeline,
    UnCLIPPipeline,
    UNet2DModel,
)
from small import noisy
from unclip import SUPER_RES, drawn, kandinsky_parts, stable_parts, unclip_parts, variation_parts

import fastdiff
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.kernels.contract import judge

STEPS = {"prior_num_inference_steps": 4, "decoder_num_inference_steps": 3}
CALL = STEPS | {"super_res_num_inference_steps": 2, "output_type": "np"}


@pytest.fixture(scope="module")
def kandinsky(tokenizer):
    return kandinsky_parts(tokenizer)


@pytest.fixture(scope="module")
def unclip(tokenizer):
    return unclip_parts(tokenizer)


def made(cls, parts):
    kept = {name: p if name == "tokenizer" else copy.deepcopy(p) for name, p in parts.items()}
    pipe = cls(**kept)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def close(ours, eager):
    return float((ours - eager).norm() / eager.norm()) <= 1e-9


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"guidance_scale": 1.0, "num_inference_steps": 2},
        {
            "prompt": ["red heart", "blue star"],
            "negative_prompt": ["a", "b"],
            "guidance_scale": 3.0,
        },
        {"num_images_per_prompt": 2, "latents": torch.randn(2, 32, dtype=torch.float64)},
    ],
    ids=["plain", "unguided", "negative prompts", "given latents"],
)
def test_kandinskys_prior(kandinsky, call):
    pipe = made(KandinskyV22PriorPipeline, kandinsky)
    call = {"num_inference_steps": 5} | call
    given = copy.deepcopy(call)
    eager = drawn(pipe, **call)
    fastdiff.compile(pipe)
    assert close(drawn(pipe, **call), eager)
    assert (loop_of(pipe).planned, dict(loop_of(pipe).own)) == (1, {})
    assert slot_of(pipe.prior).fast == call["num_inference_steps"]
    if "latents" in call:  # the caller's latents are not changed
        assert torch.equal(call["latents"], given["latents"])
    fastdiff.restore(pipe)
    assert torch.equal(drawn(pipe, **call), eager)


def test_image_to_embedding_starts_in_the_middle(kandinsky):
    pipe = made(KandinskyV22PriorEmb2EmbPipeline, kandinsky)
    call = {"image": torch.randn(1, 32).double(), "strength": 0.6, "num_inference_steps": 6}
    eager = drawn(pipe, **call)
    fastdiff.compile(pipe)
    assert close(drawn(pipe, **call), eager)
    assert (loop_of(pipe).planned, dict(loop_of(pipe).own)) == (1, {})


def test_interpolation_runs_three_plans(kandinsky):
    """`interpolate` calls the pipeline three times."""
    pipe = made(KandinskyV22PriorPipeline, kandinsky)

    def between():
        generator = torch.Generator().manual_seed(3)
        given = (["red heart", "blue star"], [0.3, 0.7])
        return pipe.interpolate(*given, num_inference_steps=2, generator=generator).image_embeds

    eager = between()
    fastdiff.compile(pipe)
    assert close(between(), eager)
    assert loop_of(pipe).planned == 3


def test_with_a_callback_diffusers_runs_the_loop(kandinsky):
    """diffusers' loop around the compiled network draws the same."""
    pipe = made(KandinskyV22PriorPipeline, kandinsky)
    seen = []

    def look(pipe, i, t, given):
        seen.append(i)
        return given

    call = {"num_inference_steps": 3, "callback_on_step_end": look}
    eager = drawn(pipe, **call)
    fastdiff.compile(pipe)
    assert close(drawn(pipe, **call), eager)
    assert seen == [0, 1, 2] * 2
    (reason,) = loop_of(pipe).own
    assert "callback" in reason
    assert slot_of(pipe.prior).fast == 3


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": ["red heart", "blue star"]},
        {"prior_guidance_scale": 1.0, "decoder_guidance_scale": 1.0},
    ],
    ids=["two prompts", "unguided"],
)
def test_the_loops_of_unclip(unclip, more):
    """The third loop's last step runs another network."""
    pipe = made(UnCLIPPipeline, unclip)
    call = CALL | more
    eager = drawn(pipe, **call)
    fastdiff.compile(pipe)
    assert close(drawn(pipe, **call), eager)
    ran = {"prior": 1, "decoder": 1, "super_res_first": 1}
    assert (loop_of(pipe).ran, loop_of(pipe).own) == (ran, {})
    assert [slot_of(net).fast for net in (pipe.super_res_first, pipe.super_res_last)] == [1, 1]
    report = {part.name: part.why for part in fastdiff.report(pipe).parts}
    named = "1 of the prior, 1 of the decoder, 1 of the super_res_first"
    assert report["loop"] == f"3 loops ({named})"
    assert {f"{loop}_scheduler" for loop in ("prior", "decoder", "super_res")} <= report.keys()
    fastdiff.restore(pipe)
    assert torch.equal(drawn(pipe, **call), eager)


def test_unclip_in_float32(unclip):
    """The picture is within the error budget, from the same noise as in float64."""
    draw = torch.randn

    def single(*given, **more):
        wanted = more.get("dtype") or torch.get_default_dtype()
        return draw(*given, **more | {"dtype": torch.float32}).to(wanted)

    exact = made(UnCLIPPipeline, unclip)
    pipe = made(UnCLIPPipeline, unclip).to(torch.float32)
    with patch.object(torch, "randn", single):
        truth, eager = drawn(exact, **CALL), drawn(pipe, **CALL)
        ours = drawn(fastdiff.compile(pipe), **CALL)
    assert loop_of(pipe).planned == 3
    verdict = judge("picture", ours, eager, truth)
    assert verdict.passed, verdict


def test_an_ignored_loop_runs_in_diffusers_beside_planned_ones(unclip):
    pipe = made(UnCLIPPipeline, unclip)
    eager = drawn(pipe, **CALL)
    fastdiff.compile(pipe, ignore=("decoder",))
    assert close(drawn(pipe, **CALL), eager)
    assert loop_of(pipe).ran == {"prior": 1, "super_res_first": 1}
    assert loop_of(pipe).own == {"decoder: the decoder is not compiled": 1}


def test_a_picture_as_the_prompt(tokenizer):
    """The caller's latents are not changed."""
    pipe = made(UnCLIPImageVariationPipeline, variation_parts(tokenizer))
    own = torch.randn(1, 3, 16, 16).double()
    call = {name: value for name, value in CALL.items() if "prior" not in name}
    call |= {"image": torch.rand(1, 3, 16, 16).double(), "super_res_latents": own}
    call |= {"super_res_num_inference_steps": 4, "prompt": None}
    before = own.clone()
    eager = drawn(pipe, **call)
    fastdiff.compile(pipe)
    assert close(drawn(pipe, **call), eager)
    assert torch.equal(own, before)
    ran = {"decoder": 1, "super_res_first": 1}
    assert (loop_of(pipe).ran, loop_of(pipe).own) == (ran, {})
    assert slot_of(pipe.super_res_first).fast == 3


def test_stable_unclip(tokenizer, components):
    pipe = made(StableUnCLIPPipeline, stable_parts(tokenizer, components))
    call = {"prior_num_inference_steps": 3, "num_inference_steps": 2, "output_type": "latent"}
    eager = drawn(pipe, **call)
    fastdiff.compile(pipe)
    assert close(drawn(pipe, **call), eager)
    assert (loop_of(pipe).ran, loop_of(pipe).own) == ({"prior": 1, "unet": 1}, {})
    assert loop_of(pipe).planned == 2


@pytest.mark.parametrize("kind", ["thresholds embeddings", "8 channels are predicted for 3"])
def test_combinations_that_raise_in_diffusers_raise_compiled(kind, tokenizer, components, unclip):
    if kind.startswith("thresholds"):
        call = {"prior_num_inference_steps": 3, "num_inference_steps": 2, "output_type": "latent"}
        pipe = made(StableUnCLIPPipeline, stable_parts(tokenizer, components))
        pipe.prior_scheduler = DDPMScheduler(prediction_type="sample", thresholding=True)
    else:
        call, pipe = CALL, made(UnCLIPPipeline, unclip)
        pipe.super_res_last = noisy(UNet2DModel(**SUPER_RES | {"out_channels": 8})).double()
    fastdiff.compile(pipe)
    with pytest.raises((TypeError, RuntimeError)):
        drawn(pipe, **call)
    assert [why for why in loop_of(pipe).own if kind in why]


def test_a_lora_of_the_prior_is_merged(kandinsky):
    from peft import LoraConfig

    pipe = made(KandinskyV22PriorPipeline, kandinsky)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]  # as in diffusers' training script
    pipe.prior.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    pipe.prior = noisy(pipe.prior).double()
    eager = drawn(pipe, num_inference_steps=2)
    fastdiff.compile(pipe)
    assert close(drawn(pipe, num_inference_steps=2), eager)
    pipe.prior.disable_adapters()
    without = drawn(pipe, num_inference_steps=2)
    fastdiff.restore(pipe)
    assert close(without, drawn(pipe, num_inference_steps=2))
    assert loop_of(pipe) is None
