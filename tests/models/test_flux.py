"""FLUX's transformer against diffusers in float64, at reduced widths."""

import copy

import pytest
import torch
from covered import covered
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from diffusers.models.transformers import transformer_flux
from small import FLUX, noisy
from torch import Tensor
from torch.utils._pytree import tree_map
from turning import turned_in_float64

from fastdiff.bench.graph import launched
from fastdiff.kernels.contract import judge
from fastdiff.models import Loan, Unsupported
from fastdiff.models.flux import Conditions, borrow_flux
from fastdiff.models.flux_control import ControlConditions, borrow_flux_control
from fastdiff.runtime.denoiser import denoiser
from fastdiff.runtime.planned import step
from fastdiff.runtime.tape import record

KINDS = {"dev": {"guidance_embeds": True}, "schnell": {}}
COUNTS = ((1, 15, 7), (2, 6, 1), (3, 1, 5))
"""The number of pictures, of tokens of a picture, and of tokens of a text."""


def transformer(kind="dev", dtype=torch.float32, **more):
    return noisy(FluxTransformer2DModel(**FLUX | KINDS[kind] | more)).to(dtype)


def positions(tokens, columns=3):
    return torch.tensor([[0, i // columns, i % columns] for i in range(tokens)])


def conditions(kind="dev", count=1, picture=15, text=7, dtype=torch.float32, **more):
    """Guidance and positions are exact in every dtype."""
    return Conditions(
        torch.randn(count, text, 20).to(dtype),
        torch.randn(count, 32).to(dtype),
        positions(picture).to(dtype),
        torch.zeros(text, 3, dtype=dtype),
        torch.tensor([2.0, 1.0, 4.0])[:count] if kind == "dev" else None,
        **more,
    )


def doubled(tree):
    return tree_map(lambda leaf: leaf.double() if isinstance(leaf, Tensor) else leaf, tree)


def by_diffusers(module, latents, times, given):
    names = given._asdict()
    channels, tokens = names.pop("constant_channels"), names.pop("constant_tokens")
    # None here; tests of the pipelines give them
    del names["ip_adapter_image_embeds"], names["controls"]
    if channels is not None:
        latents = torch.cat([latents, channels], -1)
    whole = latents if tokens is None else torch.cat([latents, tokens], 1)
    made = module(whole, timestep=times, **names, return_dict=False)[0]
    return made[:, : latents.shape[1]]


def hold(module, latents, given, times=None):
    """Check that our prediction is within the error budget of diffusers' own, and return it."""
    times = torch.tensor([0.5, 0.125, 1.0])[: len(latents)] if times is None else times
    with torch.no_grad():
        eager = by_diffusers(copy.deepcopy(module), latents, times.to(latents.dtype), given)
        with turned_in_float64(transformer_flux):
            exact = copy.deepcopy(module).double()
            truth = by_diffusers(exact, latents.double(), times.double(), doubled(given))
        network = denoiser(borrow_flux(module, Loan(module)))
        made = network(latents, times.to(latents.dtype), given)
    verdict = judge("prediction", made, eager, truth)
    assert verdict.passed, verdict
    return made


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("kind", "counts", "dtype"), covered([*KINDS], COUNTS, DTYPES))
def test_predictions(kind, counts, dtype):
    count, picture, text = counts
    latents = torch.randn(count, picture, 16).to(dtype)
    hold(transformer(kind, dtype), latents, conditions(kind, *counts, dtype))


@pytest.mark.parametrize("repeat", [False, True])
def test_a_controlnets_residuals(repeat):
    """Three blocks of each kind share two residuals, in groups or in turn."""
    net, given = transformer(num_layers=3), conditions(count=2)
    for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
        given = given._replace(**{name: [torch.randn(2, 15, 24) for _ in range(2)]})
    hold(net, torch.randn(2, 15, 16), given._replace(controlnet_blocks_repeat=repeat))


@pytest.mark.parametrize("modes", [None, 4], ids=["one kind", "union"])
def test_a_controlnet(modes):
    """What it adds to each block is within the budget."""
    config = FLUX | {"num_single_layers": 1, "guidance_embeds": True, "num_mode": modes}
    net = noisy(FluxControlNetModel(**config))
    latents, shared, times = torch.randn(2, 15, 16), conditions(count=2), torch.tensor([0.5, 0.125])
    mode = None if modes is None else torch.tensor([[3], [1]])
    given = ControlConditions(*shared[:5], torch.randn(2, 15, 16), mode)

    def by_diffusers(net, latents, times, given):
        return sum(net(latents, timestep=times, **given._asdict(), return_dict=False), [])

    with torch.no_grad():
        eager = by_diffusers(copy.deepcopy(net), latents, times, given)
        exact, whole = copy.deepcopy(net).double(), doubled(given)._replace(controlnet_mode=mode)
        with turned_in_float64(transformer_flux):
            truth = by_diffusers(exact, latents.double(), times.double(), whole)
        made = denoiser(borrow_flux_control(net, Loan(net)))(latents, times, given)
    assert len(made) == len(eager) == 3
    for ours, theirs, right in zip(made, eager, truth, strict=True):
        verdict = judge("residual", ours, theirs, right)
        assert verdict.passed, verdict


@pytest.mark.parametrize("count", [1, 2])
def test_constant_channels(count):
    net = transformer(in_channels=24, out_channels=16)
    given = conditions(count=count, constant_channels=torch.randn(count, 15, 8))
    hold(net, torch.randn(count, 15, 16), given)


def test_constant_tokens():
    given = conditions(count=2, picture=15 + 4, constant_tokens=torch.randn(2, 4, 16))
    hold(transformer(), torch.randn(2, 15, 16), given)


def test_float16_is_clipped_where_diffusers_clips_it():
    """Sums of the text and of the single blocks that exceed float16 become its largest number."""
    net = transformer()
    with torch.no_grad():
        net.transformer_blocks[-1].ff_context.net[2].weight.mul_(1e5)
        net.single_transformer_blocks[0].proj_out.weight.mul_(1e3)
    net = net.half()
    latents, given = torch.randn(1, 15, 16).half(), conditions(dtype=torch.float16)
    made = denoiser(borrow_flux(net, Loan(net)))(latents, torch.tensor([0.5]), given)
    with torch.no_grad():
        eager = by_diffusers(net, latents, torch.tensor([0.5]).half(), given)
    assert eager.isfinite().all()
    torch.testing.assert_close(made, eager, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"guidance": None}, "guidance is missing"),
        ({"guidance": torch.ones(2)}, "guidance has the shape"),
        ({"img_ids": positions(14)}, r"img_ids has the shape \[14, 3\]; expected \[15, 3\]"),
        ({"txt_ids": torch.zeros(1, 7, 3)}, "txt_ids has the shape"),
        ({"pooled_projections": torch.zeros(2, 32)}, "pooled_projections is for 2 pictures"),
        ({"controlnet_block_samples": []}, "controlnet_block_samples is empty"),
        ({"constant_channels": torch.zeros(1, 15, 8)}, "expected 8 channels"),
    ],
)
def test_wrong_inputs_are_refused(given, what):
    network = borrow_flux(net := transformer(), Loan(net))
    network.check(torch.zeros(1, 15, 16), conditions())
    with pytest.raises(Unsupported, match=what):
        network.check(torch.zeros(1, 15, 16), conditions()._replace(**given))


