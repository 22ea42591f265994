"""Pipelines of Stable Diffusion 3 and 3.5 against diffusers, on the plan or in diffusers' own loop
around the compiled networks."""

import copy

import numpy as np
import pytest
import torch
from covered import covered
from diffusers import (
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from small import add_ip_adapter_sd3, noisy
from transformers import SiglipVisionConfig, SiglipVisionModel

import fastdiff
from fastdiff.compiler.pipelines import loop_of
from fastdiff.runtime.recordings import made

STEP = 5e-6
"""Relative error: the scheduler and RMSNorm compute in float32."""
KINDS = ("sd3", "sd35-medium", "sd35-large")


@pytest.fixture
def sd3(components_sd3):
    return StableDiffusion3Pipeline(**components_sd3())


# Texts


@pytest.mark.parametrize("t5", [False, True], ids=["CLIP", "T5"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_to_image(components_sd3, hold, kind, t5):
    pipe = StableDiffusion3Pipeline(**components_sd3(kind, t5))
    first = hold(pipe, "plan", STEP, output_type="np", negative_prompt="blue")
    assert first.shape == (1, 16, 16, 3)
    assert not np.allclose(first, hold(pipe, "plan", STEP, output_type="np"))
    hold(pipe, "plan", STEP, guidance_scale=1.0, height=20, width=12, max_sequence_length=9)


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 0.0},
        {"guidance_scale": 1.0, "prompt": ["red", "blue"]},
        {"num_images_per_prompt": 3},
        {"prompt": ["red", "blue"], "num_images_per_prompt": 2, "negative_prompt": ["", "green"]},
        {"prompt_2": "dog", "prompt_3": "face", "negative_prompt_2": "blue", "clip_skip": 1},
        {"sigmas": [1.0, 0.6, 0.3]},
    ],
    ids=lambda call: ",".join(call),
)
def test_arguments_of_a_call(sd3, hold, call):
    hold(sd3, "plan", STEP, **call)


def test_latents_of_partial_patches_fail_as_in_diffusers(sd3):
    given = torch.randn(1, 16, 9, 8).double()
    with pytest.raises(RuntimeError) as expected:
        draw(sd3, latents=given)
    fastdiff.compile(sd3)
    with pytest.raises(RuntimeError) as found:
        draw(sd3, latents=given)
    assert str(found.value) == str(expected.value)
    assert "9 x 8 do not divide into patches" in calls(sd3, "loop")


# Pictures


@pytest.mark.parametrize("call", [{"strength": 0.6}, {"guidance_scale": 1.0, "strength": 1.0}])
def test_image_to_image(components_sd3, hold, picture, call):
    pipe = StableDiffusion3Img2ImgPipeline(**components_sd3("sd35-medium"))
    hold(pipe, "plan", STEP, image=picture(), height=16, width=16, **call)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("channels", [16, 33])
def test_inpainting(components_sd3, hold, picture, mask, channels, guidance):
    pipe = StableDiffusion3InpaintPipeline(**components_sd3(in_channels=channels))
    call = {"image": picture(), "mask_image": mask, "strength": 0.8, "guidance_scale": guidance}
    loop = "plan" if channels == 16 else "further channels"
    hold(pipe, loop, STEP, height=16, width=16, **call)


def test_a_callback_while_latents_and_noise_are_one_tensor(components_sd3, hold, picture, mask):
    """At strength 1 diffusers uses one tensor for both, so its loop could not take over."""
    pipe = StableDiffusion3InpaintPipeline(**components_sd3())
    call = {"image": picture(), "mask_image": mask, "strength": 1.0, "height": 16, "width": 16}

    def move(pipe, i, t, given):
        return {"mask": torch.ones(2, 1, 8, 8).double()} if i == 1 else {}

    hold(pipe, "plan", STEP, **call)
    hold(pipe, "its latents are also its noise", STEP, **call, callback_on_step_end=move)


