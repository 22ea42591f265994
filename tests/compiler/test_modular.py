"""diffusers' modular pipelines: their networks are compiled, their loop stays diffusers' own; in
float64 against the same blocks in eager."""

import copy
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    ComponentsManager,
    ControlNetModel,
    ModularPipeline,
    PerturbedAttentionGuidance,
    StableDiffusion3AutoBlocks,
    StableDiffusionXLAutoBlocks,
)
from diffusers.modular_pipelines import (
    ComponentSpec,
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
)
from PIL import Image

import fastdiff
from fastdiff.compiler.slot import kept_slot
from fastdiff.kernels.contract import judge

STEPS = 3


def made(blocks, parts, manager=None, **others):
    """A modular pipeline of `blocks` with a tiny pipeline's components."""
    pipe = blocks.init_pipeline(components_manager=manager)
    names = set(pipe.component_names)
    pipe.update_components(
        **{name: part for name, part in parts.items() if name in names}, **others
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **call):
    given = {"prompt": "red heart", "num_inference_steps": STEPS, "output_type": "pt"} | call
    generator = torch.Generator().manual_seed(5)
    return pipe(**given, generator=generator, output="images")


def rows(pipe):
    return {part.name: part for part in fastdiff.report(pipe).parts}


def hold(pipe, *taken, tolerance=1e-9, **call):
    """Assert that the compiled pipeline draws the eager picture with the parts `taken` compiled,
    and that the restored one draws it bit for bit."""
    eager = draw(pipe, **call)
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert fastdiff.compile(pipe) is pipe
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # no call may run eagerly
        got = draw(pipe, **call)
    assert torch.isfinite(eager).all()
    torch.testing.assert_close(got, eager, rtol=tolerance, atol=tolerance)
    found = rows(pipe)
    for name in taken:
        calls = int(found[name].why.split()[0])
        assert found[name].runs == "fastdiff"
        assert calls > 0, f"{name} never ran compiled"
    assert found["loop"].runs == found["scheduler"].runs == "diffusers"
    assert "its blocks run one by one" in found["loop"].why
    fastdiff.restore(pipe)
    assert torch.equal(draw(pipe, **call), eager)
    assert all(kept_slot(module) is None for module in modules)


def picture(seed=0):
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8))


def test_text_to_image(components):
    hold(made(StableDiffusionXLAutoBlocks(), components(True)), "unet", "vae.decoder")


def test_image_to_image_and_inpainting(components):
    pipe = made(StableDiffusionXLAutoBlocks(), components(True))
    size = {"height": 16, "width": 16, "strength": 0.7}
    hold(pipe, "unet", "vae.decoder", "vae.encoder", image=picture(), **size)
    mask = Image.fromarray(np.uint8(255 * (np.arange(16) < 8)).repeat(16).reshape(16, 16))
    inputs = {"image": picture(), "mask_image": mask} | size
    hold(pipe, "unet", "vae.decoder", "vae.encoder", **inputs)


def test_a_controlnet(components, controlnet):
    parts = components(True)
    pipe = made(StableDiffusionXLAutoBlocks(), parts, controlnet=controlnet(parts["unet"]))
    assert isinstance(pipe.controlnet, ControlNetModel)
    size = {"height": 16, "width": 16, "controlnet_conditioning_scale": 0.7}
    hold(pipe, "unet", "controlnet", "vae.decoder", control_image=picture(), **size)


def test_stable_diffusion_3(components_sd3):
    pipe = made(StableDiffusion3AutoBlocks(), components_sd3())
    step = 2e-6  # its scheduler computes in float32
    hold(pipe, "transformer", "vae.decoder", tolerance=step, height=16, width=16)


def test_a_float32_picture_is_within_the_budget(components):
    """The error to float64 is at most twice eager's plus one rounding."""
    parts = components(True)
    pipe = made(StableDiffusionXLAutoBlocks(), parts)
    latents = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    exact = draw(pipe, latents=latents)
    pipe.to(torch.float32)
    eager = draw(pipe, latents=latents.float())
    got = draw(fastdiff.compile(pipe), latents=latents.float())
    verdict = judge("picture", got, eager, exact)
    assert verdict.passed, verdict


