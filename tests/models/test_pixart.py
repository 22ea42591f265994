"""PixArt against diffusers in float64, at reduced widths."""

import copy

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from small import PIXART, noisy

from fastdiff.models import Loan, Unsupported, borrow, pixart_block, stream
from fastdiff.models.pixart import Conditions, borrow_pixart
from fastdiff.runtime.denoiser import denoiser

KINDS = {
    "sigma": {},
    "alpha, with sizes": {"use_additional_conditions": True, "interpolation_scale": 2},
    "without a variance or a projection": {"out_channels": 4, "caption_channels": None},
}


def network_of(module):
    return denoiser(borrow_pixart(module, Loan(module)))


def given(net, batch, tokens=21, dtype=torch.float32):
    wide = net.config.caption_channels or net.config.cross_attention_dim
    sizes = {"resolution": None, "aspect_ratio": None}
    if net.config.use_additional_conditions:
        sizes["resolution"] = torch.tensor([[64.0, 96.0]] * batch).to(dtype)
        sizes["aspect_ratio"] = torch.full((batch, 1), 0.7, dtype=dtype)
    text = torch.randn(batch, tokens, wide, dtype=dtype)
    return {"encoder_hidden_states": text, "timestep": torch.tensor([999, 301, 0])[:batch]} | sizes


class Flat(torch.nn.Module):
    """The network, called with tensors only, because `budget` casts no others."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, mask, timestep, encoder_hidden_states, resolution, aspect_ratio):
        sizes = {"resolution": resolution, "aspect_ratio": aspect_ratio}
        return self.net(
            x,
            encoder_hidden_states,
            timestep,
            sizes,
            encoder_attention_mask=mask,
            return_dict=False,
        )


def run_of(network):
    def run(x, mask, timestep, encoder_hidden_states, resolution, aspect_ratio):
        sizes = {"resolution": resolution, "aspect_ratio": aspect_ratio}
        return network(x, timestep, Conditions(encoder_hidden_states, mask, sizes))

    return run


@pytest.mark.parametrize("sides", [(8, 8), (6, 14)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_predictions(kind, batch, sides, budget):
    """At the network's own size and at another, whose positions diffusers computes in the call."""
    eager = noisy(PixArtTransformer2DModel(**PIXART | KINDS[kind]))
    network = network_of(copy.deepcopy(eager))
    mask = (torch.arange(21)[None] < torch.tensor([[3], [17], [1]])[:batch]).float()
    budget(run_of(network), Flat(eager), torch.randn(batch, 4, *sides), mask, **given(eager, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, budget):
    eager = noisy(PixArtTransformer2DModel(**PIXART | KINDS["alpha, with sizes"])).to(dtype)
    network = network_of(copy.deepcopy(eager))
    x, mask = torch.randn(2, 4, 8, 8, dtype=dtype), torch.ones(2, 21, dtype=dtype)
    budget(run_of(network), Flat(eager), x, mask, **given(eager, 2, dtype=dtype))


@pytest.mark.parametrize(
    ("kind", "dtype", "bias"),
    [
        ("sigma", torch.float32, False),
        ("alpha, with sizes", torch.float32, True),
        ("sigma", torch.bfloat16, True),
        ("sigma", torch.float16, True),
    ],
    ids=str,
)
def test_on_a_gpu_the_gate_is_folded_into_weights(kind, dtype, bias, budget, monkeypatch):
    """Two pictures at one timestep have one gate, which is folded; gates of different timesteps are
    not folded."""
    for module in (pixart_block, stream):
        monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(borrow, "NATIVE", None)  # weights are stored as GPU libraries want them
    config = PIXART | KINDS[kind] | {"attention_bias": bias}
    eager = noisy(PixArtTransformer2DModel(**config)).to(dtype)
    network = network_of(copy.deepcopy(eager))
    products, add = [], torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *a: products.append(1) or add(*a))
    x, options = torch.randn(2, 4, 6, 10, dtype=dtype), given(eager, 2, dtype=dtype)
    mask = (torch.arange(21)[None] < torch.tensor([[3], [17]])).to(dtype)
    run = run_of(network)

    def at_one_timestep(x, mask, timestep, **options):
        return run(x, mask, timestep[:1], **options)

    same = {"timestep": torch.tensor([301, 301])}
    budget(at_one_timestep, Flat(eager), x, mask, **options | same)
    assert len(products) == 3
    budget(run, Flat(eager), x, mask, **options)
    assert len(products) == 3


@pytest.mark.parametrize(
    ("lengths", "kept"), [((3, 5), 16), ((3, 17), 32), ((40, 1), 40), ((0, 5), 40)]
)
def test_text_tokens_that_every_mask_hides_are_cut(lengths, kept, budget):
    """If a picture's mask hides all tokens, it attends to all of them alike, so all are kept."""
    eager = noisy(PixArtTransformer2DModel(**PIXART))
    network = network_of(copy.deepcopy(eager))
    mask = (torch.arange(40)[None] < torch.tensor(lengths)[:, None]).float()
    options = given(eager, 2, tokens=40)
    x = torch.randn(2, 4, 8, 8)
    conditions = Conditions(options["encoder_hidden_states"], mask)
    hoisted = network.network.hoist(conditions, options["timestep"][None], (8, 8))
    assert hoisted.constants.text.shape[1] == kept
    budget(run_of(network), Flat(eager), x, mask, **options)


def test_a_mask_of_small_weights_cuts_nothing(budget):
    eager = noisy(PixArtTransformer2DModel(**PIXART))
    network = network_of(copy.deepcopy(eager))
    mask = 1e-4 * (torch.arange(40)[None] < torch.tensor([[3], [5]])).float()
    budget(run_of(network), Flat(eager), torch.randn(2, 4, 8, 8), mask, **given(eager, 2, 40))


def test_without_a_mask(budget):
    eager = noisy(PixArtTransformer2DModel(**PIXART))
    network = network_of(copy.deepcopy(eager))
    budget(run_of(network), Flat(eager), torch.randn(2, 4, 8, 8), None, **given(eager, 2))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"latents": torch.zeros(1, 4, 8, 1)}, "have no patch"),
        ({"text": None}, "encoder_hidden_states is missing"),
        ({"mask": torch.ones(1, 1, 7)}, "encoder_attention_mask of the shape"),
        ({"sizes": {"resolution": torch.ones(1, 2)}}, "it was given resolution"),
        ({"sizes": {"angle": None}}, "added_cond_kwargs of angle"),
    ],
)
def test_wrong_inputs_are_refused(change, what):
    network = borrow_pixart(net := noisy(PixArtTransformer2DModel(**PIXART)), Loan(net))
    known = {"latents": torch.zeros(1, 4, 8, 8), "text": torch.zeros(1, 7, 20), "mask": None}
    known |= {"sizes": None} | change
    conditions = Conditions(known["text"], known["mask"], known["sizes"])
    with pytest.raises(Unsupported, match=what):
        network.check(known["latents"], conditions)


def test_missing_sizes_are_refused():
    config = PIXART | {"use_additional_conditions": True}
    network = borrow_pixart(net := noisy(PixArtTransformer2DModel(**config)), Loan(net))
    with pytest.raises(Unsupported, match="resolution is missing"):
        network.check(torch.zeros(1, 4, 8, 8), Conditions(torch.zeros(1, 7, 20)))
