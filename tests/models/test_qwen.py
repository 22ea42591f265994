"""Qwen-Image against diffusers in float64, at reduced widths."""

import copy

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from small import QWEN, noisy

from fastdiff.models import Loan, Unsupported
from fastdiff.models.qwen import Conditions, borrow_qwen
from fastdiff.runtime.denoiser import denoiser


def pair(dtype=torch.float32, **config):
    """diffusers' own network, and ours on the weights of a copy."""
    eager = noisy(QwenImageTransformer2DModel(**QWEN | config)).to(dtype)
    lent = copy.deepcopy(eager)
    return eager, denoiser(borrow_qwen(lent, Loan(lent)))


class Flat(torch.nn.Module):
    """The network, called with tensors only, because `budget` casts no others."""

    def __init__(self, net, shapes):
        super().__init__()
        self.net, self.shapes = net, shapes

    def forward(self, x, states, mask, times):
        return self.net(x, states, mask, times, self.shapes, return_dict=False)


@pytest.mark.parametrize("lengths", [None, (5, 9, 1)])
@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 3, 7)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_predictions(batch, shape, lengths, budget):
    """At odd sizes, with different timesteps and texts of different lengths."""
    eager, network = pair()
    shapes, tokens = [[shape]] * batch, shape[1] * shape[2]
    mask = None
    if lengths is not None:
        mask = torch.arange(11)[None] < torch.tensor(lengths[:batch])[:, None]
    times = torch.tensor([1.0, 0.301, 0.0])[:batch]

    def run(x, states, mask, times):
        return network(x, times, Conditions(states, mask, shapes))

    x, states = torch.randn(batch, tokens, 16), torch.randn(batch, 11, 20)
    budget(run, Flat(eager, shapes), x, states, mask, times)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, budget):
    eager, network = pair(dtype)
    shapes = [[(1, 4, 4)]] * 2

    def run(x, states, mask, times):
        return network(x, times, Conditions(states, mask, shapes))

    x, states = torch.randn(2, 16, 16, dtype=dtype), torch.randn(2, 11, 20, dtype=dtype)
    mask = torch.arange(11)[None] < torch.tensor([[11], [4]])
    times = torch.full((2,), 0.5, dtype=dtype)
    budget(run, Flat(eager, shapes), x, states, mask, times)


def test_text_tokens_that_every_mask_hides_are_cut():
    _, network = pair()
    mask = torch.arange(11)[None] < torch.tensor([[5], [3]])
    given = Conditions(torch.randn(2, 11, 20), mask, [[(1, 2, 2)]] * 2)
    constants = network.network.hoist(given, torch.tensor([[0.5]]), (4,)).constants
    assert constants.text.shape == (2, 5, 24)
    assert constants.text_bias.tolist() == [[0.0] * 5, [0.0] * 3 + [-10000.0] * 2]


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        (None, "img_shapes is missing"),
        ([[(1, 2, 3)]], "img_shapes of 6 tokens for 4"),
        ([[(1, 2, 2)], [(1, 1, 4)]], "pictures of several sizes"),
    ],
)
def test_wrong_inputs_are_refused(shapes, what):
    _, network = pair()
    given = Conditions(torch.zeros(1, 7, 20), None, shapes)
    with pytest.raises(Unsupported, match=what):
        network.network.check(torch.zeros(1, 4, 16), given)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"zero_cond_t": True}, "with another timestep"),
        ({"use_additional_t_cond": True}, "an embedding beside the timestep's"),
        ({"use_layer3d_rope": True}, "a QwenEmbedLayer3DRope where"),
    ],
)
def test_other_architectures_are_refused(config, what):
    with pytest.raises(Unsupported, match=what):
        pair(**config)
