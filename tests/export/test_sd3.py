"""Stable Diffusion 3 exported: its files at any size, in a pipeline, as engines, on a server."""

import copy
import struct
import warnings
from dataclasses import replace
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from command import run, run_json
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection, PatchEmbed
from peft import LoraConfig

import fastdiff
from fastdiff.bench import preset_sd3, presets
from fastdiff.compiler import Options
from fastdiff.engines import trt
from fastdiff.errors import UserError
from fastdiff.export import onnx as exporter
from fastdiff.export import parity, shapes
from fastdiff.export.parts import parts
from fastdiff.families.part import Patches

# test_flux.py exports a transformer and test_onnx.py a U-Net
pytestmark = pytest.mark.product

NAME, SCALE = "sd35-medium-t5", 0.05
PARTS = (
    *("text_encoder", "text_encoder_2", "text_encoder_3"),
    *("transformer", "vae_decoder", "vae_encoder"),
)
TOKENS = 77 + 256
SILENT = SimpleNamespace(**dict.fromkeys(("start", "step", "finish"), lambda *_: None))
PRESET = ("--preset", NAME, "--scale", SCALE)


@pytest.fixture(scope="module", autouse=True)
def _small():
    """With T5, a second attention and RMSNorm, and with as few layers as possible."""
    with pytest.MonkeyPatch.context() as patch:
        few = tuple(replace(text, layers=1) for text in preset_sd3.TEXTS)
        vae = preset_sd3.vae_config
        shallow = {"layers_per_block": 1}
        patch.setattr(preset_sd3, "TEXTS", few)
        patch.setattr(preset_sd3, "T5_LAYERS", 1)
        patch.setattr(preset_sd3, "vae_config", lambda *how, **more: vae(*how, **more) | shallow)
        own = replace(presets.SD35_MEDIUM, layers=2, dual_layers=1, t5=True)
        patch.setattr(presets, "PRESETS", {NAME: own})
        yield


@pytest.fixture(scope="module")
def pipe(_small):
    made = presets.build(NAME, SCALE, torch.float32, "cpu")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def exported(pipe, export_onnx):
    return export_onnx("sd3", pipe, *PRESET)


def draw(pipe, height=80, width=48):
    """A picture with odd numbers of patches in both directions."""
    noise = torch.Generator().manual_seed(3)
    more = {"height": height, "width": width, "generator": noise, "output_type": "pt"}
    return pipe("red heart", num_inference_steps=3, **more).images


def session(exported, part):
    file = exported.folder / part / "model.onnx"
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("largest", [1, 2, 3, 6, 7])
def test_patches_take_the_positions_that_diffusers_crops(largest):
    theirs = PatchEmbed(4, 4, 2, 3, 8, pos_embed_max_size=largest)
    ours = Patches(theirs)
    for rows in range(1, largest + 1):
        for columns in range(1, largest + 1):
            latents = torch.randn(2, 3, 2 * rows, 2 * columns)
            assert torch.equal(ours(latents), theirs(latents))


def test_every_network_has_a_file_and_its_tensors(exported):
    document = exported.document
    assert [part["file"] for part in document["parts"]] == [f"{p}/model.onnx" for p in PARTS]
    assert document["left_out"] == []
    own = session(exported, "transformer")
    assert {port.name: port.shape[1:] for port in own.get_inputs()} == {
        "hidden_states": [16, "height", "width"],
        "timestep": [],
        "encoder_hidden_states": ["sequence_length", 192],
        "pooled_projections": [128],
    }
    assert [port.name for port in own.get_outputs()] == ["out_sample"]
    t5 = session(exported, "text_encoder_3")
    assert [port.name for port in t5.get_inputs()] == ["input_ids"]
    assert [port.name for port in t5.get_outputs()] == ["last_hidden_state"]