def test_other_architectures_are_refused():
    net = transformer()
    net.fuse_qkv_projections()
    with pytest.raises(Unsupported, match="fused projections"):
        borrow_flux(net, Loan(net))
    net = transformer()
    net.transformer_blocks[1].attn.processor._attention_backend = "flash"
    with pytest.raises(Unsupported, match="an attention backend that was set"):
        borrow_flux(net, Loan(net))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_goes_onto_a_tape(dtype):
    """Also for several pictures, whose tokens are not adjacent at the end."""
    network = borrow_flux(net := transformer(dtype=dtype), Loan(net))
    hoisted = network.hoist(conditions(count=2, dtype=dtype), torch.tensor([[0.5]]), ())
    given = torch.randn(2, 15, 16).to(dtype), hoisted.rows[0], hoisted.constants
    tape = record(network.predict, given)
    assert tape is not None
    assert torch.equal(tape.run(), network.predict(*given))


def test_launches():
    """15 for a block of two streams and 7 for a block of one; also the embedding, three that join
    the streams, the last norm and the last product."""
    with torch.device("meta"):
        net = FluxTransformer2DModel(**FLUX).to(torch.float16).eval()
    network = borrow_flux(net, Loan(net, rehearsal=True))
    with torch.device("meta"):
        given = conditions("schnell", dtype=torch.float16)
        run = step(network, given, torch.zeros(1, 15, 16, dtype=torch.float16))
    assert len(launched(run, 90)) == 2 * 15 + 3 * 7 + 1 + 3 + 2 + 1
