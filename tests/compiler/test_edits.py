"""After any edit of a compiled U-Net, its calls return what diffusers would return."""

import copy
import warnings
from contextlib import nullcontext, suppress

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0 as Plain
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastdiff


class AttnProcessor2_0(Plain):
    """A user's own processor with the name of diffusers' class."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * 0.5


def block_of(unet):
    return unet.down_blocks[0].attentions[0].transformer_blocks[0]


def circular(unet):
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


def asymmetric(unet):
    conv = unet.conv_in
    conv._conv_forward = lambda x, w, b: nn.functional.conv2d(x.roll(1, -1), w, b, 1, 1)


def another_mid_block(unet):
    torch.manual_seed(9)
    unet.mid_block = copy.deepcopy(unet.mid_block)
    nn.init.normal_(unet.mid_block.resnets[0].conv1.weight, std=0.1)


def no_blocks(unet):
    attention = unet.down_blocks[0].attentions[0]
    attention.transformer_blocks = attention.transformer_blocks[:0]


def another_class(unet):
    block = block_of(unet)
    own = type(block)
    block.__class__ = type(
        "Merging", (own,), {"forward": lambda s, x, **k: own.forward(s, x, **k) * 2}
    )


EDITS = {
    "circular padding": circular,
    "asymmetric padding": asymmetric,
    "another middle block": another_mid_block,
    "no middle block": lambda unet: setattr(unet, "mid_block", None),
    "another activation": lambda unet: setattr(unet, "conv_act", nn.Tanh()),
    "a block fewer": no_blocks,
    "another class": another_class,
    "eps": lambda unet: setattr(unet.conv_norm_out, "eps", 0.5),
    "scale": lambda unet: setattr(unet.down_blocks[0].resnets[0], "output_scale_factor", 2.0),
    "processor": lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
    "weight": lambda unet: block_of(unet).ff.net[2].weight.mul_(-3.0),
    "bias by .data": lambda unet: setattr(unet.conv_out.bias, "data", torch.randn(4)),
    "strided norm": lambda unet: setattr(
        unet.conv_norm_out.weight, "data", torch.randn(32, 2)[:, 0]
    ),
}


def call(unet, sample=None, text=None, **options):
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 24, generator=generator)
    sample, text = (g if own is None else own for g, own in zip(given, (sample, text), strict=True))
    return unet(sample, torch.tensor(7), text, **options)[0]


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits(unet, edit, when):
    if when == "after":
        fastdiff.compile(unet)
        call(unet)
        call(unet)
    before = call(unet)
    edit(unet)
    expected = call(copy.deepcopy(unet)) if when == "before" else call(unet._call_impl)
    assert not torch.allclose(before, expected, atol=1e-3), "the edit changes the result"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with suppress(ValueError) if when == "before" else nullcontext():
            fastdiff.compile(unet)
        torch.testing.assert_close(call(unet), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kernel", [1, 5])
def test_other_kernel_sizes_are_refused(kernel, small):
    unet = UNet2DConditionModel(**small, conv_in_kernel=kernel, conv_out_kernel=kernel).eval()
    with pytest.raises(ValueError, match="a plain 3×3 convolution"):
        fastdiff.compile(unet)
    assert call(unet).shape == (2, 4, 8, 8)


@torch.no_grad()
@pytest.mark.parametrize(
    "wrong",
    [
        {"text": torch.randn(2, 7, 40)},
        {"text": torch.randn(2, 7, 8)},
        {"sample": torch.randn(2, 9, 8, 8)},
        {"sample": torch.randn(2, 3, 8, 8)},
        {"text": torch.randn(2, 7, 24).bfloat16()},
        {"sample": torch.randn(0, 4, 8, 8), "text": torch.randn(0, 7, 24)},
        {"timestep_cond": torch.randn(2, 16)},
    ],
    ids=["wide", "narrow", "nine", "three", "bf16", "empty", "condition"],
)
def test_what_diffusers_refuses_is_refused_with_its_message(unet, wrong):
    with pytest.raises((RuntimeError, TypeError, ValueError)) as own:
        call(unet, **wrong)
    fastdiff.compile(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(own.type) as ours:
            call(unet, **wrong)
    assert str(ours.value) == str(own.value)


def test_inference_mode_and_no_grad_in_turn(unet):
    expected = call(unet)
    with torch.inference_mode():
        fastdiff.compile(unet)
        first = call(unet)
    with torch.no_grad():
        second = call(unet)
    with torch.inference_mode():
        third = call(unet)
        fastdiff.restore(unet)
    assert not any(parameter.is_inference() for parameter in unet.parameters())
    for got in (first, second, third):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_gradients_reach_the_text_and_single_layers(unet):
    fastdiff.compile(unet)
    unet.requires_grad_(False)
    text = torch.randn(2, 7, 24, requires_grad=True)
    sample = torch.randn(2, 4, 8, 8)
    for _ in range(2):
        unet(sample, 7, encoder_hidden_states=text)[0].sum().backward()
        assert float(text.grad.abs().max()) > 0
        text.grad = None
    block_of(unet).attn2.to_v.weight.requires_grad_(True)
    assert unet(sample, 7, text.detach())[0].requires_grad


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_torchs_flop_counter_counts_diffusers_ops(unet):
    with FlopCounterMode(display=False) as eager:
        call(unet)
    fastdiff.compile(unet)
    with FlopCounterMode(display=False) as compiled:
        call(unet)
    assert compiled.get_total_flops() == eager.get_total_flops() > 1e6


@torch.no_grad()
def test_restore_returns_to_channels_last(unet):
    unet.to(memory_format=torch.channels_last)
    strides = [parameter.stride() for parameter in unet.parameters()]
    before = call(unet)
    fastdiff.compile(unet)
    call(unet)
    fastdiff.restore(unet)
    assert [parameter.stride() for parameter in unet.parameters()] == strides
    assert torch.equal(call(unet), before)


@torch.no_grad()
def test_shared_parameters_are_refused_and_no_weight_moves(unet):
    block_of(unet).attn1.to_k.weight = block_of(unet).attn1.to_q.weight
    addresses = [parameter.data_ptr() for parameter in unet.parameters()]
    with pytest.raises(ValueError, match="share"):
        fastdiff.compile(unet)
    assert [parameter.data_ptr() for parameter in unet.parameters()] == addresses


@torch.no_grad()
def test_a_compile_that_runs_out_of_memory_restores_the_weights(unet, monkeypatch):
    from fastdiff.models.borrow import Loan

    before = call(unet)
    place, calls = Loan._place, []

    def no_memory(self, sources, *shape, **options):
        calls.append(shape)
        if not self._rehearsal and len(calls) > 60:
            raise MemoryError
        return place(self, sources, *shape, **options)

    monkeypatch.setattr(Loan, "_place", no_memory)
    with pytest.raises(MemoryError):
        fastdiff.compile(unet)
    assert len(calls) > 60
    assert all(parameter.is_contiguous() for parameter in unet.parameters())
    assert torch.equal(call(unet), before)
