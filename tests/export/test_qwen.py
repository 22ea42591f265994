"""Qwen-Image's network as an ONNX file of any size: ONNX Runtime runs it and is compared with
diffusers."""

import copy

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from exports import transformer
from small import QWEN, noisy

import fastdiff
from fastdiff.engines.ort import Session
from fastdiff.errors import UserError
from fastdiff.export import parity, picture, shapes
from fastdiff.export.parts import left_out
from fastdiff.families import family

# test_flux.py exports a transformer and test_onnx.py a U-Net
pytestmark = pytest.mark.product


@pytest.fixture(scope="module")
def pipe():
    scale = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    few = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1}
    vae = AutoencoderKLQwenImage(**few, **scale).eval()
    transformer = noisy(QwenImageTransformer2DModel(**QWEN | {"num_layers": 1}))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    made = QwenImagePipeline(scheduler, vae, None, None, transformer)
    made.default_sample_size = 12
    made.set_progress_bar_config(disable=True)
    return made


def test_the_file_computes_what_torch_does_and_draws_the_same(pipe, out):
    found = parity.verify(pipe, transformer(pipe), out, print)
    assert found.passed, parity.to_markdown(found)
    assert found.psnr_db > 90
    assert left_out(pipe) == ("vae",)


@pytest.mark.parametrize(("rows", "columns", "batch"), [(1, 1, 2), (3, 50, 1), (9, 2, 2)])
def test_rotary_embeddings_are_those_of_diffusers_at_any_size(pipe, out, rows, columns, batch):
    """With odd numbers of rows and columns, and with masked tokens of the text."""
    (part,) = transformer(pipe)
    run = Session(out / part.file, torch.device("cpu"))
    inputs = {
        "hidden_states": torch.randn(batch, rows * columns, QWEN["in_channels"]),
        "timestep": torch.tensor(0.7312).expand(batch),
        "encoder_hidden_states": torch.randn(batch, 7, QWEN["joint_attention_dim"]),
        "encoder_hidden_states_mask": torch.arange(7).expand(batch, 7) < 5,
        "img_shapes": [[(1, rows, columns)]] * batch,
    }
    double = copy.deepcopy(pipe.transformer).double()
    kept = {n: v.double() if v.is_floating_point() else v for n, v in list(inputs.items())[:4]}
    with torch.no_grad(), picture.inside(pipe, (part,), {part.folder: run}):
        got = pipe.transformer(**inputs).sample
    with torch.no_grad():
        eager = pipe.transformer(**inputs).sample
        exact = double(**inputs | kept).sample
    assert not torch.equal(got, eager)
    assert parity.judge("out_sample", got, eager, exact).passed


def test_the_error_says_why_a_network_is_not_exported(pipe):
    net = copy.copy(pipe.transformer)
    net.register_to_config(zero_cond_t=True)
    with pytest.raises(UserError, match="transformer has zero_cond_t, which cannot be exported"):
        family("qwen").denoised.part("transformer", net, torch.float32)
    with pytest.raises(UserError, match="cannot run on ort: its true guidance joins two predict"):
        fastdiff.compile(copy.deepcopy(pipe), backend="ort")
    with pytest.raises(UserError, match="transformer has no VAE beside it"):
        shapes.profiles(transformer(pipe), shapes.parse(None, "1x64x64"))
