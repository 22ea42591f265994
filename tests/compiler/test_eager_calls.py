"""Calls that only diffusers supports run eagerly, and a warning names the reason."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from small import ONE_LEVEL

import fastdiff


@pytest.fixture
def net():
    """A U-Net of one level, so that one mask has the right size for every self-attention."""
    torch.manual_seed(0)
    return UNet2DConditionModel(**ONE_LEVEL).eval()


def call(net, **options):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 7, 24, generator=generator)
    with torch.no_grad():
        return net(sample, 7, text, **options)[0]


def test_a_mask_of_pixels(net):
    mask = torch.ones(2, 64)
    mask[:, 40:] = 0
    want = call(net, attention_mask=mask)
    assert not torch.allclose(want, call(net), atol=1e-3)
    fastdiff.compile(net)
    with pytest.warns(RuntimeWarning, match="attention_mask"):
        got = call(net, attention_mask=mask)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_hook_before_a_module(net):
    before = call(net)
    fastdiff.compile(net)
    call(net)
    net.mid_block.register_forward_pre_hook(lambda module, given: (given[0] * 2, *given[1:]))
    with pytest.warns(RuntimeWarning, match="hook"):
        got = call(net)
    torch.testing.assert_close(got, call(net._call_impl), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, before, atol=1e-3)
