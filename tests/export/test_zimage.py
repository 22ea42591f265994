"""Z-Image's network as an ONNX file of any size, whose captions have any lengths: ONNX Runtime runs
it and is compared with diffusers' own call, also in a pipeline."""

import copy

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from exports import transformer
from small import ZIMAGE, noisy

import fastdiff
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.engines.ort import Session
from fastdiff.errors import UserError
from fastdiff.export import onnx, parity, picture
from fastdiff.export.parts import left_out
from fastdiff.families.zimage import DENOISED
from fastdiff.models import Unsupported
from fastdiff.models.zimage import Conditions

# test_flux.py exports a transformer and test_onnx.py a U-Net
pytestmark = pytest.mark.product

VAE = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
WIDE = ZIMAGE["cap_feat_dim"]


def pipeline(dtype=torch.float32):
    transformer = noisy(ZImageTransformer2DModel(**ZIMAGE | {"n_layers": 1})).to(dtype)
    vae = noisy(AutoencoderKL(**VAE, shift_factor=0.1)).to(dtype)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    made = ZImagePipeline(scheduler, vae, None, None, transformer)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def test_the_file_computes_what_diffusers_does_and_draws_the_same(pipe, out):
    """The picture has a prompt of 60 tokens and a negative prompt of 20: padded, of 64 and 32."""
    found = parity.verify(pipe, transformer(pipe), out, print)
    assert found.passed, parity.to_markdown(found)
    assert found.psnr_db > 90
    assert left_out(pipe) == ()
    (part,) = transformer(pipe)
    assert [port.name for port in part.inputs] == [
        *("hidden_states", "timestep", "cap_feats", "cap_attention_mask"),
    ]


@pytest.mark.parametrize(
    ("sides", "lengths"), [((2, 6), (5,)), ((16, 16), (32, 32)), ((32, 10), (33, 7, 60))]
)
def test_lists_of_captions_are_those_of_diffusers(pipe, out, sides, lengths):
    """Pictures and captions that are padded or not, and captions that are padded to two lengths."""
    (part,) = transformer(pipe)
    run = Session(out / part.file, torch.device("cpu"))
    pictures = list(torch.randn(len(lengths), ZIMAGE["in_channels"], 1, *sides))
    captions = [torch.randn(length, WIDE) for length in lengths]
    times = torch.tensor(0.7312).expand(len(lengths))
    net, double = pipe.transformer, copy.deepcopy(pipe.transformer).double()

    def called(dtype=torch.float32):
        cast = [[one.to(dtype) for one in many] for many in (pictures, captions)]
        which = net if dtype == torch.float32 else double
        with torch.no_grad():
            return torch.stack(which(cast[0], times, cast[1], return_dict=False)[0])

    with picture.inside(pipe, (part,), {part.folder: run}):
        got = called()
    eager = called()
    assert not torch.equal(got, eager)
    assert parity.judge("out_sample", got, eager, called(torch.float64)).passed


def drawn(pipe, lengths=(40, 5), **options):
    """Two pictures of 12×20 latents."""
    generator, dtype = torch.Generator().manual_seed(3), pipe.transformer.dtype
    own, other = (
        [torch.randn(n, WIDE, generator=generator).to(dtype) for n in pair]
        for pair in (lengths, (9, 33))
    )
    given = {"prompt_embeds": own, "negative_prompt_embeds": other, "num_inference_steps": 3}
    given |= {"height": 12, "width": 20, "generator": generator, "output_type": "latent"}
    return pipe(**given | options).images


@pytest.mark.parametrize(
    ("backend", "planned", "options"),
    [
        ("ort", 1, {}),
        ("ort", 1, {"guidance_scale": 0.0}),
        ("ort", 0, {"callback_on_step_end": lambda *_: {}}),
        ("openvino", 1, {}),
    ],
    ids=["guided", "unguided", "in diffusers' loop", "openvino"],
)
def test_the_plan_draws_the_same_pictures_with_the_file(pipe, out, backend, planned, options):
    eager, other = drawn(pipe, **options), copy.deepcopy(pipe)
    fastdiff.compile(other, backend=backend, engines=out)
    got = drawn(other, **options)
    assert not torch.equal(got, eager)
    torch.testing.assert_close(got, eager, atol=2e-5, rtol=1e-5)
    loop, slot = loop_of(other), slot_of(other.transformer)
    assert (slot.fast, dict(slot.eager), loop.planned) == (3, {}, planned), loop.own
    assert fastdiff.report(other).parts[0].runs == backend


@pytest.mark.slow  # traces a network of its own
def test_latents_stay_float32_beside_a_file_in_float16(tmp_path):
    pipe = pipeline(torch.float16)
    onnx.export(pipe, transformer(pipe), tmp_path / "files", onnx.ORT_OPSET, print)
    eager, truth = drawn(pipe), drawn(copy.deepcopy(pipe).to(torch.float32))
    fastdiff.compile(pipe, backend="ort", engines=tmp_path / "files")
    got = drawn(pipe)
    assert (slot_of(pipe.transformer).fast, loop_of(pipe).planned) == (3, 1), loop_of(pipe).own
    assert got.dtype == torch.float32
    assert (got - truth).abs().max() <= 2 * (eager - truth).abs().max()


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"siglip_feat_dim": 8}, "has siglip_feat_dim, which cannot be exported"),
        ({"qk_norm": False}, "has no qk_norm, without which it cannot be exported"),
        (
            {"all_patch_size": (2, 4), "all_f_patch_size": (1, 1)},
            "has patches of several sizes or frames; supported is one size",
        ),
    ],
)
def test_the_error_says_why_a_network_is_not_exported(config, why):
    net = ZImageTransformer2DModel(**ZIMAGE | config)
    with pytest.raises(UserError, match=f"transformer {why}"):
        DENOISED.part("transformer", net, torch.float32)


@pytest.mark.parametrize(
    ("captions", "why"),
    [
        ([], "cap_feats is missing"),
        ([(5, WIDE), (5, 8)], "captions that are no"),
        ([(5, WIDE), (0, WIDE)], "a caption without tokens"),
        ([(70, WIDE)], "a caption of 96 tokens; there are positions for 94"),
    ],
)
def test_captions_that_no_file_takes(pipe, captions, why):
    given = Conditions([torch.zeros(shape) for shape in captions])
    with pytest.raises(Unsupported, match=why):
        DENOISED.for_file(pipe.transformer, given)