def test_verify_draws_the_same(exported):
    report = exported.document["parity"]
    assert report["passed"]
    assert report["psnr_db"] >= 90
    rows = [row for row in report["rows"] if row["part"] == "transformer"]
    assert len(rows) == 9  # three shapes, three timesteps
    assert {row["case"].split(",")[0] for row in rows} >= {f"3×10×6×{TOKENS}"}


@pytest.mark.parametrize("sides", [(2, 2), (6, 10), (10, 8), (14, 30), (16, 766)])
def test_positions_are_cropped_as_diffusers_does_at_any_size(exported, pipe, sides):
    inputs = {
        "hidden_states": torch.randn(1, 16, *sides),
        "timestep": torch.tensor(731.25),
        "encoder_hidden_states": torch.randn(1, 9, 192),
        "pooled_projections": torch.randn(1, 128),
    }
    given = {name: value.numpy() for name, value in inputs.items()}
    got = torch.from_numpy(session(exported, "transformer").run(None, given)[0])
    inputs["timestep"] = inputs["timestep"][None]
    with torch.no_grad():
        eager = pipe.transformer(**inputs).sample
        double = {name: value.double() for name, value in inputs.items()}
        exact = copy.deepcopy(pipe.transformer).double()(**double).sample
    assert parity.judge("out_sample", got, eager, exact).passed


def test_the_plan_draws_with_the_file(exported, pipe):
    eager, on_ort = draw(pipe), copy.deepcopy(pipe)
    fastdiff.compile(on_ort, Options(backend="ort", engines=exported.folder))
    got = draw(on_ort)
    assert not torch.equal(got, eager)
    assert float((got - eager).abs().max()) < 2e-5
    report = fastdiff.report(on_ort)
    assert {part.name: part.runs for part in report.parts[:4]} == {
        "transformer": "ort",
        "vae.encoder": "fastdiff",
        "vae.decoder": "fastdiff",
        "loop": "fastdiff",
    }
    assert report.parts[0].why == "3 calls"


def test_an_engine_takes_one_timestep_for_all_pictures(exported, pipe):
    """The pipeline's own loop expands it to all pictures and both halves of guidance."""
    on_ort = copy.deepcopy(pipe)
    fastdiff.compile(on_ort, Options(backend="ort", engines=exported.folder))
    given = torch.randn(2, 16, 10, 6), torch.randn(2, 9, 192), torch.randn(2, 128)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        got, eager = (
            one.transformer(*given, torch.tensor(500.5).expand(2)).sample for one in (on_ort, pipe)
        )
    assert float((got - eager).abs().max()) < 2e-5
    reason = "runs eagerly: the pictures have different timesteps"
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=reason):
        on_ort.transformer(*given, torch.tensor([500.5, 3.0]))


def test_a_picture_larger_than_the_positions_gives_diffusers_own_error(exported, pipe):
    pipe = copy.deepcopy(pipe)
    fastdiff.compile(pipe, Options(backend="ort", engines=exported.folder))
    latents = torch.randn(1, 16, 2, 770)
    text, pooled = torch.randn(1, 9, 192), torch.randn(1, 128)
    with (
        torch.no_grad(),
        pytest.warns(RuntimeWarning, match=r"has the sides \[2, 770\]; .* takes at most 768"),
        pytest.raises(ValueError, match="Width .385. cannot be greater"),
    ):
        pipe.transformer(latents, text, pooled, torch.tensor([5.0]))


def test_an_engine_with_a_lora_is_refused(exported, pipe):
    pipe = copy.deepcopy(pipe)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UserError, match="transformer cannot run on ort: a LoRA adapter"):
        fastdiff.compile(pipe, Options(backend="ort", engines=exported.folder))


def test_an_engine_with_an_ip_adapter_is_refused(exported, pipe):
    pipe = copy.deepcopy(pipe)
    net = pipe.transformer
    width, head = net.inner_dim, net.config.attention_head_dim
    made = {
        name: SD3IPAdapterJointAttnProcessor2_0(width, width, head, 32)
        for name in net.attn_processors
    }
    net.set_attn_processor(made)
    net.image_proj = IPAdapterTimeImageProjection(
        20, width, hidden_dim=32, depth=1, dim_head=8, heads=4, num_queries=5, timestep_in_dim=16
    )
    with pytest.raises(UserError, match="transformer cannot run on ort: .*IP-Adapter"):
        fastdiff.compile(pipe, Options(backend="ort", engines=exported.folder))