CONTROLLED = ("sd3", "sd35-medium", "sd35-large", "alone")


@pytest.mark.parametrize("kind", CONTROLLED)
def test_controlnet(components_sd3, hold, picture, controlnet_sd3, kind):
    parts = components_sd3("sd3" if kind == "alone" else kind)
    net = controlnet_sd3(kind)
    pipe = StableDiffusion3ControlNetPipeline(**parts, controlnet=net)
    call = {"control_image": picture(1)}
    first = hold(pipe, "diffusers", STEP, **call)
    assert ("controlnet", "fastdiff") in {(p.name, p.runs) for p in fastdiff.report(pipe).parts}
    call |= {"control_guidance_end": 0.5, "controlnet_conditioning_scale": 0.7}
    assert not np.allclose(first, hold(pipe, "diffusers", STEP, **call))
    hold(pipe, "diffusers", STEP, guidance_scale=1.0, num_images_per_prompt=2, **call)
    assert int(calls(pipe, "controlnet").split()[0]) == 12


def test_several_controlnets(components_sd3, hold, picture, controlnet_sd3):
    nets = [controlnet_sd3("sd3", seed) for seed in (1, 2)]
    pipe = StableDiffusion3ControlNetPipeline(**components_sd3(), controlnet=nets)
    images = [picture(1), picture(2)]
    drawn = [
        hold(pipe, "diffusers", STEP, control_image=images, controlnet_conditioning_scale=scales)
        for scales in ([0.5, 1.0], [1.0, 0.5])
    ]
    assert not np.allclose(*drawn)


def test_inpainting_with_a_controlnet(components_sd3, hold, picture, mask, controlnet_sd3):
    net = controlnet_sd3(extra_conditioning_channels=1)
    pipe = StableDiffusion3ControlNetInpaintingPipeline(**components_sd3(), controlnet=net)
    call = {"control_image": picture() * 2 - 1, "control_mask": mask}
    hold(pipe, "diffusers", STEP, height=16, width=16, **call)


def calls(pipe, name):
    (part,) = [part for part in fastdiff.report(pipe).parts if part.name == name]
    return part.why


# IP-Adapters

EMBEDS = "ip_adapter_image_embeds"
WIDTH = 20
"""Width of an image embedding."""


def with_ip_adapter(pipe, seed=1, scale=1.0):
    """Load an IP-Adapter with random weights, as diffusers does."""
    add_ip_adapter_sd3(pipe.transformer, WIDTH, seed)
    pipe.set_ip_adapter_scale(scale)
    return pipe


def pictures(seed=0, count=2, tokens=3):
    """Image embeddings [count, tokens, WIDTH]; for guidance the unconditional ones come first."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, tokens, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_ip_adapter_and_its_scale(components_sd3, hold, kind):
    pipe = with_ip_adapter(StableDiffusion3Pipeline(**components_sd3(kind)))
    drawn = [hold(pipe, "plan", STEP, **{EMBEDS: pictures()})]
    for scale in (0.5, 0.0, 1.5):
        pipe.set_ip_adapter_scale(scale)
        drawn.append(hold(pipe, "plan", STEP, **{EMBEDS: pictures()}))
    assert all(not np.allclose(a, b) for a in drawn for b in drawn if a is not b)
    pipe.transformer.transformer_blocks[1].attn.processor.scale = 0.0
    hold(pipe, "plan", STEP, **{EMBEDS: pictures()})
    assert np.allclose(hold(pipe, "plan", STEP), drawn[2], atol=1e-4)  # without pictures


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0, EMBEDS: pictures(count=1)},
        {"num_images_per_prompt": 2, EMBEDS: pictures()},
        {"prompt": ["red", "blue"], EMBEDS: pictures()},
    ],
    ids=["no guidance", "two pictures", "two prompts"],
)
def test_ip_adapter_of_batches(sd3, hold, call):
    hold(with_ip_adapter(sd3), "plan", STEP, **call)


def test_ip_adapter_of_a_picture(sd3, hold):
    """diffusers runs the image encoder, once per picture."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 16, "num_attention_heads": 2}
    config = SiglipVisionConfig(num_hidden_layers=2, image_size=16, patch_size=8, **sizes)
    sd3.register_modules(image_encoder=noisy(SiglipVisionModel(config)).double())
    with_ip_adapter(sd3)
    picture = torch.rand(1, 3, 16, 16).double()
    first = hold(sd3, "plan", STEP, ip_adapter_image=picture)
    assert not np.allclose(first, hold(sd3, "plan", STEP))
    why = {part.name: (part.runs, part.why) for part in fastdiff.report(sd3).parts}
    assert why["image_encoder"] == ("diffusers", "once per picture")
    assert why["transformer.image_proj"][0] == "diffusers"


