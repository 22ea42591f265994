"""`Options.backend`: a U-Net in ONNX Runtime or OpenVINO draws the same, or says why it cannot."""

import copy
import json
import shutil
import sys
import threading
import warnings

import pytest
import torch
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from peft import LoraConfig

import fastdiff
from fastdiff.compiler import Options
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.engines.ort import Session
from fastdiff.errors import UserError
from fastdiff.export import onnx
from fastdiff.kernels.contract import judge, max_error


def draw(pipe, **options):
    """The final latents."""
    given = {"prompt": "red heart", "num_inference_steps": 4, "guidance_scale": 4.0}
    given |= {"generator": torch.Generator().manual_seed(3), "output_type": "latent"}
    pipe.set_progress_bar_config(disable=True)
    return pipe(**(given | options)).images


def exact_copy(pipe):
    """The pipeline in float64."""
    exact = copy.deepcopy(pipe)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(exact, name, None) is not None:
            getattr(exact, name).double()
    return exact


def hold(pipe, **options):
    """Assert that the engine's latents are within the budget and that nothing ran eagerly."""
    plain = copy.deepcopy(pipe)
    shape = (2 if "num_images_per_prompt" in options else 1, 4)
    sides = [options.get(s, pipe.unet.config.sample_size * pipe.vae_scale_factor) for s in SIDES]
    noise = torch.randn(*shape, *(side // pipe.vae_scale_factor for side in sides))
    eager = draw(plain, latents=noise, **options)
    exact = draw(exact_copy(plain), latents=noise.double(), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        got = draw(pipe, latents=noise, **options)
    # 4 steps amplify rounding errors, so the receipt's rule with a factor of 4
    error, yardstick = (float((x - exact).square().mean().sqrt()) for x in (got, eager))
    assert error <= 4 * yardstick, (error, yardstick)
    assert not torch.equal(got, eager)  # another runtime drew


SIDES = ("height", "width")


@pytest.fixture
def on_engine(small_demo, small_onnx):
    """on_engine(backend): `small_demo` compiled for this engine."""
    return lambda backend: fastdiff.compile(
        copy.deepcopy(small_demo), Options(backend=backend, engines=small_onnx)
    )


@pytest.fixture
def on_ort(on_engine):
    return on_engine("ort")


RUNTIMES = pytest.mark.parametrize("backend", ["ort", "openvino"])


@RUNTIMES
def test_a_call_is_within_the_budget(small_demo, on_engine, backend):
    """Eager's error is the larger of two memory formats, as in the bench's receipt."""
    pipe = on_engine(backend)
    net = small_demo.unet
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    for batch, side, tokens, step in ((1, 8, 77, 999), (2, 16, 20, 500.5), (3, 24, 77, 0)):
        sample = torch.randn(batch, 4, side, 16)
        text = torch.randn(batch, tokens, net.config.cross_attention_dim)
        with torch.no_grad():
            eagers = [unet(sample, step, text).sample for unet in (net, last)]
            exact = copy.deepcopy(net).double()(sample.double(), step, text.double()).sample
            got = pipe.unet(sample, step, text).sample
        eager = max(eagers, key=lambda one: max_error(one, exact))
        verdict = judge("sample", got, eager, exact)
        assert verdict.passed, verdict
    assert fastdiff.report(pipe).parts[0].runs == backend
    assert fastdiff.report(pipe).parts[0].why == "3 calls"


@RUNTIMES
def test_pictures_are_drawn_by_the_plan(on_engine, backend):
    pipe = on_engine(backend)
    for scheduler, options in (
        (None, {}),
        (None, {"guidance_scale": 1.0}),
        (None, {"height": 80, "width": 48, "num_images_per_prompt": 2}),
        (EulerDiscreteScheduler, {"negative_prompt": "blue"}),
        (UniPCMultistepScheduler, {}),
    ):
        if scheduler:
            pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        hold(pipe, **options)
    assert loop_of(pipe).planned == 5


ONE_LEVEL = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
"""A U-Net that never halves its picture takes half the time to export."""


# 9 s each; the tests above read files of a smaller U-Net with both
@pytest.mark.product
@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_compiling_sdxl_for_an_engine_exports_it(components, backend):
    parts = components(xl=True, dtype=torch.float32, unet=ONE_LEVEL)
    pipe = StableDiffusionXLPipeline(**parts)
    fastdiff.compile(pipe, Options(backend=backend))
    hold(pipe)
    hold(pipe, height=48, width=32, original_size=(32, 32))
    assert loop_of(pipe).planned == 2


# makes an export; test_plan.py has an overflow without an engine
@pytest.mark.product
def test_after_an_overflow_in_float16_the_engine_runs_in_float32(components):
    pipe = StableDiffusionPipeline(**components(dtype=torch.float32), requires_safety_checker=False)
    with torch.no_grad():
        pipe.unet.mid_block.resnets[0].conv2.weight.mul_(3e5)
    exact = draw(copy.deepcopy(pipe))
    pipe.to(torch.float16)
    fastdiff.compile(pipe, Options(backend="ort"))
    got = draw(pipe)
    assert got.dtype == torch.float16
    assert (got.float() - exact).norm() <= 0.02 * exact.norm()
    assert "float32 since float16 overflowed in the engine" in str(fastdiff.report(pipe))


def test_restore_leaves_no_trace(small_demo, on_ort):
    before = draw(copy.deepcopy(small_demo))
    draw(on_ort)
    with pytest.raises(UserError, match="unet runs on ort already; restore it first"):
        fastdiff.compile(on_ort)
    fastdiff.restore(on_ort)
    assert torch.equal(draw(on_ort), before)


def eager_once(pipe, reason):
    """Assert that the picture is eager's, with a warning that gives the reason."""
    plain = copy.deepcopy(pipe)
    before = dict(slot_of(pipe.unet).eager)
    with pytest.warns(RuntimeWarning, match=reason):
        got = draw(pipe)
    assert torch.allclose(got, draw(plain), atol=1e-5)
    assert sum(slot_of(pipe.unet).eager.values()) > sum(before.values())


def test_with_edited_weights_it_runs_eagerly(on_ort):
    hold(on_ort)
    with torch.no_grad():
        on_ort.unet.conv_in.weight[0] *= 1.5
    eager_once(on_ort, "weights or settings other than those the engine was made from")


def test_with_the_original_weights_back_the_engine_runs_again(on_ort):
    weight = on_ort.unet.conv_in.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
    eager_once(on_ort, "weights or settings other than those")
    with torch.no_grad():
        weight.copy_(before)
    hold(on_ort)


def other_heads(pipe):
    """Change the number of heads, which leaves the weights as they are."""
    for module in pipe.unet.modules():
        if type(module).__name__ == "Attention" and module.heads > 1:
            module.heads = 1


def test_with_other_settings_it_runs_eagerly(small_demo, small_onnx, on_ort):
    plain = draw(copy.deepcopy(small_demo))
    other_heads(on_ort)
    assert (draw(copy.deepcopy(on_ort)) - plain).abs().max() > 0.1  # a copy is eager
    eager_once(on_ort, "weights or settings other than those")
    pipe = copy.deepcopy(small_demo)
    other_heads(pipe)
    with pytest.raises(UserError, match="weights or settings other than those"):
        fastdiff.compile(pipe, Options(backend="ort", engines=small_onnx))


def test_a_call_and_the_plan_share_one_binding(on_ort, monkeypatch):
    """OpenVINO compiles for each binding's shapes, so a second one would copy the weights."""
    bind, bound = Session.bind, []

    def binding(self, inputs, outputs):
        bound.append(inputs)
        return bind(self, inputs, outputs)

    monkeypatch.setattr(Session, "bind", binding)
    hold(on_ort)
    sample, _, text = (torch.randn(tuple(shape)) for shape in bound[0].values())
    with torch.no_grad():
        on_ort.unet(sample, 500, text)
    assert len(bound) == 1
    hold(on_ort)
    assert len(bound) == 1


def test_inference_mode_then_a_plain_call(on_ort):
    with torch.inference_mode():
        draw(on_ort)
    hold(on_ort)


def test_sides_that_the_engine_cannot_halve_run_eagerly(on_ort):
    plain, noise = copy.deepcopy(on_ort), torch.randn(1, 4, 9, 7)
    with pytest.warns(RuntimeWarning, match="the engine takes multiples of 2"):
        got = draw(on_ort, latents=noise)
    assert torch.allclose(got, draw(plain, latents=noise), atol=1e-5)
    hold(on_ort)


def test_with_lora_it_runs_eagerly_and_without_it_on_the_engine_again(on_ort):
    torch.manual_seed(1)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_v"])
    on_ort.unet.add_adapter(config, "a")
    eager_once(on_ort, "a LoRA adapter, which an engine does not have")
    on_ort.unet.delete_adapters("a")
    on_ort.unload_lora_weights()
    hold(on_ort)


def test_a_disabled_lora_is_refused_too(small_demo):
    pipe = copy.deepcopy(small_demo)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q"])
    pipe.unet.add_adapter(config, "a")
    pipe.disable_lora()
    with pytest.raises(UserError, match="unet cannot run on ort: a LoRA adapter"):
        fastdiff.compile(pipe, Options(backend="ort"))


def test_a_fused_lora_counts_as_edited_weights(on_ort):
    torch.manual_seed(1)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_v"])
    on_ort.unet.add_adapter(config, "a")
    on_ort.fuse_lora(components=["unet"])  # writes through .data
    on_ort.unload_lora_weights()
    eager_once(on_ort, "weights or settings other than those")


def test_arguments_without_an_engine_input_run_eagerly(on_ort):
    on_ort.enable_freeu(0.9, 0.2, 1.2, 1.4)
    eager_once(on_ort, "FreeU")
    on_ort.disable_freeu()
    hold(on_ort)
    sample, text = (
        torch.randn(1, 4, 8, 8),
        torch.randn(1, 77, on_ort.unet.config.cross_attention_dim),
    )
    mask = torch.ones(1, 77)
    with (
        torch.no_grad(),
        pytest.warns(RuntimeWarning, match="encoder_attention_mask, which is not an input"),
    ):
        on_ort.unet(sample, 5, text, encoder_attention_mask=mask)


def test_two_threads_share_an_engine(on_ort):
    wanted = [
        draw(copy.deepcopy(on_ort), generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    ]
    got = [None, None]
    pipes = [on_ort, type(on_ort).__bases__[0](**on_ort.components, requires_safety_checker=False)]

    def work(i):
        got[i] = draw(pipes[i], generator=torch.Generator().manual_seed(i))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_an_engine_of_other_weights_is_refused(small_demo, small_onnx):
    pipe = copy.deepcopy(small_demo)
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1
    with pytest.raises(UserError, match="unet cannot run on ort: weights or settings"):
        fastdiff.compile(pipe, Options(backend="ort", engines=small_onnx))
    assert slot_of(pipe.unet) is None


BAD = {
    "was not written by fastdiff export --onnx": lambda folder: (folder / "export.json").unlink(),
    "has no readable export.json": lambda folder: (folder / "export.json").write_text("{"),
    "has schema fastdiff.export/0, but this fastdiff reads": lambda folder: edit(
        folder, schema="fastdiff.export/0"
    ),
    "is damaged: it does not name its parts": lambda folder: edit(
        folder, parts=[{"file": "unet/model.onnx"}]
    ),
    "holds no unet": lambda folder: edit(folder, parts=[]),
    "differs from what was written": lambda folder: truncate(folder / "unet/model.onnx"),
}


def edit(folder, **values):
    path = folder / "export.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(("message", "damage"), BAD.items())
def test_an_unusable_folder_is_named(small_demo, small_onnx, tmp_path, message, damage):
    folder = tmp_path / "onnx"
    shutil.copytree(small_onnx, folder)
    damage(folder)
    pipe = copy.deepcopy(small_demo)
    with pytest.raises(UserError, match=message):
        fastdiff.compile(pipe, Options(backend="ort", engines=folder))
    assert slot_of(pipe.unet) is None


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_a_folder_in_another_dtype_is_named(small_demo, small_onnx, tmp_path, backend):
    folder = tmp_path / "onnx"
    shutil.copytree(small_onnx, folder)
    parts = json.loads((folder / "export.json").read_text())["parts"]
    edit(folder, parts=[part | {"dtype": "bfloat16"} for part in parts])
    with pytest.raises(UserError, match="holds unet in bfloat16, the pipeline is in float32; expo"):
        fastdiff.compile(copy.deepcopy(small_demo), Options(backend=backend, engines=folder))


@pytest.mark.parametrize(("backend", "package"), [("ort", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_runtime_is_named(small_demo, small_onnx, monkeypatch, backend, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"backend {backend} needs {package} .*pip install 'fastd"):
        fastdiff.compile(copy.deepcopy(small_demo), Options(backend=backend, engines=small_onnx))


@pytest.mark.parametrize(
    ("backend", "dtype", "message"),
    [
        ("ort", torch.bfloat16, "ONNX Runtime on a CPU has no bf16 convolution; draw in fp32"),
        ("openvino", torch.float16, "openvino computes in fp32 or bf16; the pipeline is torch.fl"),
    ],
)
def test_a_dtype_that_a_runtime_lacks_is_named_before_the_export(
    small_demo, monkeypatch, backend, dtype, message
):
    monkeypatch.setattr(onnx, "write", None)
    with pytest.raises(UserError, match=message):
        fastdiff.compile(copy.deepcopy(small_demo).to(dtype), Options(backend=backend))


def test_a_pipeline_with_a_controlnet_is_refused(small_demo, small_onnx):
    net = ControlNetModel.from_unet(small_demo.unet)
    plain = {n: c for n, c in small_demo.components.items() if n != "image_encoder"}
    pipe = StableDiffusionControlNetPipeline(**plain, controlnet=net, requires_safety_checker=False)
    with pytest.raises(UserError, match="takes no residuals, which the controlnet of"):
        fastdiff.compile(pipe, Options(backend="ort", engines=small_onnx))


def test_a_second_engine_without_a_restore_is_refused(small_onnx, on_ort):
    with pytest.raises(UserError, match="unet runs on ort already; restore it first"):
        fastdiff.compile(on_ort, Options(backend="ort", engines=small_onnx))


def test_keywords_are_options(small_onnx, small_demo):
    by_keyword, by_object = (copy.deepcopy(small_demo) for _ in range(2))
    fastdiff.compile(by_keyword, backend="ort", engines=small_onnx, ignore=("loop",))
    fastdiff.compile(by_object, Options(backend="ort", engines=small_onnx, ignore=("loop",)))
    assert fastdiff.report(by_keyword) == fastdiff.report(by_object)
    assert slot_of(by_keyword.unet).kind.runner == "ort"
    assert loop_of(by_keyword) is None


def test_an_engine_for_a_vae_alone_is_refused(small_demo):
    with pytest.raises(UserError, match="only a denoising network, and there is none"):
        fastdiff.compile(copy.deepcopy(small_demo.vae), Options(backend="ort"))