def test_guiders_without_guidance_and_with_hooks(components):
    """One guider turns guidance off, the other hooks the U-Net, whose calls then run eagerly."""
    pipe = made(StableDiffusionXLAutoBlocks(), components(True))
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
    hold(pipe, "unet")
    guider = PerturbedAttentionGuidance(
        guidance_scale=4.0,
        perturbed_guidance_scale=2.0,
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
        perturbed_guidance_config={
            "fqn": "mid_block.attentions.0.transformer_blocks",
            "indices": [0],
        },
    )
    guided = draw(pipe)
    pipe.update_components(guider=guider)
    eager = draw(pipe)
    assert not torch.allclose(eager, guided)
    fastdiff.compile(pipe)
    with pytest.warns(RuntimeWarning, match="unet runs eagerly"):
        got = draw(pipe)
    torch.testing.assert_close(got, eager, rtol=1e-9, atol=1e-9)
    assert "calls ran eagerly: a hook that wraps" in rows(pipe)["unet"].why
    fastdiff.restore(pipe)
    assert torch.equal(draw(pipe), eager)


def test_pipelines_of_one_components_manager_share_compiled_networks(components):
    manager = ComponentsManager()
    first = made(StableDiffusionXLAutoBlocks(), components(True), manager)
    second = StableDiffusionXLAutoBlocks().init_pipeline(components_manager=manager)
    names = (
        "unet",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "scheduler",
    )
    second.update_components(**{name: manager.get_one(name=name) for name in names})
    eager = draw(first)
    fastdiff.compile(first)
    assert rows(second)["unet"].runs == "fastdiff"
    torch.testing.assert_close(draw(second), eager, rtol=1e-9, atol=1e-9)
    fastdiff.restore(second)
    assert rows(first)["unet"].runs == "eager"
    assert torch.equal(draw(first), eager)


def test_a_replaced_component_is_reported(components):
    pipe = fastdiff.compile(made(StableDiffusionXLAutoBlocks(), components(True)))
    pipe.update_components(unet=copy.deepcopy(pipe.unet))
    assert rows(pipe)["unet"].why == "not compiled"
    fastdiff.compile(pipe)
    assert rows(pipe)["unet"].runs == "fastdiff"


class Denoise(ModularPipelineBlocks):
    """A user's own block: one step of a U-Net without a scheduler, then the decoder."""

    @property
    def expected_components(self):
        from diffusers import AutoencoderKL, UNet2DConditionModel

        return [ComponentSpec("unet", UNet2DConditionModel), ComponentSpec("vae", AutoencoderKL)]

    @property
    def inputs(self):
        return [InputParam("latents", required=True), InputParam("text", required=True)]

    @property
    def intermediate_outputs(self):
        return [OutputParam("images")]

    @torch.no_grad()
    def __call__(self, components, state):
        block = self.get_block_state(state)
        noise = components.unet(block.latents, 7, block.text, return_dict=False)[0]
        block.images = components.vae.decode(block.latents - noise, return_dict=False)[0]
        self.set_block_state(state, block)
        return components, state


def test_a_users_own_blocks(components):
    pipe = made(Denoise(), components())
    assert type(pipe) is ModularPipeline
    inputs = {
        "latents": torch.randn(1, 4, 8, 8, dtype=torch.float64),
        "text": torch.randn(1, 7, 32, dtype=torch.float64),
    }
    eager = pipe(**inputs, output="images")
    fastdiff.compile(pipe)
    torch.testing.assert_close(pipe(**inputs, output="images"), eager, rtol=1e-9, atol=1e-9)
    assert {rows(pipe)[name].runs for name in ("unet", "vae.decoder")} == {"fastdiff"}
    fastdiff.restore(pipe)
    assert torch.equal(pipe(**inputs, output="images"), eager)
    empty = Denoise().init_pipeline()
    with pytest.raises(ValueError, match="nothing in this ModularPipeline can be made fast"):
        fastdiff.compile(empty)
