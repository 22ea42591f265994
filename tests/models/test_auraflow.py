"""AuraFlow against diffusers in float64, at reduced widths."""

import copy

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel
from small import AURAFLOW, noisy

from fastdiff.models import Loan, Unsupported, auraflow
from fastdiff.models.auraflow import KEPT, Conditions, borrow_auraflow
from fastdiff.runtime.denoiser import denoiser


class Flat(torch.nn.Module):
    """Called by position."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, told, times):
        return self.net(x, told, times, return_dict=False)


def pair(dtype=torch.float32, **config):
    """diffusers' own network, and ours on the weights of a copy."""
    eager = noisy(AuraFlowTransformer2DModel(**AURAFLOW | config)).to(dtype)
    lent = copy.deepcopy(eager)
    network = denoiser(borrow_auraflow(lent, Loan(lent)))

    def run(x, told, times):
        return network(x, times, Conditions(told))

    return Flat(eager), network.network, run


def text(batch, tokens=40, used=40):
    """As its pipeline pads it: zeros behind the tokens that are used."""
    states = torch.randn(batch, tokens, 20)
    states[:, used:] = 0
    return states


@pytest.mark.parametrize(("sides", "used"), [((8, 8), 40), ((6, 18), 5)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_predictions(batch, sides, used, budget):
    """At odd sizes, with different timesteps, with and without equal tokens behind the text."""
    eager, _, run = pair()
    times = torch.tensor([1.0, 0.301, 0.0])[:batch]
    budget(run, eager, torch.randn(batch, 4, *sides), text(batch, used=used), times)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, budget):
    eager, _, run = pair(dtype)
    x, told = torch.randn(2, 4, 8, 8, dtype=dtype), text(2, used=9).to(dtype)
    budget(run, eager, x, told, torch.tensor([0.5, 0.5], dtype=dtype))


@pytest.mark.parametrize(("used", "kept"), [(5, KEPT), (17, 2 * KEPT), (39, 40)])
def test_equal_tokens_behind_a_text_are_one(used, kept):
    """Few lengths remain, so that few need a recording."""
    _, network, _ = pair()
    told = Conditions(text(2, used=used))
    constants = network.hoist(told, torch.tensor([[0.5]]), (8, 8)).constants
    assert constants.text.shape[1] == 8 + kept
    assert (constants.text_bias is None) == (kept == 40)


@pytest.mark.parametrize(
    ("shape", "tokens", "what"),
    [
        ((1, 4, 8, 7), 7, "do not divide into patches of 2"),
        ((1, 4, 8, 20), 7, "are larger than 9 by 9 patches"),
        ((2, 4, 8, 8), 7, "is for 1 pictures"),
        ((1, 4, 8, 8), None, "encoder_hidden_states is missing"),
    ],
)
def test_what_it_is_not_given(shape, tokens, what):
    _, network, _ = pair()
    told = None if tokens is None else text(1, tokens)
    with pytest.raises(Unsupported, match=what):
        network.check(torch.zeros(shape), Conditions(told))


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"num_single_dit_layers": 0}, "whose text and picture stay apart"),
        ({"out_channels": 8}, "a last layer of 32 columns for 8 channels"),
    ],
)
def test_what_it_is_not(config, what):
    with pytest.raises(Unsupported, match=what):
        pair(**config)


def test_wide_heads_on_a_gpu_attend_as_one_sequence(monkeypatch, budget):
    """Our kernel for both would spill; equal tokens stay, as the library takes no bias for them."""
    monkeypatch.setattr(auraflow, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(auraflow, "WIDEST", 4)
    eager, _, run = pair()
    budget(run, eager, torch.randn(2, 4, 6, 10), text(2, used=5), torch.tensor([0.5, 0.2]))
