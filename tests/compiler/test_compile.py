"""compile, restore and report on the trained demo pipeline and on bare models."""

import copy
import filecmp

import numpy as np
import pytest
import torch
from alive import live_bytes
from diffusers import (
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from PIL import Image

import fastdiff
from fastdiff.bench.presets import build
from fastdiff.errors import UserError


@pytest.fixture
def pipe(demo):
    return copy.deepcopy(demo)


@pytest.fixture
def call():
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 24)

    def run(unet, **options):
        with torch.no_grad():
            return unet(sample, torch.tensor(7), text, **options)[0]

    return run


def draw(pipe, **options):
    options = {"num_inference_steps": 6, "guidance_scale": 3.0} | options
    generator = torch.Generator().manual_seed(5)
    return pipe("red heart", generator=generator, output_type="np", **options).images


def psnr(a, b):
    return -10 * np.log10(max(np.mean((a - b) ** 2), 1e-20))


def runs(target):
    return {part.name: part.runs for part in fastdiff.report(target).parts}


def test_compile_works_in_place_and_draws_the_same_picture(pipe):
    before = draw(pipe)
    compiled = fastdiff.compile(pipe)
    assert compiled is pipe
    assert psnr(before, draw(pipe)) >= 60
    assert runs(pipe)["unet"] == runs(pipe)["vae.decoder"] == "fastdiff"
    assert "6 calls" in str(fastdiff.report(pipe))


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"num_images_per_prompt": 2},
        {"negative_prompt": "blue"},
        {"height": 72, "width": 40},
        {"callback_on_step_end": lambda pipe, i, t, kwargs: {"latents": kwargs["latents"] * 0.99}},
    ],
    ids=lambda options: ",".join(options),
)
def test_options_of_a_call(demo, pipe, options):
    fastdiff.compile(pipe)
    assert psnr(draw(demo, **options), draw(pipe, **options)) >= 60
    assert not any("eagerly" in part.why for part in fastdiff.report(pipe).parts)


@pytest.mark.parametrize(
    "pipeline", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline]
)
def test_pipelines_that_start_from_a_picture(pipeline, pipe):
    image = Image.fromarray((np.random.default_rng(0).random((64, 64, 3)) * 255).astype("uint8"))
    mask = {"mask_image": Image.new("L", (64, 64), 255)} if "Inpaint" in pipeline.__name__ else {}
    other = pipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    options = {"image": image, "strength": 0.6, **mask}
    before = draw(other, **options)
    fastdiff.compile(other)
    assert psnr(before, draw(other, **options)) >= 60
    assert runs(other)["vae.encoder"] == "fastdiff"
    assert not any("eagerly" in part.why for part in fastdiff.report(other).parts)


@pytest.mark.parametrize(
    "preset", ["sd15", pytest.param("sd21", marks=pytest.mark.product), "sdxl"]
)
def test_published_architectures(preset):
    """Whole pictures with the published block structures, scaled down, with random weights."""
    pipe = build(preset, 0.13, torch.float32, "cpu")
    pipe.set_progress_bar_config(disable=True)
    before = draw(pipe, num_inference_steps=3)
    fastdiff.compile(pipe)
    assert psnr(before, draw(pipe, num_inference_steps=3)) >= 60
    assert not any("eagerly" in part.why for part in fastdiff.report(pipe).parts)


def test_a_second_compile_changes_nothing(pipe):
    fastdiff.compile(pipe)
    draw(pipe)
    slot = pipe.unet._compiled_call_impl
    addresses = [p.data_ptr() for p in pipe.unet.parameters()]
    fastdiff.compile(pipe)
    assert pipe.unet._compiled_call_impl is slot
    assert [p.data_ptr() for p in pipe.unet.parameters()] == addresses


def test_restore_leaves_no_trace(pipe):
    before, attributes = draw(pipe), set(vars(pipe.unet)) | set(vars(pipe.vae.decoder))
    fastdiff.compile(pipe)
    draw(pipe)
    assert fastdiff.restore(pipe) is pipe
    assert np.array_equal(before, draw(pipe))
    assert set(vars(pipe.unet)) | set(vars(pipe.vae.decoder)) == attributes
    assert all(p.is_contiguous() for p in pipe.unet.parameters())


def test_saved_weights_are_byte_identical(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "before")
    fastdiff.compile(pipe)
    draw(pipe)
    pipe.save_pretrained(tmp_path / "after")
    files = [f.relative_to(tmp_path / "before") for f in (tmp_path / "before").rglob("*.*")]
    assert sum(f.suffix == ".safetensors" for f in files) == 3
    for file in files:
        assert filecmp.cmp(tmp_path / "before" / file, tmp_path / "after" / file, shallow=False), (
            file
        )


def test_rounds_of_compile_and_restore_leak_no_memory(unet, call):
    """The live tensors take the same memory after each round."""

    expected = call(unet)
    sizes = []
    for _ in range(4):
        fastdiff.compile(unet)
        call(unet)
        fastdiff.restore(unet)
        sizes.append(live_bytes())
    assert len(set(sizes)) == 1, sizes
    assert torch.equal(call(unet), expected)