def test_image_embeddings_in_joint_attention_kwargs(sd3, hold):
    """diffusers also puts its own argument's embeddings there, into the caller's dictionary."""
    with_ip_adapter(sd3)
    plain, wanted = hold(sd3, "plan", STEP), hold(sd3, "plan", STEP, **{EMBEDS: pictures()})
    kwargs = {"joint_attention_kwargs": {EMBEDS: pictures()}}
    assert np.array_equal(hold(sd3, "plan", STEP, **kwargs), wanted)
    kwargs = {"scale": 1.0}
    call = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "latent"}
    call |= {"prompt": "red heart", "joint_attention_kwargs": kwargs}
    for given in ({EMBEDS: pictures()}, {}):  # in the second call they are still in the dictionary
        generator = torch.Generator().manual_seed(5)
        got = sd3(**call, **given, generator=generator).images
        assert torch.equal(torch.tensor(wanted), got)
    assert np.array_equal(hold(sd3, "plan", STEP), plain)


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("kind", ["other", "in place", "none", "longer", "scale", "from zero"])
def test_image_embeddings_changed_between_steps(sd3, kind, when):
    def edit(pipe, i, t, kwargs):
        if i == when:
            given = pipe.joint_attention_kwargs
            if kind == "other":
                given[EMBEDS] = torch.cat([pictures(1)[:1], pictures(2)[:1]])
            elif kind == "in place":
                given[EMBEDS].mul_(0.3)
            elif kind == "none":
                del given[EMBEDS]
            elif kind == "longer":
                given[EMBEDS] = pictures(3, tokens=4)
            else:
                pipe.set_ip_adapter_scale(0.6)
        return {}

    with_ip_adapter(sd3, scale=0.0 if kind == "from zero" else 1.0)
    fast = fastdiff.compile(copy.deepcopy(sd3))
    want, got = (draw(p, **{EMBEDS: pictures()}, callback_on_step_end=edit) for p in (sd3, fast))
    torch.testing.assert_close(got, want, rtol=STEP, atol=STEP)
    assert not any("eagerly" in part.why for part in fastdiff.report(fast).parts)
    if kind in ("none", "from zero"):
        assert "other embedding shapes" in str(loop_of(fast).own)
    else:
        assert loop_of(fast).planned == 1, loop_of(fast)


def test_an_ip_adapter_with_a_controlnet(components_sd3, hold, picture, controlnet_sd3):
    """The ControlNet gets the same attention kwargs, and uses only the LoRA scale."""
    parts = components_sd3()
    pipe = StableDiffusion3ControlNetPipeline(**parts, controlnet=controlnet_sd3())
    call = {"control_image": picture(), EMBEDS: pictures()}
    call |= {"joint_attention_kwargs": {"scale": 0.5}}
    hold(with_ip_adapter(pipe), "diffusers", STEP, **call)


