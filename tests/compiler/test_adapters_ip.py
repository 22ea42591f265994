"""IP-Adapters of U-Nets in the compiled loop: picture embeddings, scales and edits."""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

import fastdiff

WIDTH = 20
"""Width of an image embedding."""


def state_dict(unet, seed, plus=False):
    """Random weights of an IP-Adapter; `plus`: with a resampler, as in IP-Adapter Plus."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=unet.dtype) * shape[-1] ** -0.5

    text = unet.config.cross_attention_dim
    layers = {}
    # an IP-Adapter file numbers the attentions in the order of attn_processors
    for i, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            width = unet.get_submodule(name.removesuffix(".processor")).inner_dim
            layers |= {f"{i}.to_{part}_ip.weight": randn(width, text) for part in "kv"}
    if not plus:
        projection = {
            "proj.weight": randn(4 * text, WIDTH),
            "proj.bias": randn(4 * text),
            "norm.weight": randn(text) + 1,
            "norm.bias": randn(text),
        }
        return {"image_proj": projection, "ip_adapter": layers}
    projection = {
        "latents": randn(1, 6, 64),
        "proj_in.weight": randn(64, WIDTH),
        "proj_in.bias": randn(64),
        "proj_out.weight": randn(text, 64),
        "proj_out.bias": randn(text),
        "norm_out.weight": randn(text) + 1,
        "norm_out.bias": randn(text),
    }
    for i in range(4):
        projection |= {
            f"layers.{i}.{name}.{part}": randn(64) + (part == "weight")
            for name in ("0.norm1", "0.norm2", "1.0")
            for part in ("weight", "bias")
        }
        shapes = {"0.to_q": (64, 64), "0.to_kv": (128, 64), "0.to_out": (64, 64)}
        shapes |= {"1.1": (256, 64), "1.3": (64, 256)}
        projection |= {f"layers.{i}.{name}.weight": randn(*shape) for name, shape in shapes.items()}
    return {"image_proj": projection, "ip_adapter": layers}


def pictures(seed, *shape, dtype=torch.float64):
    """Embeddings of pictures for guidance: [2, ...], the unconditional ones first."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, WIDTH, generator=generator, dtype=dtype)


def load(pipe, *state_dicts):
    pipe.unet._load_ip_adapter_weights(list(state_dicts), low_cpu_mem_usage=False)
    return pipe


@pytest.fixture
def sd(components):
    return StableDiffusionPipeline(**components(), requires_safety_checker=False)


EMBEDS = "ip_adapter_image_embeds"


def test_one_picture_and_its_scale(sd, hold):
    load(sd, state_dict(sd.unet, 1))
    call = {EMBEDS: [pictures(0, 1)]}
    drawn = [hold(sd, "plan", **call)]
    for scale in (0.5, 0.0, 1.5, {"down": 0.3, "up": {"block_1": [0.0, 0.9]}}):
        sd.set_ip_adapter_scale(scale)
        drawn.append(hold(sd, "plan", **call))
    assert all(not np.allclose(a, b) for a in drawn for b in drawn if a is not b)
    sd.set_ip_adapter_scale(1.0)
    assert np.array_equal(hold(sd, "plan", **call), drawn[0])


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0, EMBEDS: [pictures(0, 1)[1:]]},
        {"num_images_per_prompt": 3, EMBEDS: [pictures(0, 2)]},
        {"prompt": ["red", "blue"], EMBEDS: [pictures(0, 1)]},
    ],
    ids=["no guidance", "two pictures", "two prompts"],
)
def test_batches_of_pictures_and_prompts(sd, hold, call):
    hold(load(sd, state_dict(sd.unet, 1)), "plan", **call)


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_two_adapters(components, hold, xl):
    parts = components(xl=xl)
    if xl:
        pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    load(pipe, state_dict(pipe.unet, 1), state_dict(pipe.unet, 2, plus=True))
    call = {EMBEDS: [pictures(0, 1), pictures(1, 2, 5)]}
    for scales in ([1.0, 1.0], [0.7, 0.2], [0.0, 0.8], [0.0, 0.0]):
        pipe.set_ip_adapter_scale(scales)
        hold(pipe, "plan", **call)


def test_an_adapter_with_a_controlnet_and_in_inpainting(components, hold):
    parts = components(xl=True)
    net = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(16, 32))
    for parameter in net.double().parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    pipe = StableDiffusionXLControlNetPipeline(**parts, controlnet=net.eval())
    load(pipe, state_dict(pipe.unet, 1))
    image = pictures(2, 3, 16)[:1, :, :, :16].abs().clamp(0, 1)
    hold(pipe, "diffusers", image=image, ip_adapter_image_embeds=[pictures(0, 1)])
    pipe = StableDiffusionInpaintPipeline(**components(), requires_safety_checker=False)
    load(pipe, state_dict(pipe.unet, 1))
    call = {"image": image, "mask_image": (image[:, :1] > 0.5).double(), "strength": 0.8}
    hold(pipe, "plan", ip_adapter_image_embeds=[pictures(0, 1)], **call)


def test_an_adapter_with_perturbed_attention_guidance(components, hold):
    options = {"pag_applied_layers": ["mid"], "requires_safety_checker": False}
    pipe = StableDiffusionPAGPipeline(**components(), **options)
    load(pipe, state_dict(pipe.unet, 1))
    hold(pipe, "plan", ip_adapter_image_embeds=[pictures(0, 1)])


def test_a_scale_changed_between_steps(sd, hold):
    load(sd, state_dict(sd.unet, 1))
    plain = hold(sd, "plan", **{EMBEDS: [pictures(0, 1)]})

    def fade(pipe, i, t, kwargs):
        pipe.set_ip_adapter_scale(0.5 - 0.25 * i)
        return kwargs

    sd.set_ip_adapter_scale(1.0)
    options = {EMBEDS: [pictures(0, 1)], "callback_on_step_end": fade}
    eager = copy.deepcopy(sd)
    want = draw_latents(eager, **options)
    got = draw_latents(fastdiff.compile(sd), **options)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert not np.allclose(got, plain)