def test_weights_are_borrowed_not_copied(forked):
    """Peak resident memory while compiling rises by at most 5% of the weights."""
    script = """
import ctypes
from diffusers import UNet2DConditionModel
# glibc would keep freed blocks of up to 32 MiB, which would count as ours
assert ctypes.CDLL(None).mallopt(-3, 1 << 20) == 1  # M_MMAP_THRESHOLD
def kib(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key))
with torch.device("meta"):  # initialising a GiB of weights takes seconds
    unet = UNet2DConditionModel(block_out_channels=(192, 384, 768, 768), cross_attention_dim=768)
unet.to_empty(device="cpu").eval()
for weight in unet.parameters():
    weight.data.fill_(0.01)
small = UNet2DConditionModel(block_out_channels=(32, 32, 32, 32), cross_attention_dim=32).eval()
fastdiff.compile(small)
weights = sum(p.nbytes for p in unet.parameters())
open("/proc/self/clear_refs", "w").write("5")
before = kib("VmRSS")
fastdiff.compile(unet)
print((kib("VmHWM") - before) * 1024 / weights, weights / 2**30)
"""
    code, out, err = forked(script)
    assert code == 0, err
    rise, gib = map(float, out.split())
    assert gib > 1
    assert rise <= 0.05


def test_edits_and_moves_of_weights_are_followed(unet, call):
    fastdiff.compile(unet)
    eager = copy.deepcopy(unet)  # a copy is eager
    assert "_compiled_call_impl" not in vars(eager)
    with torch.no_grad():
        for model in (unet, eager):
            model.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight.mul_(1.5)
            model.conv_out.bias.add_(0.25)
    close(call(unet), call(eager))
    state = {name: torch.randn_like(p) * 0.05 for name, p in unet.state_dict().items()}
    for model in (unet, eager):
        model.load_state_dict(state, assign=True)  # every parameter is another tensor now
    close(call(unet), call(eager))
    unet.to(torch.float64)
    with (
        torch.no_grad(),
        pytest.warns(RuntimeWarning, match="sample is torch.float32"),
        pytest.raises(RuntimeError),
    ):
        unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 7, 24))
    unet.to(torch.float32)
    close(call(unet), call(eager))


def close(got, expected):
    """Assert equality up to rounding: compile changes the weights' layout, also for eager."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def eagerly(unet, call, reason, expected, **options):
    """Assert that the call warns with the reason, returns eager's result, and is in the report."""
    with pytest.warns(RuntimeWarning, match=reason):
        got = call(unet, **options)
    close(got, expected)
    (part,) = fastdiff.report(unet).parts
    assert reason in part.why


def test_unsupported_changes_run_eagerly_and_are_reported(unet, call):
    plain = copy.deepcopy(unet)
    fastdiff.compile(unet)
    close(call(unet), call(plain))

    expected = unet._call_impl

    def now(**options):
        return call(expected, **options)

    given = {"cross_attention_kwargs": {"masks": None}}
    eagerly(unet, call, "masks in cross_attention_kwargs", now(**given), **given)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    eagerly(unet, call, "FreeU", now())
    unet.disable_freeu()
    handle = unet.mid_block.register_forward_hook(lambda module, args, output: output * 2)
    eagerly(unet, call, "hook", now())
    handle.remove()
    unet.set_attn_processor(AttnProcessor())
    close(call(unet), call(plain))
    unet.set_attn_processor(SlightlyOther())
    eagerly(unet, call, "SlightlyOther", now())
    unet.set_attn_processor(AttnProcessor())
    unet.add_adapter(
        LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False, use_dora=True), "style"
    )
    eagerly(unet, call, "'style', which is not plain LoRA", now())
    assert not torch.allclose(call(unet), call(plain), atol=1e-3)  # the adapter does something
    unet.delete_adapters("style")
    unet.train()
    eagerly(unet, call, "training", now())


class SlightlyOther(AttnProcessor):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * 0.5


def test_calls_with_gradients_run_eagerly(unet):
    fastdiff.compile(unet)
    with pytest.warns(RuntimeWarning, match="gradients"):
        unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 7, 24))[0].sum().backward()
    assert unet.conv_in.weight.grad.abs().max() > 0


def test_a_bare_autoencoder_with_slicing_and_tiling():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=32,
    ).eval()
    eager = copy.deepcopy(vae)
    fastdiff.compile(vae)
    latents = torch.randn(2, 4, 24, 24)
    with torch.no_grad():
        for prepare in ("disable_slicing", "enable_slicing", "enable_tiling"):
            for model in (vae, eager):
                getattr(model, prepare)()
            got, want = vae.decode(latents).sample, eager.decode(latents).sample
            close(got, want)
    assert runs(vae) == {
        "vae.encoder": "fastdiff",
        "vae.decoder": "fastdiff",
        "vae.quant_conv": "diffusers",
        "vae.post_quant_conv": "diffusers",
        "vae.tiling": "diffusers",
        "vae.slicing": "diffusers",
    }


def test_ignore_leaves_a_component_alone(pipe):
    fastdiff.compile(pipe, fastdiff.Options(ignore=("vae",)))
    assert runs(pipe)["unet"] == "fastdiff"
    assert runs(pipe)["vae.decoder"] == "eager"
    with pytest.raises(UserError, match="'transformer'.*unet, vae"):
        fastdiff.compile(pipe, fastdiff.Options(ignore=("transformer",)))


def test_unknown_pipelines_and_networks_are_refused(unet, small):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    stranger = type("Stranger", (DDPMPipeline,), {})(
        UNet2DModel(
            block_out_channels=(32, 32),
            norm_num_groups=8,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
        DDPMScheduler(),
    )
    with pytest.raises(UserError, match="cannot compile a Stranger"):
        fastdiff.compile(stranger)
    odd = UNet2DConditionModel(**(small | {"act_fn": "mish"})).eval()
    with pytest.raises(UserError, match="nothing in this UNet2DConditionModel.*SiLU"):
        fastdiff.compile(odd)
    assert "_compiled_call_impl" not in vars(odd)
    unet.compile()
    with pytest.raises(UserError, match="torch.compile already"):
        fastdiff.compile(unet)
