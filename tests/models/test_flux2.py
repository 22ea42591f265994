"""FLUX.2's transformer against diffusers in float64, at reduced widths."""

import copy

import pytest
import torch
from covered import covered
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers import transformer_flux2
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
)
from small import FLUX2, noisy
from torch import Tensor
from torch.utils._pytree import tree_map
from turning import turned_in_float64

from fastdiff.bench.graph import launched
from fastdiff.kernels.contract import judge
from fastdiff.models import Loan, Unsupported
from fastdiff.models.flux2 import Conditions, borrow_flux2
from fastdiff.runtime.denoiser import denoiser
from fastdiff.runtime.planned import step
from fastdiff.runtime.tape import record

COUNTS = ((1, 15, 7), (2, 6, 1), (3, 1, 5))
"""The number of pictures, of tokens of a picture, and of tokens of a text."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def transformer(dtype=torch.float32, **more):
    return noisy(Flux2Transformer2DModel(**FLUX2 | more)).to(dtype)


def positions(tokens, layer=0):
    return torch.tensor([[layer, i // 3, i % 3, 0] for i in range(tokens)])


def conditions(count=1, picture=15, text=7, dtype=torch.float32, **more):
    """Guidance and positions are exact in every dtype; pipelines give them for each picture."""
    ids = torch.tensor([[0, 0, 0, i] for i in range(text)])
    given = torch.randn(count, text, 24).to(dtype), positions(picture).repeat(count, 1, 1), ids
    return Conditions(*given, torch.tensor([2.0, 1.0, 4.0])[:count], **more)


def by_diffusers(module, latents, times, given):
    names = given._asdict()
    more, ids = names.pop("constant_tokens"), names.pop("constant_ids")
    whole = latents
    if more is not None:
        whole = torch.cat([latents, more], 1)
        names["img_ids"] = torch.cat([given.img_ids, ids], 1)
    return module(whole, timestep=times, **names, return_dict=False)[0][:, : latents.shape[1]]


def doubled(value):
    return value.double() if isinstance(value, Tensor) else value


def hold(module, latents, given):
    """Check that our prediction is within the error budget of diffusers' own."""
    times = torch.tensor([0.5, 0.125, 1.0])[: len(latents)]
    with torch.no_grad():
        eager = by_diffusers(copy.deepcopy(module), latents, times.to(latents.dtype), given)
        with turned_in_float64(transformer_flux2):
            exact = copy.deepcopy(module).double()
            truth = by_diffusers(exact, latents.double(), times.double(), tree_map(doubled, given))
        network = denoiser(borrow_flux2(module, Loan(module)))
        made = network(latents, times.to(latents.dtype), given)
    verdict = judge("prediction", made, eager, truth)
    assert verdict.passed, verdict


@pytest.mark.parametrize(("counts", "dtype"), covered(COUNTS, DTYPES))
def test_predictions(counts, dtype):
    count, picture, _ = counts
    hold(transformer(dtype), torch.randn(count, picture, 16).to(dtype), conditions(*counts, dtype))


def test_guidance_is_ignored_without_an_embedding():
    """Klein has no embedding of guidance, and diffusers ignores it there."""
    hold(transformer(guidance_embeds=False), torch.randn(1, 15, 16), conditions())


def test_reference_pictures():
    more = {"constant_tokens": torch.randn(2, 4, 16)}
    more["constant_ids"] = positions(4, layer=10).repeat(2, 1, 1)
    hold(transformer(), torch.randn(2, 15, 16), conditions(2, **more))


def test_wrong_inputs_are_refused():
    network = borrow_flux2(net := transformer(), Loan(net))
    network.check(torch.zeros(1, 15, 16), conditions())
    for given, what in (
        ({"img_ids": positions(14)}, r"img_ids has the shape \[14, 4\]; expected \[15, 4\]"),
        ({"constant_tokens": torch.zeros(1, 2, 16)}, "constant_ids is missing"),
        ({"guidance": torch.ones(1, 1)}, "guidance has the shape"),
    ):
        with pytest.raises(Unsupported, match=what):
            network.check(torch.zeros(1, 15, 16), conditions()._replace(**given))


def test_processors_that_keep_keys_and_values_are_refused():
    """Klein KV's pipeline sets such processors."""
    net = transformer()
    for block in net.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in net.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    with pytest.raises(Unsupported, match="a Flux2KVAttnProcessor where"):
        borrow_flux2(net, Loan(net))


def test_a_step_goes_onto_a_tape():
    network = borrow_flux2(net := transformer(), Loan(net))
    hoisted = network.hoist(conditions(count=2), torch.tensor([[0.5]]), ())
    given = torch.randn(2, 15, 16), hoisted.rows[0], hoisted.constants
    tape = record(network.predict, given)
    assert tape is not None
    assert torch.equal(tape.run(), network.predict(*given))


def test_launches():
    """17 for a block of two streams (one more for each gate) and 7 for a block of one."""
    with torch.device("meta"):
        net = Flux2Transformer2DModel(**FLUX2).to(torch.float16).eval()
        network = borrow_flux2(net, Loan(net, rehearsal=True))
        latents = torch.zeros(1, 15, 16, dtype=torch.float16)
        run = step(network, conditions(dtype=torch.float16), latents)
    assert len(launched(run, 90)) == 2 * 17 + 3 * 7 + 1 + 3 + 2 + 1
