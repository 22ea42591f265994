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
    """The network, called with positional arguments."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, encoded, times):
        return self.net(x, encoded, times, return_dict=False)


def pair(dtype=torch.float32, **config):
    """diffusers' own network, and ours on the weights of a copy."""
    eager = noisy(AuraFlowTransformer2DModel(**AURAFLOW | config)).to(dtype)
    lent = copy.deepcopy(eager)
    network = denoiser(borrow_auraflow(lent, Loan(lent)))

    def run(x, encoded, times):
        return network(x, times, Conditions(encoded))

    return Flat(eager), network.network, run


def text(batch, tokens=40, used=40):
    """A text as the pipeline pads it: zeros after the `used` tokens."""
    states = torch.randn(batch, tokens, 20)
    states[:, used:] = 0
    return states


@pytest.mark.parametrize(("sides", "used"), [((8, 8), 40), ((6, 18), 5)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_predictions(batch, sides, used, budget):
    """At odd sizes, with different timesteps, with and without equal tokens after the text."""
    eager, _, run = pair()
    times = torch.tensor([1.0, 0.301, 0.0])[:batch]
    budget(run, eager, torch.randn(batch, 4, *sides), text(batch, used=used), times)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, budget):
    eager, _, run = pair(dtype)
    x, encoded = torch.randn(2, 4, 8, 8, dtype=dtype), text(2, used=9).to(dtype)
    budget(run, eager, x, encoded, torch.tensor([0.5, 0.5], dtype=dtype))


@pytest.mark.parametrize(("used", "kept"), [(5, KEPT), (17, 2 * KEPT), (39, 40)])
def test_equal_tokens_after_a_text_are_merged(used, kept):
    """Texts then have few different lengths, so few recordings are needed."""
    _, network, _ = pair()
    encoded = Conditions(text(2, used=used))
    constants = network.hoist(encoded, torch.tensor([[0.5]]), (8, 8)).constants
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
def test_wrong_inputs_are_refused(shape, tokens, what):
    _, network, _ = pair()
    encoded = None if tokens is None else text(1, tokens)
    with pytest.raises(Unsupported, match=what):
        network.check(torch.zeros(shape), Conditions(encoded))


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"num_single_dit_layers": 0}, "whose text and picture stay apart"),
        ({"out_channels": 8}, "a last layer of 32 columns for 8 channels"),
    ],
)
def test_other_architectures_are_refused(config, what):
    with pytest.raises(Unsupported, match=what):
        pair(**config)


def test_wide_heads_on_a_gpu_attend_as_one_sequence(monkeypatch, budget):
    """Our joint attention would spill registers. Equal tokens are not merged, because the library's
    attention takes no bias for them."""
    monkeypatch.setattr(auraflow, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(auraflow, "WIDEST", 4)
    eager, _, run = pair()
    budget(run, eager, torch.randn(2, 4, 6, 10), text(2, used=5), torch.tensor([0.5, 0.2]))
