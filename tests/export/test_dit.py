"""DiT and PixArt as ONNX files of one size: ONNX Runtime runs them and is compared with torch, also
in a pipeline."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from exports import transformer
from small import DIT, PIXART, SMALL_VAE, noisy
from transformers import T5Config, T5EncoderModel

import fastdiff
from fastdiff.bench.pipelines import load
from fastdiff.bench.preset_parts import clip_tokenizer
from fastdiff.bench.preset_sd3 import t5_tokenizer
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError
from fastdiff.export import onnx, parity
from fastdiff.export.parts import parts
from fastdiff.families import family

# test_flux.py exports a transformer and test_onnx.py a U-Net
pytestmark = pytest.mark.product

VAE = SMALL_VAE | {"sample_size": 16}


def dit():
    transformer = noisy(DiTTransformer2DModel(**DIT | {"num_layers": 1}))
    return DiTPipeline(
        transformer, noisy(AutoencoderKL(**VAE)), DDIMScheduler(clip_sample=False)
    ), {"class_labels": [7, 3]}


def pixart():
    """PixArt, and a call with texts of different lengths."""
    tokenizer = t5_tokenizer(clip_tokenizer())
    sizes = {"d_model": 20, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    encoder = noisy(T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)))
    config = PIXART | {"num_layers": 1}
    pipe = PixArtAlphaPipeline(
        tokenizer,
        encoder,
        noisy(AutoencoderKL(**VAE)),
        noisy(PixArtTransformer2DModel(**config)),
        DPMSolverMultistepScheduler(),
    )
    call = {"prompt": ["red heart", "car"], "use_resolution_binning": False}
    return pipe, call | {"clean_caption": False}


PIPES = {"dit": dit, "pixart": pixart}


@pytest.fixture(scope="module", params=PIPES)
def files(request, tmp_path_factory):
    """A pipeline, the arguments of a call, and the folder that it is exported to."""
    torch.manual_seed(0)
    pipe, call = PIPES[request.param]()
    pipe.set_progress_bar_config(disable=True)
    out = tmp_path_factory.mktemp(request.param) / "files"
    onnx.export(pipe, transformer(pipe), out, onnx.ORT_OPSET, print)
    return pipe, call, out


def test_the_file_computes_what_torch_does_and_draws_the_same(files):
    pipe, _, out = files
    found = parity.verify(pipe, transformer(pipe), out, print)
    assert found.passed, parity.to_markdown(found)
    assert {row.case.split(",")[0].split("×")[0] for row in found.rows} == {"1", "3"}


def test_pixarts_text_encoder_takes_a_mask():
    pipe, _ = pixart()
    text, _, *vae = parts(pipe, torch.float32)
    assert [part.folder for part in (text, *vae)] == ["text_encoder", "vae_decoder", "vae_encoder"]
    ids, mask = torch.tensor([[5, 7, 1, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        masked = text.module(ids, mask)[0]
        assert torch.equal(masked, pipe.text_encoder(ids, attention_mask=mask)[0])
        assert not torch.allclose(masked[:, :3], pipe.text_encoder(ids)[0][:, :3])
    assert [port.name for port in text.inputs] == ["input_ids", "attention_mask"]


def test_ort_draws_the_same_picture_on_the_plan(files):
    """The file also returns channels for a variance, which the step drops."""
    pipe, call, out = files

    def drawn():
        generator = torch.Generator().manual_seed(3)
        options = {"num_inference_steps": 3, "output_type": "np", "generator": generator}
        return pipe(**call, **options).images

    eager = drawn()
    fastdiff.compile(pipe, backend="ort", engines=out)
    assert abs(drawn() - eager).max() < 1e-4
    assert (slot_of(pipe.transformer).fast, loop_of(pipe).planned) == (3, 1), loop_of(pipe).own
    assert "ort" in str(fastdiff.report(pipe))


def test_a_pixart_folder_is_read(tmp_path):
    """Every command that takes a folder reads it, because PixArt draws from a text."""
    pipe, _ = pixart()
    pipe.save_pretrained(tmp_path / "pipe")
    read = load(tmp_path / "pipe", torch.float32, "cpu")
    assert type(read) is PixArtAlphaPipeline
    assert all(map(torch.equal, read.transformer.parameters(), pipe.transformer.parameters()))


def test_pixarts_file_takes_sizes():
    """So does the network that draws 1024 pixels a side; its pipeline passes them as one
    dictionary."""
    net = noisy(PixArtTransformer2DModel(**PIXART | {"use_additional_conditions": True}))
    part = family("pixart").denoised.part("transformer", net, torch.float32)
    assert [port.name for port in part.inputs[4:]] == ["resolution", "aspect_ratio"]
    for _, drawn in parity.cases(part):
        x, timestep, text, mask, resolution, ratio = drawn.values()
        sizes = {"resolution": resolution, "aspect_ratio": ratio}
        options = {"encoder_attention_mask": mask, "return_dict": False}
        with torch.no_grad():
            want = net(x, text, timestep.expand(len(x)), sizes, **options)[0]
            torch.testing.assert_close(part.module(*drawn.values())[0], want, rtol=0, atol=1e-5)


def test_the_error_says_why_a_network_is_not_exported():
    net = DiTTransformer2DModel(**DIT)
    net.register_to_config(sample_size=[8, 16])
    with pytest.raises(UserError, match=r"transformer has sample_size \[8, 16\]"):
        family("dit").denoised.part("transformer", net, torch.float32)
