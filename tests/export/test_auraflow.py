"""AuraFlow as an ONNX file: ONNX Runtime runs it and is compared with torch, also in a pipeline."""

import copy

import onnxruntime
import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
)
from exports import written
from small import AURAFLOW, SMALL_VAE, noisy
from transformers import UMT5Config, UMT5EncoderModel

import fastdiff
from fastdiff.bench.preset_parts import clip_tokenizer
from fastdiff.bench.preset_sd3 import t5_tokenizer
from fastdiff.compiler.pipelines import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.export import parity

# test_flux.py exports a transformer and test_onnx.py a U-Net
pytestmark = pytest.mark.product


@pytest.fixture(scope="module")
def pipe():
    tokenizer = t5_tokenizer(clip_tokenizer())
    text = {"d_model": AURAFLOW["joint_attention_dim"], "d_kv": 8, "d_ff": 16, "num_heads": 2}
    text |= {"vocab_size": len(tokenizer), "num_layers": 1}
    few = {"num_mmdit_layers": 1, "num_single_dit_layers": 1}
    made = AuraFlowPipeline(
        tokenizer,
        noisy(UMT5EncoderModel(UMT5Config(**text))),
        noisy(AutoencoderKL(**SMALL_VAE)),
        noisy(AuraFlowTransformer2DModel(**AURAFLOW | few)),
        FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    made.set_progress_bar_config(disable=True)
    return made


def test_the_files_compute_what_torch_does_and_draw_the_same(pipe, out):
    found = parity.verify(pipe, written(pipe), out, print)
    assert found.passed, parity.to_markdown(found)
    assert found.psnr_db > 90
    text, _ = written(pipe)
    assert [port.name for port in text.inputs] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("sides", [(2, 18), (6, 10), (18, 16)])
def test_positions_are_those_of_diffusers_at_any_size(pipe, out, sides):
    inputs = {
        "hidden_states": torch.randn(2, 4, *sides),
        "timestep": torch.tensor(0.7312),
        "encoder_hidden_states": torch.randn(2, 5, AURAFLOW["joint_attention_dim"]),
    }
    session = onnxruntime.InferenceSession(
        out / "transformer" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (got,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    inputs["timestep"] = inputs["timestep"].expand(2)
    double = copy.deepcopy(pipe.transformer).double()
    with torch.no_grad():
        eager = pipe.transformer(**inputs).sample
        exact = double(**{name: value.double() for name, value in inputs.items()}).sample
    assert parity.judge("out_sample", torch.from_numpy(got), eager, exact).passed


def test_the_plan_draws_the_same_picture_with_the_file(pipe, out):
    def drawn(one):
        noise = torch.Generator().manual_seed(3)
        size = {"height": 20, "width": 12, "output_type": "pt", "generator": noise}
        return one("red heart", num_inference_steps=3, **size).images

    eager, other = drawn(pipe), copy.deepcopy(pipe)
    fastdiff.compile(other, backend="ort", engines=out)
    got = drawn(other)
    assert not torch.equal(got, eager)
    assert float((got - eager).abs().max()) < 2e-5
    loop = loop_of(other)
    assert (slot_of(other.transformer).fast, loop.planned) == (3, 1), loop.own
    assert fastdiff.report(other).parts[0].runs == "ort"