@pytest.mark.parametrize("when", [0, 1, 3])
def test_an_adapter_switched_on_between_steps(sd, when):
    """The plan was made without the adapter: diffusers draws the remaining steps, if any."""
    load(sd, state_dict(sd.unet, 1))
    pictured, loops = [], []
    for pipe in (sd, fastdiff.compile(copy.deepcopy(sd))):
        pipe.set_ip_adapter_scale(0.0)

        def switch_on(pipe, i, t, kwargs):
            if i == when:
                pipe.set_ip_adapter_scale(1.0)
            return kwargs

        options = {EMBEDS: [pictures(0, 1)], "callback_on_step_end": switch_on}
        pictured.append(draw_latents(pipe, **options))
        loops.append(str(fastdiff.report(pipe)))
    torch.testing.assert_close(pictured[1], pictured[0], rtol=1e-6, atol=1e-6)
    assert ("switched on an IP-Adapter" in loops[1]) == (when != 3)


def draw_latents(pipe, **options):
    generator = torch.Generator().manual_seed(5)
    return pipe(
        "red heart", num_inference_steps=4, generator=generator, output_type="latent", **options
    ).images


def test_scales_in_float32(components):
    """In float32 the network is recorded; the recording must follow the scales, too."""
    parts = components(dtype=torch.float32)
    eager = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    eager.set_progress_bar_config(disable=True)
    load(eager, state_dict(eager.unet, 1))
    pipe = fastdiff.compile(copy.deepcopy(eager))

    def draw(pipe):
        return pipe(
            "red",
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            ip_adapter_image_embeds=[pictures(0, 1, dtype=torch.float32)],
        ).images

    for scale in (1.0, 0.4):
        for each in (eager, pipe):
            each.set_ip_adapter_scale(scale)
        assert np.mean((draw(eager) - draw(pipe)) ** 2) <= 1e-6  # 60 dB
    assert not any("eagerly" in part.why for part in fastdiff.report(pipe).parts)


def test_an_adapter_loaded_replaced_and_unloaded_after_compile(sd, hold):
    plain = hold(sd, "plan")
    assert fastdiff.compile(sd) is sd
    load(sd, state_dict(sd.unet, 1))
    call = {EMBEDS: [pictures(0, 1)]}
    first = hold(sd, "plan", **call)
    load(sd, state_dict(sd.unet, 2))
    assert not np.allclose(hold(sd, "plan", **call), first)
    with torch.no_grad():
        sd.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor.to_v_ip[0].weight *= 3
        sd.unet.encoder_hid_proj.image_projection_layers[0].norm.weight *= 2
    hold(sd, "plan", **call)
    sd.image_encoder, sd.feature_extractor = None, None
    sd.unload_ip_adapter()
    assert np.allclose(hold(sd, "plan"), plain, rtol=1e-9)
    fastdiff.restore(load(sd, state_dict(sd.unet, 1)))
    assert all(parameter.is_contiguous() for parameter in sd.unet.parameters())


def one_call(unet, embeds, **options):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 7, 32, generator=generator, dtype=torch.float64)
    return unet(
        sample, torch.tensor(7), text, added_cond_kwargs={"image_embeds": embeds}, **options
    )[0]


def test_a_block_with_scale_zero_does_not_read_its_pictures(sd):
    unet = load(sd, state_dict(sd.unet, 1)).unet
    processor = unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor
    processor.scale = [0.0]
    processor.to_k_ip[0].weight.data.fill_(torch.inf)
    with torch.no_grad():
        want = one_call(unet, [pictures(0, 1)])
        got = one_call(fastdiff.compile(unet), [pictures(0, 1)])
    assert want.isfinite().all()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


class Louder(IPAdapterAttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * 2


def another_processor(unet):
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor.__class__ = Louder


def scale_of_masks(unet):
    for name, processor in unet.attn_processors.items():
        if "attn2" in name:
            processor.scale = [[0.0, 0.0]]


def masks(unet):
    return {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 16, 16)]}}


@torch.no_grad()
@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (another_processor, "Louder"),
        (scale_of_masks, "not a number"),
        (masks, "ip_adapter_masks"),
        (lambda unet: setattr(unet, "text_encoder_hid_proj", torch.nn.Identity()), "Kolors"),
    ],
    ids=["processor", "scales", "masks", "kolors"],
)
def test_unsupported_uses_run_eagerly(sd, edit, reason):
    unet = load(sd, state_dict(sd.unet, 1)).unet
    fastdiff.compile(unet)
    one_call(unet, [pictures(0, 1)])
    options = edit(unet) or {}
    want = one_call(unet._call_impl, [pictures(0, 1)], **options)
    with pytest.warns(RuntimeWarning, match=reason):
        got = one_call(unet, [pictures(0, 1)], **options)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert reason in str(fastdiff.report(unet))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "embeds",
    [None, [], [pictures(0, 1), pictures(1, 1)], [pictures(0, 1)[:, :, :7]]],
    ids=["none", "no adapter", "two for one", "narrow"],
)
def test_what_diffusers_refuses_is_refused_with_its_message(sd, embeds):
    unet = load(sd, state_dict(sd.unet, 1)).unet
    with pytest.raises((AttributeError, RuntimeError, ValueError)) as own:
        one_call(unet, embeds)
    fastdiff.compile(unet)
    with pytest.raises(own.type) as ours:
        one_call(unet, embeds)
    assert str(ours.value) == str(own.value)