def draw(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"}
    given["generator"] = torch.Generator().manual_seed(5)
    if "prompt_embeds" not in options:
        given["prompt"] = "red heart"
    return pipe(**given | options).images


# Callbacks


def test_callbacks_see_the_same_as_in_eager(sd3):
    fast = fastdiff.compile(copy.deepcopy(sd3))
    seen = []
    for pipe in (sd3, fast):
        trace = []

        def look(pipe, i, t, kwargs, trace=trace):
            scheduler = pipe.scheduler
            state = (scheduler.step_index, scheduler.begin_index, pipe.num_timesteps)
            trace.append((i, float(t), state, kwargs["latents"].clone()))
            return {}

        trace.append((pipe.scheduler.config.shift, draw(pipe, callback_on_step_end=look)))
        trace.append((pipe.scheduler.step_index,))
        seen.append(trace)
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=STEP, atol=STEP)
    assert loop_of(fast).planned == 1


def text(pipe):
    """Random prompt embeddings whose T5 part is zero, as in pipelines without T5."""
    generator = torch.Generator().manual_seed(8)
    states = torch.randn(2, 333, 72, generator=generator, dtype=torch.float64)
    states[:, 77:] = 0
    return states


def switch_guidance(pipe, scale):
    pipe._guidance_scale = scale


def interrupt(pipe):
    pipe._interrupt = True


def another_shift(pipe):
    pipe.scheduler.sigmas = pipe.scheduler.sigmas * 0.9


EDITS = {
    "latents": lambda pipe, x: {"latents": x * 0.9},
    "prompt_embeds": lambda pipe, x: {"prompt_embeds": text(pipe)},
    "pooled": lambda pipe, x: {"pooled_prompt_embeds": torch.full((2, 64), 0.3).double()},
    "what it does not know": lambda pipe, x: {"negative_prompt_embeds": x},
    "other guidance": lambda pipe, x: switch_guidance(pipe, 2.0),
    "interrupt": lambda pipe, x: interrupt(pipe),
    "weights": lambda pipe, x: pipe.transformer.proj_out.weight.data.mul_(0.9),
}
"""Changes that the plan follows."""
LEFT = {
    "text of another form": lambda pipe, x: {"prompt_embeds": torch.ones(2, 333, 72).double()},
    "guidance off": lambda pipe, x: switch_guidance(pipe, 1.0),
    "sigmas": lambda pipe, x: another_shift(pipe),
    "restored": lambda pipe, x: fastdiff.restore(pipe) and None,
}
"""Changes after which diffusers' loop finishes the picture."""


@pytest.mark.filterwarnings("ignore:fastdiff. transformer runs eagerly:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "pipeline", "when"), covered([*EDITS, *LEFT], ["text", "picture"], [0, 1])
)
def test_changes_by_callbacks(components_sd3, picture, pipeline, name, when):
    if pipeline == "text":
        pipe, given = StableDiffusion3Pipeline(**components_sd3()), {}
    else:
        pipe = StableDiffusion3Img2ImgPipeline(**components_sd3())
        given = {"image": picture(), "height": 16, "width": 16, "num_inference_steps": 4}
    edit = (EDITS | LEFT)[name]
    fast = fastdiff.compile(copy.deepcopy(pipe))
    seen = []
    for which in (pipe, fast):

        def change(pipe, i, t, kwargs):
            changed = edit(pipe, kwargs["latents"]) if i == when else {}
            return changed if isinstance(changed, dict) else {}

        seen.append(draw(which, **given, callback_on_step_end=change))
    torch.testing.assert_close(seen[1], seen[0], rtol=STEP, atol=STEP)
    loop = loop_of(fast)
    if name != "restored":
        assert loop.planned == (name in EDITS), loop
        # with guidance off, diffusers passes one latent with the two texts of guidance
        eagerly = any("eagerly" in part.why for part in fastdiff.report(fast).parts)
        assert eagerly == (name == "guidance off")


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_callers_embeddings_are_read_but_not_written(sd3, guidance):
    """Without guidance diffusers uses the call's own tensors: edits of them count, and diffusers
    never writes to them."""
    given = {"prompt_embeds": text(sd3)[:1], "pooled_prompt_embeds": torch.ones(1, 64).double()}
    if guidance > 1:
        given |= {f"negative_{name}": value * 0.5 for name, value in given.items()}
    drawn = []
    for pipe in (sd3, fastdiff.compile(copy.deepcopy(sd3))):
        own = {name: value.clone() for name, value in given.items()}

        def change(pipe, i, t, kwargs, own=own):
            if i == 1:  # after this the plan cannot continue
                pipe.scheduler.sigmas = pipe.scheduler.sigmas * 0.9
                return {"prompt_embeds": torch.ones(1 + (guidance > 1), 333, 72).double()}
            own["pooled_prompt_embeds"].mul_(0.5)
            return {}

        options = {"guidance_scale": guidance, "num_inference_steps": 4}
        drawn.append(draw(pipe, **own, **options, callback_on_step_end=change))
        assert torch.equal(own["prompt_embeds"], given["prompt_embeds"])
    torch.testing.assert_close(drawn[1], drawn[0], rtol=STEP, atol=STEP)


