"""U-Nets without a text as ONNX files: ONNX Runtime runs them and is compared with torch."""

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from small import noisy

import fastdiff
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError
from fastdiff.export import onnx, parity
from fastdiff.export.parts import parts
from fastdiff.families import family

# test_flux.py exports a transformer and test_onnx.py a U-Net
pytestmark = pytest.mark.product

NET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A pipeline, and the folder that it is exported to."""
    pipe = DDIMPipeline(noisy(UNet2DModel(**NET)), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    out = tmp_path_factory.mktemp("unet2d") / "files"
    onnx.export(pipe, parts(pipe, torch.float32), out, onnx.ORT_OPSET, print)
    return pipe, out


def test_the_file_computes_what_torch_does_and_draws_the_same(files):
    pipe, out = files
    found = parity.verify(pipe, parts(pipe, torch.float32), out, print)
    assert found.passed, parity.to_markdown(found)
    assert {row.part for row in found.rows} == {"unet"}
    assert {row.case.split(",")[0] for row in found.rows} == {"1×8×8", "3×6×4"}


def test_ort_draws_the_same_picture_on_the_plan(files):
    pipe, out = files

    def drawn():
        generator = torch.Generator().manual_seed(3)
        call = {"batch_size": 2, "num_inference_steps": 3, "output_type": "np"}
        return pipe(generator=generator, **call).images

    eager = drawn()
    fastdiff.compile(pipe, backend="ort", engines=out)
    assert abs(drawn() - eager).max() < 1e-4
    assert (slot_of(pipe.unet).fast, loop_of(pipe).planned) == (3, 1)
    assert "ort" in str(fastdiff.report(pipe))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type 'fourier'"),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        ({"sample_size": (8, 16)}, r"sample_size \(8, 16\)"),
    ],
    ids=str,
)
def test_the_error_says_why_a_network_is_not_exported(more, why):
    with pytest.raises(UserError, match=f"unet has .*{why}"):
        family("unet2d").denoised.part("unet", UNet2DModel(**NET | more), torch.float32)
