"""FLUX.2's network as an ONNX file of any size: ONNX Runtime runs it and is compared with torch,
also in a pipeline."""

import copy

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from exports import transformer
from small import FLUX2, SMALL_VAE, noisy

import fastdiff
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.engines.ort import Session
from fastdiff.errors import UserError
from fastdiff.export import onnx, parity, picture
from fastdiff.export.parts import left_out, parts

# test_flux.py exports a transformer and test_onnx.py a U-Net
pytestmark = pytest.mark.product

VAE = SMALL_VAE | {"latent_channels": 4}
ONE = {"num_layers": 1, "num_single_layers": 1}
WIDE = FLUX2["joint_attention_dim"]


def pipeline(cls=Flux2Pipeline, guidance=None):
    config = FLUX2 | ONE
    config |= {"guidance_embeds": cls is Flux2Pipeline if guidance is None else guidance}
    transformer = noisy(Flux2Transformer2DModel(**config))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    made = cls(scheduler, noisy(AutoencoderKLFlux2(**VAE)), None, None, transformer)
    made.default_sample_size = 12
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def test_the_file_computes_what_torch_does_and_draws_the_same(pipe, out):
    found = parity.verify(pipe, transformer(pipe), out, print)
    assert found.passed, parity.to_markdown(found)
    assert found.psnr_db > 90
    assert left_out(pipe) == ()
    (part,) = transformer(pipe)
    assert [port.name for port in part.inputs] == [
        *("hidden_states", "timestep", "encoder_hidden_states", "img_ids", "txt_ids", "guidance"),
    ]


@pytest.mark.parametrize(("last", "tokens"), [((0, 0, 3, 0), 5), ((10, 200, 90, 0), 600)])
@pytest.mark.parametrize("batch", [1, 2])
def test_rotary_embeddings_are_those_of_diffusers_at_any_position(pipe, out, last, tokens, batch):
    """As the pipeline gives them: integers, for each picture."""
    (part,) = transformer(pipe)
    run = Session(out / part.file, torch.device("cpu"))
    places = torch.stack([torch.linspace(0, end, 8).long() for end in last], dim=1)
    words = torch.zeros(tokens, 4, dtype=torch.long)
    words[:, 3] = torch.arange(tokens)
    inputs = {
        "hidden_states": torch.randn(batch, 8, FLUX2["in_channels"]),
        "encoder_hidden_states": torch.randn(batch, tokens, WIDE),
        "timestep": torch.tensor(0.7312).expand(batch),
        "img_ids": places.expand(batch, -1, -1),
        "txt_ids": words.expand(batch, -1, -1),
        "guidance": torch.full((batch,), 3.5),
    }
    double = copy.deepcopy(pipe.transformer).double()
    kept = {name: one.double() for name, one in inputs.items() if one.is_floating_point()}
    with torch.no_grad(), picture.inside(pipe, (part,), {part.folder: run}):
        got = pipe.transformer(**inputs).sample
    with torch.no_grad():
        eager = pipe.transformer(**inputs).sample
        exact = double(**inputs | kept).sample
    assert not torch.equal(got, eager)
    assert parity.judge("out_sample", got, eager, exact).passed


def drawn(pipe, **options):
    """Two pictures, of another size than the file was traced or verified at."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(2, 2, 9, WIDE, generator=generator)
    given = {"prompt_embeds": text[0], "height": 20, "width": 28, "generator": generator}
    given |= {"num_inference_steps": 3, "output_type": "pt"}
    if isinstance(pipe, Flux2KleinPipeline):
        given["negative_prompt_embeds"] = text[1]
    return pipe(**given | options).images


def check(pipe, out, backend="ort", planned=1, **options):
    eager, other = drawn(pipe, **options), copy.deepcopy(pipe)
    fastdiff.compile(other, backend=backend, engines=out)
    got = drawn(other, **options)
    assert not torch.equal(got, eager)
    assert float((got - eager).abs().max()) < 2e-5
    loop, slot = loop_of(other), slot_of(other.transformer)
    assert (slot.fast, dict(slot.eager), loop.planned) == (3, {}, planned), loop.own
    assert fastdiff.report(other).parts[0].runs == backend
    return loop


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_the_plan_draws_the_same_pictures_with_the_file(pipe, out, backend):
    check(pipe, out, backend)


def test_with_a_reference_picture_diffusers_loop_calls_the_file(pipe, out):
    colours = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    loop = check(pipe, out, planned=0, image=PIL.Image.fromarray(colours))
    assert any("constant_tokens, which is not an input of the engine" in why for why in loop.own)


def test_klein_with_a_network_that_embeds_a_guidance_is_refused():
    """diffusers draws without it, but an input of a file cannot be left out."""
    pipe = pipeline(Flux2KleinPipeline, guidance=True)
    assert drawn(pipe).isfinite().all()
    with pytest.raises(UserError, match="a Flux2KleinPipeline gives its transformer no guidance"):
        parts(pipe, torch.float32)


@pytest.mark.slow  # traces a network and an autoencoder of its own
def test_klein_with_true_guidance_and_its_autoencoder(tmp_path):
    pipe, out = pipeline(Flux2KleinPipeline), tmp_path / "files"
    every = parts(pipe, torch.float32)
    onnx.export(pipe, every, out, onnx.ORT_OPSET, print)
    found = parity.verify(pipe, every, out, print)
    assert found.passed, parity.to_markdown(found)
    assert {row.part for row in found.rows} == {"transformer", "vae_decoder", "vae_encoder"}
    assert "guidance" not in [port.name for port in every[0].inputs]
    check(pipe, out)