# LoRA

TARGETS = ["to_q", "to_v", "to_out.0", "add_k_proj", "ff.net.0.proj", "norm1.linear", "proj_out"]
TEXT_TARGETS = ["q_proj", "v_proj", "fc1"]


def add_lora(net, name, seed, targets=TARGETS):
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 4, "target_modules": targets, "init_lora_weights": False}
    net.add_adapter(LoraConfig(**options), name)


@pytest.fixture
def loras(sd3, tmp_path):
    """A folder of two LoRAs of transformer and text encoder, as training scripts save them."""
    for seed, name in enumerate(("first", "second")):
        pipe = copy.deepcopy(sd3)
        add_lora(pipe.transformer, name, seed)
        add_lora(pipe.text_encoder, name, seed, TEXT_TARGETS)
        weights = {
            f"{part}_lora_layers": get_peft_model_state_dict(getattr(pipe, part), adapter_name=name)
            for part in ("transformer", "text_encoder")
        }
        pipe.save_lora_weights(tmp_path / name, **weights)
    return tmp_path


BOTH = ["transformer", "text_encoder"]
LIFE = {
    "load": lambda pipe, files: pipe.load_lora_weights(files / "first", adapter_name="first"),
    "again": lambda pipe, files: pipe.load_lora_weights(files / "second", adapter_name="second"),
    "mix": lambda pipe, files: pipe.set_adapters(["first", "second"], [0.6, 0.4]),
    "one": lambda pipe, files: pipe.set_adapters("first"),
    "disable": lambda pipe, files: pipe.disable_lora(),
    "enable": lambda pipe, files: pipe.enable_lora(),
    "fuse": lambda pipe, files: pipe.fuse_lora(components=BOTH),
    "unfuse": lambda pipe, files: pipe.unfuse_lora(components=BOTH),
    "delete": lambda pipe, files: pipe.delete_adapters("second"),
    "unload": lambda pipe, files: pipe.unload_lora_weights(),
}
IN_PLACE = ("again", "mix", "one", "disable", "enable", "fuse", "unfuse", "delete")
"""Changes that move no weight, so nothing is recorded again."""


def test_all_lora_methods_of_a_pipeline_in_turn(components_sd3, loras):
    eager = StableDiffusion3Pipeline(**components_sd3(dtype=torch.float32))
    pipe = fastdiff.compile(copy.deepcopy(eager))
    drawn = {"none": draw(pipe)}
    for name, change in LIFE.items():
        before = made()
        for each in (eager, pipe):
            change(each, loras)
        drawn[name] = draw(pipe)
        torch.testing.assert_close(drawn[name], draw(eager), rtol=2e-3, atol=2e-3, msg=name)
        assert name not in IN_PLACE or made() == before, name
    assert (drawn["load"] - drawn["none"]).abs().max() > 0.05
    assert torch.equal(drawn["load"], drawn["one"])
    assert torch.equal(drawn["load"], drawn["enable"])
    assert torch.equal(drawn["none"], drawn["disable"])
    assert loop_of(pipe).planned == 1 + len(LIFE)


