"""ControlNet pipelines: diffusers' own loop around a compiled ControlNet and U-Net."""

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetUnionModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
    StableDiffusionXLControlNetUnionInpaintPipeline,
    StableDiffusionXLControlNetUnionPipeline,
)

import fastdiff


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"guess_mode": True},
        {"control_guidance_end": 0.5, "controlnet_conditioning_scale": 0.7},
        {"guidance_scale": 1.0, "num_images_per_prompt": 2},
    ],
    ids=lambda call: ",".join(call) or "plain",
)
def test_calls_with_one_controlnet(components, hold, call, picture, controlnet):
    parts = components()
    pipe = StableDiffusionControlNetPipeline(
        **parts, controlnet=controlnet(parts["unet"]), requires_safety_checker=False
    )
    hold(pipe, "diffusers", image=picture(), **call)
    assert ("controlnet", "fastdiff") in {(p.name, p.runs) for p in fastdiff.report(pipe).parts}


def test_two_controlnets(components, hold, picture, controlnet):
    parts = components()
    nets = [controlnet(parts["unet"], seed) for seed in (1, 2)]
    pipe = StableDiffusionControlNetPipeline(
        **parts, controlnet=nets, requires_safety_checker=False
    )
    images = [picture(1), picture(2)]
    first = hold(pipe, "diffusers", image=images, controlnet_conditioning_scale=[0.5, 1.0])
    second = hold(pipe, "diffusers", image=images, controlnet_conditioning_scale=[1.0, 0.5])
    assert not np.allclose(first, second)


@pytest.mark.parametrize(
    "pipeline",
    [
        StableDiffusionControlNetImg2ImgPipeline,
        StableDiffusionControlNetInpaintPipeline,
        StableDiffusionXLControlNetPipeline,
        StableDiffusionXLControlNetImg2ImgPipeline,
        StableDiffusionXLControlNetInpaintPipeline,
    ],
)
def test_controlnet_in_other_pipelines(components, hold, pipeline, picture, mask, controlnet):
    is_xl = "XL" in pipeline.__name__
    parts = components(xl=is_xl)
    options = {"add_watermarker": False} if is_xl else {"requires_safety_checker": False}
    pipe = pipeline(**parts, controlnet=controlnet(parts["unet"]), **options)
    call = {"image": picture(), "control_image": picture(1), "strength": 0.7}
    if "Inpaint" in pipeline.__name__:
        call["mask_image"] = mask
    elif "Img2Img" not in pipeline.__name__:
        call = {"image": picture()}
    hold(pipe, "diffusers", **call)


@pytest.mark.parametrize(
    "pipeline",
    [
        StableDiffusionXLControlNetUnionPipeline,
        StableDiffusionXLControlNetUnionImg2ImgPipeline,
        StableDiffusionXLControlNetUnionInpaintPipeline,
    ],
)
def test_a_union_controlnet_runs_eagerly(components, hold, pipeline, picture, mask, shaken):
    # from_unet needs this width
    parts = components(xl=True, unet={"block_out_channels": (320, 64)})
    net = ControlNetUnionModel.from_unet(
        parts["unet"], conditioning_embedding_out_channels=(16, 32)
    )
    pipe = pipeline(**parts, controlnet=shaken(net), add_watermarker=False)
    call = {"control_image": [picture(1)], "control_mode": [2]}
    if "2Img" in pipeline.__name__ or "Inpaint" in pipeline.__name__:
        call |= {"image": picture(), "strength": 0.7}
    if "Inpaint" in pipeline.__name__:
        call |= {"mask_image": mask}
    hold(pipe, "diffusers", **call)
    assert ("controlnet", "diffusers") in {(p.name, p.runs) for p in fastdiff.report(pipe).parts}


def residuals(net, **options):
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(2, 4, 8, 6, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 7, 32, generator=generator, dtype=torch.float64)
    condition = torch.randn(2, 3, 16, 12, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return net(sample, 41, text, condition, 0.8, **options)


@pytest.mark.parametrize(
    "config",
    [
        {"controlnet_conditioning_channel_order": "bgr"},
        {"global_pool_conditions": True},
    ],
    ids=["bgr", "pooled"],
)
@pytest.mark.parametrize("guess_mode", [False, True])
def test_a_bare_controlnet_returns_the_same_residuals(components, config, guess_mode, controlnet):
    net = controlnet(components()["unet"])
    net.register_to_config(**config)
    want = residuals(net, guess_mode=guess_mode)
    got = residuals(fastdiff.compile(net), guess_mode=guess_mode)
    assert type(got) is type(want)
    assert len(got.down_block_res_samples) == len(want.down_block_res_samples)
    for ours, theirs in zip(
        (*got.down_block_res_samples, got.mid_block_res_sample),
        (*want.down_block_res_samples, want.mid_block_res_sample),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert "1 call" in str(fastdiff.report(net))
    with pytest.warns(RuntimeWarning, match="class_labels"):
        residuals(net, class_labels=torch.zeros(2))


def test_the_same_controlnet_given_twice(components, hold, picture, controlnet):
    parts = components()
    pipe = StableDiffusionControlNetPipeline(
        **parts, controlnet=[controlnet(parts["unet"])] * 2, requires_safety_checker=False
    )
    hold(pipe, "diffusers", image=[picture(1), picture(2)])
    assert "2 calls" not in str(fastdiff.report(pipe))
    fastdiff.restore(pipe)
    assert all(parameter.is_contiguous() for parameter in pipe.controlnet.parameters())


def test_controlnet_in_float32(components, hold, picture, controlnet):
    parts = components(dtype=torch.float32)
    net = controlnet(parts["unet"]).float()
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False)
    hold(pipe, "diffusers", 1e-3, image=picture().float(), output_type="np")  # 60 dB
