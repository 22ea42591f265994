"""FLUX as an ONNX file of any size: ONNX Runtime runs it and is compared with torch, also in a
pipeline."""

import copy

import onnxruntime
import pytest
import torch
from command import run, run_json
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from exports import transformer
from small import FLUX, SMALL_VAE, noisy

import fastdiff
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError
from fastdiff.export import onnx, parity, shapes
from fastdiff.export.parts import parts

VAE = SMALL_VAE | {
    "latent_channels": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": 0.1,
}
ONE = {"num_layers": 1, "num_single_layers": 1}


def flux(cls, **config):
    """With an input for distilled guidance, as FLUX.1-dev has; without text encoders."""
    net = noisy(FluxTransformer2DModel(**FLUX | ONE | {"guidance_embeds": True} | config))
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    vae = noisy(AutoencoderKL(**VAE))
    made = cls(scheduler=scheduler, vae=vae, transformer=net, **absent)
    made.default_sample_size = 12
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def pipe():
    return flux(FluxPipeline)


def text(batch, tokens):
    return {
        "prompt_embeds": torch.randn(batch, tokens, FLUX["joint_attention_dim"]),
        "pooled_prompt_embeds": torch.randn(batch, FLUX["pooled_projection_dim"]),
    }


def test_the_file_computes_what_torch_does_and_draws_the_same(pipe, out):
    found = parity.verify(pipe, transformer(pipe), out, print)
    assert found.passed, parity.to_markdown(found)
    assert found.psnr_db > 90
    (part,) = transformer(pipe)
    assert [port.name for port in part.inputs] == [
        *("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"),
        *("img_ids", "txt_ids", "guidance"),
    ]


@pytest.mark.parametrize(("last", "batch"), [((0, 0, 3), 2), ((1, 200, 0), 1), ((9, 77, 4000), 1)])
def test_rotary_embeddings_are_those_of_diffusers_at_any_position(pipe, out, last, batch):
    """diffusers computes the angles in float64; the file computes in float32 only."""
    positions = torch.stack([torch.linspace(0, end, 8).round() for end in last], dim=1)
    inputs = {
        "hidden_states": torch.randn(batch, 8, FLUX["in_channels"]),
        "timestep": torch.tensor(0.7312),
        "encoder_hidden_states": text(batch, 5)["prompt_embeds"],
        "pooled_projections": text(batch, 5)["pooled_prompt_embeds"],
        "img_ids": positions,
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.full((batch,), 3.5),
    }
    session = onnxruntime.InferenceSession(
        out / "transformer" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (got,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    inputs["timestep"] = inputs["timestep"].expand(batch)
    double = copy.deepcopy(pipe.transformer).double()
    with torch.no_grad():
        eager = pipe.transformer(**inputs).sample
        exact = double(**{name: value.double() for name, value in inputs.items()}).sample
    assert parity.judge("out_sample", torch.from_numpy(got), eager, exact).passed


@pytest.mark.parametrize(
    ("backend", "true_guidance"), [("ort", False), ("ort", True), ("openvino", False)]
)
def test_the_plan_draws_the_same_pictures_with_the_file(pipe, out, backend, true_guidance):
    """Two pictures, of another size than the file was traced or verified at."""
    given = text(2, 9)
    if true_guidance:
        given |= {f"negative_{name}": value for name, value in text(2, 9).items()}
        given["true_cfg_scale"] = 3.0

    def drawn(one):
        noise = torch.Generator().manual_seed(3)
        size = {"height": 20, "width": 28, "output_type": "pt", "generator": noise}
        return one(num_inference_steps=3, **size, **given).images

    eager, other = drawn(pipe), copy.deepcopy(pipe)
    fastdiff.compile(other, backend=backend, engines=out)
    got = drawn(other)
    assert not torch.equal(got, eager)
    assert float((got - eager).abs().max()) < 2e-5
    loop = loop_of(other)
    assert (slot_of(other.transformer).fast, loop.planned) == (3, 1), loop.own
    assert fastdiff.report(other).parts[0].runs == backend


SIZE = {"height": 24, "width": 24}
PICTURE = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(4))
FROM_PICTURES = {
    FluxFillPipeline: (48, {"image": PICTURE, "mask_image": PICTURE[:, :1].round()}),
    FluxControlPipeline: (32, {"control_image": PICTURE}),
}
"""By class, the channels that its network takes, the latents' 16 among them, and what it draws
from."""


@pytest.mark.parametrize(
    "cls", [FluxFillPipeline, pytest.param(FluxControlPipeline, marks=pytest.mark.slow)]
)
def test_pipelines_that_draw_from_pictures(cls, tmp_path):
    """Fill's and Control's networks predict fewer channels than they are given. An engine has them
    as one input, so it runs in diffusers' loop, which joins them in every step."""
    channels, given = FROM_PICTURES[cls]
    pipe, out = flux(cls, in_channels=channels, out_channels=16), tmp_path / "files"
    pipe.save_pretrained(tmp_path / "pipe")
    code, document, _ = run_json("export", tmp_path / "pipe", "--onnx", "--out", out, "--dry-run")
    assert (code, document["left_out"]) == (0, [])
    inputs = document["parts"][0]["inputs"]
    assert inputs["hidden_states"] == ["float32", "batch_size", "packed_height_width", channels]
    onnx.export(pipe, transformer(pipe), out, onnx.ORT_OPSET, print)
    found = parity.verify(pipe, transformer(pipe), out, print)
    assert found.passed, parity.to_markdown(found)
    assert found.psnr_db > 90

    def drawn(one):
        noise = torch.Generator().manual_seed(3)
        more = {"num_inference_steps": 3, "generator": noise, "output_type": "pt"}
        return one(**SIZE, **given, **words, **more).images

    words = text(1, 9)
    eager = drawn(pipe)
    fastdiff.compile(pipe, backend="ort", engines=out)
    got = drawn(pipe)
    assert not torch.equal(got, eager)
    assert float((got - eager).abs().max()) < 2e-5
    assert slot_of(pipe.transformer).fast == 3
    assert any("constant_channels" in why for why in loop_of(pipe).own), loop_of(pipe)


def test_other_commands_refuse_pipelines_that_draw_from_pictures(tmp_path):
    pipe = flux(FluxFillPipeline, in_channels=48, out_channels=16)
    pipe.save_pretrained(tmp_path / "pipe")
    code, _, err = run("bench", tmp_path / "pipe")
    assert code == 2
    assert "holds a FluxFillPipeline, which draws from a picture; call it from Python" in err
    with pytest.raises(UserError, match="no roofline, since it draws from a picture"):
        fastdiff.roofline(pipe)


def test_an_engine_has_the_shapes_that_a_pipeline_uses(pipe):
    """One text for a picture, because guidance is distilled, and one token for 2×2 latents."""
    every = parts(pipe, torch.float32, timestep=(1,))
    found = shapes.profiles(every, shapes.parse(None, "2x24x16"))
    assert {name: ends["opt"] for name, ends in found["transformer"].items()} == {
        "hidden_states": [2, 24, 16],
        "encoder_hidden_states": [2, 512, 20],
        "pooled_projections": [2, 32],
        "img_ids": [24, 3],
        "txt_ids": [512, 3],
        "guidance": [2],
    }
    assert found["vae_decoder"]["latent_sample"]["opt"] == [2, 4, 12, 8]