def test_the_scale_of_a_call(sd3, hold):
    add_lora(sd3.transformer, "one", 0)
    add_lora(sd3.text_encoder, "one", 0, TEXT_TARGETS)
    whole = hold(sd3, "plan", STEP)
    before = made()
    half = hold(sd3, "plan", STEP, joint_attention_kwargs={"scale": 0.5})
    assert not np.allclose(whole, half)
    assert np.array_equal(hold(sd3, "plan", STEP), whole)
    assert made() == before
    with pytest.warns(RuntimeWarning, match="a LoRA scale of 0"):
        draw(sd3, joint_attention_kwargs={"scale": 0})
    assert "a LoRA scale of 0" in calls(sd3, "loop")


def test_lora_of_a_controlnet(components_sd3, hold, picture, controlnet_sd3):
    net = controlnet_sd3()
    add_lora(net, "one", 0, ["to_q", "to_out.0"])
    pipe = StableDiffusion3ControlNetPipeline(**components_sd3(), controlnet=net)
    first = hold(pipe, "diffusers", STEP, control_image=picture())
    kwargs = {"joint_attention_kwargs": {"scale": 0.3}}
    assert not np.allclose(first, hold(pipe, "diffusers", STEP, control_image=picture(), **kwargs))


# Half precision


@pytest.mark.parametrize("callback", [False, True], ids=["", "callback"])
def test_after_an_overflow_in_float16_the_transformer_runs_in_float32(components_sd3, callback):
    """The float32 copy follows the IP-Adapter's scale."""
    pipe = with_ip_adapter(StableDiffusion3Pipeline(**components_sd3(dtype=torch.float32)))
    with torch.no_grad():
        pipe.transformer.transformer_blocks[1].ff.net[2].weight.mul_(1e5)
    pipe.to(torch.float16)
    exact = copy.deepcopy(pipe).to(torch.float32)
    fastdiff.compile(pipe)
    options = {}
    if callback:
        options["callback_on_step_end"] = lambda p, i, t, k: {"latents": k["latents"] * 0.9}
    drawn = []
    for scale in (1.0, 0.3):
        for each in (pipe, exact):
            each.set_ip_adapter_scale(scale)
        got = draw(pipe, **options, **{EMBEDS: pictures().half()})
        want = draw(exact, **options, **{EMBEDS: pictures().half().float()})
        assert got.dtype == torch.float16
        torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)
        drawn.append(want)
    assert (drawn[0] - drawn[1]).abs().max() > 0.1
    assert "overflowed in transformer_blocks.1.ff.net.2" in calls(pipe, "transformer")
    assert loop_of(pipe).planned == 2


# Afterwards


def test_saving_and_restoring(components_sd3, tmp_path):
    pipe = StableDiffusion3Pipeline(**components_sd3("sd35-medium", t5=True))
    want, state = draw(pipe), {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    before = {name: set(vars(part)) for name, part in pipe.components.items() if part is not None}
    own = set(vars(pipe))
    draw(fastdiff.compile(pipe))
    pipe.save_pretrained(tmp_path)
    found = StableDiffusion3Pipeline.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(draw(found), want, rtol=1e-12, atol=1e-12)
    for again in (pipe, fastdiff.restore(pipe)):
        after = again.transformer.state_dict()
        assert after.keys() == state.keys()
        assert all(torch.equal(after[name], value) for name, value in state.items())
    assert type(pipe) is StableDiffusion3Pipeline
    for name, part in pipe.components.items():
        assert part is None or set(vars(part)) == before[name], name
    assert set(vars(pipe)) <= own
    assert all(parameter.is_contiguous() for parameter in pipe.transformer.parameters())
    assert torch.equal(draw(pipe), want)