def test_an_engine_with_a_controlnet_is_refused(exported, pipe):
    parts = {name: part for name, part in pipe.components.items() if "image_" not in name}
    net = SD3ControlNetModel.from_transformer(pipe.transformer, 1)
    controlled = StableDiffusion3ControlNetPipeline(**parts, controlnet=net)
    with pytest.raises(UserError, match="takes no residuals, which the controlnet of"):
        fastdiff.compile(controlled, Options(backend="ort", engines=exported.folder))


def test_a_server_takes_the_files(exported, tmp_path):
    code, document, err = run_json(
        "export", exported.folder, "--triton-repo", "--out", tmp_path / "out"
    )
    assert code == 0, err
    models = {model["name"]: model for model in document["models"]}
    assert set(models) == set(PARTS)
    assert models["transformer"]["max_batch_size"] == 0  # all pictures share one timestep
    assert models["text_encoder_3"]["max_batch_size"] == 4


STATIC = {
    "text_encoder": {"input_ids": [2, 77]},
    "text_encoder_2": {"input_ids": [2, 77]},
    "text_encoder_3": {"input_ids": [2, 256]},
    "transformer": {
        "hidden_states": [2, 16, 10, 6],
        "encoder_hidden_states": [2, TOKENS, 192],
        "pooled_projections": [2, 128],
    },
    "vae_decoder": {"latent_sample": [1, 16, 10, 6]},
    "vae_encoder": {"sample": [1, 3, 80, 48]},
}


def test_engines_have_the_shapes_that_a_pipeline_uses(tmp_path):
    asked = ("--target", "sm_89", "--static", "1x80x48", "--dry-run")
    code, document, err = run_json("export", *PRESET, "--trt", "--out", tmp_path / "out", *asked)
    assert code == 0, err
    profiles = {made["part"]: made["profiles"][0] for made in document["engines"]}
    best = {part: {name: end["opt"] for name, end in p.items()} for part, p in profiles.items()}
    assert best == STATIC


# 15 s; test_trt.py builds a U-Net's, and the dry run above shows what the builder is asked for.
@pytest.mark.product
@pytest.mark.parametrize("folder", ["transformer", "text_encoder_3"])
def test_an_engine_is_built_by_tensorrt(pipe, tmp_path, folder):
    """In half precision, for any size from one patch on."""
    half = copy.deepcopy(pipe).to(torch.float16)
    every = parts(half, torch.float16, timestep=(1,))
    wanted = shapes.parse("1x16x16:1x80x48:2x128x128", None)
    profile = shapes.profiles(every, wanted)[folder]
    part = next(part for part in every if part.folder == folder)
    exporter.write(part, tmp_path, exporter.TRT_OPSET, lambda line: None)
    order = trt.Order("sm_89", profile)
    plan = bytes(trt.build("rtx", tmp_path / part.file, order, SILENT))
    assert plan.count(b"accelerators={sm89 }") == 1
    for port in (*part.inputs, *part.outputs):
        assert port.name.encode() in plan
    for bounds in profile.values():
        for shape in bounds.values():
            if len(shape) > 2:  # two numbers could occur by chance
                assert struct.pack(f"<{len(shape)}q", *shape) in plan


def test_an_engine_for_a_picture_larger_than_the_positions_is_refused(tmp_path):
    asked = ("--target", "sm_89", "--static", "1x64x6160", "--dry-run")
    code, out, err = run("export", *PRESET, "--trt", "--out", tmp_path / "out", *asked)
    assert (code, out) == (2, "")
    assert "1x64x6160: width 6160 is more than 6144, the maximum of transformer" in err
