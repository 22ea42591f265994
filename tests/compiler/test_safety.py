"""After changes between two pictures, the compiled pipeline draws what eager draws."""

import copy
import warnings

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from torch import nn

import fastdiff


@pytest.fixture
def pipe(demo):
    return copy.deepcopy(demo)


def draw(pipe, **options):
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"} | options
    return pipe("red heart", generator=torch.Generator().manual_seed(5), **options).images


def psnr(a, b):
    return -10 * np.log10(max(np.mean((a - b) ** 2), 1e-20))


def the_unet(pipe):
    return next(part for part in fastdiff.report(pipe).parts if part.name == "unet")


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return (output[0] * 1.1,) if isinstance(output, tuple) else output


def hooked(pipe):
    add_hook_to_module(pipe.unet, Doubling())


def offloaded(pipe):
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))


def offloaded_in_groups(pipe):
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )


@pytest.mark.parametrize("change", [hooked, offloaded, offloaded_in_groups])
def test_offloading_hooks_run_eagerly_until_they_are_gone(pipe, change):
    plain = copy.deepcopy(pipe)
    fastdiff.compile(pipe)
    before = draw(pipe)
    change(plain)
    change(pipe)
    want = draw(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert psnr(draw(pipe), want) >= 60
    assert the_unet(pipe).runs == "eager"
    assert "hook" in the_unet(pipe).why
    if change is hooked:
        remove_hook_from_module(pipe.unet)
        assert psnr(draw(pipe), before) >= 60
        assert the_unet(pipe).runs == "fastdiff"


def test_a_vae_that_is_upcast_for_every_picture(components):
    """SDXL's VAE overflows in float16: diffusers casts it to float32 for each decode."""
    parts = components(xl=True, dtype=torch.float16)
    pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipe.vae.register_to_config(force_upcast=True)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "height": 64, "width": 64}
    want = draw(pipe, **options)
    fastdiff.compile(pipe)
    for _ in range(2):
        assert psnr(draw(pipe, **options), want) >= 40
        assert pipe.vae.dtype == torch.float16
    assert not any("eagerly" in part.why for part in fastdiff.report(pipe).parts)


def test_training_mode_runs_eagerly(pipe):
    want = draw(pipe)
    fastdiff.compile(pipe)
    pipe.unet.train()
    with pytest.warns(RuntimeWarning, match="training"):
        assert psnr(draw(pipe), want) >= 60
    pipe.unet.eval()
    assert psnr(draw(pipe), want) >= 60
    assert the_unet(pipe).runs == "fastdiff"


def test_components_replaced_between_two_pictures(pipe):
    fastdiff.compile(pipe)
    draw(pipe)
    other = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        other.conv_in.weight.mul_(1.1)
    pipe.unet = other  # not compiled, so it runs eagerly
    plain = copy.deepcopy(pipe)
    assert psnr(draw(pipe), draw(plain)) >= 60
    assert the_unet(pipe).runs == "eager"
    fastdiff.compile(pipe)
    assert psnr(draw(pipe), draw(plain)) >= 60
    assert the_unet(pipe).runs == "fastdiff"


def test_running_out_of_memory_during_a_picture_loses_no_weight(pipe, monkeypatch):
    from fastdiff.models.borrow import Loan

    want = draw(pipe)
    fastdiff.compile(pipe)
    before = draw(pipe)
    place = Loan._place

    def no_memory(self, sources, *shape, **options):
        if not self._rehearsal and len(self._lent) > 40:
            raise MemoryError
        return place(self, sources, *shape, **options)

    # so that the next picture prepares the weights again
    pipe.unet.to(torch.float64).to(torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(Loan, "_place", no_memory)
        with pytest.raises(MemoryError):
            draw(pipe)
    assert psnr(draw(pipe), want) >= 60
    assert np.array_equal(draw(pipe), before)


def guided_by_step(self):
    return 7.5 if (self.scheduler.step_index or 0) < 2 else 1.5


def test_guidance_that_depends_on_the_step(pipe, monkeypatch):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    plain, before = copy.deepcopy(pipe), draw(pipe)
    monkeypatch.setattr(StableDiffusionPipeline, "guidance_scale", property(guided_by_step))
    fastdiff.compile(pipe)
    want = draw(plain)
    assert psnr(want, before) < 40, "the edit had no effect"
    assert psnr(draw(pipe), want) >= 60


class Halving(AttnProcessor2_0):
    def __call__(self, *given, **options):
        return super().__call__(*given, **options) * 0.5


def processors_of_their_own(unet):
    for processor in unet.attn_processors.values():
        processor.__class__ = Halving


def shared(unet):
    unet.share_memory()
    with torch.no_grad():
        unet.conv_in.weight.mul_(0.9)


def adapter_with_a_bias(unet):
    layer = next(m for m in unet.modules() if hasattr(m, "lora_B"))
    layer.lora_B["a"].bias = nn.Parameter(torch.ones(layer.lora_B["a"].out_features))


@pytest.mark.parametrize("edit", [processors_of_their_own, shared, adapter_with_a_bias])
def test_changes_after_compile_run_eagerly(pipe, edit):
    config = LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False)
    pipe.unet.add_adapter(config, "a")
    plain = copy.deepcopy(pipe)
    fastdiff.compile(pipe)
    before = draw(pipe)
    draw(pipe)
    for each in (pipe, plain):
        edit(each.unet)
    want = draw(plain)
    assert psnr(want, before) < 50, "the edit had no effect"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert psnr(draw(pipe), want) >= 60
    assert "eagerly" in the_unet(pipe).why or the_unet(pipe).runs == "eager"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_float32_copy_sees_writes_through_data(pipe):
    """After an overflow in float16 a float32 copy draws until the weights change."""
    pipe.to(torch.float16)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(3e4)
        pipe.unet.conv_in.bias.mul_(3e4)
    fastdiff.compile(pipe)
    before = draw(pipe)
    assert "float32 since" in the_unet(pipe).why
    for weight in pipe.unet.up_blocks.parameters():
        weight.data.mul_(0.8)
    changed = draw(pipe)
    assert psnr(changed, before) < 50
    fastdiff.compile(fastdiff.restore(pipe))
    assert psnr(draw(pipe), changed) >= 60
