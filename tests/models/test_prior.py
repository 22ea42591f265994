"""unCLIP's prior against diffusers in float64, at reduced widths."""

import copy

import pytest
import torch
from covered import covered
from diffusers import PriorTransformer
from small import PRIOR, PRIORS, noisy
from torch import Tensor
from torch.utils._pytree import tree_map

from fastdiff.kernels.contract import judge
from fastdiff.models import Loan, PriorConditions, Unsupported, borrow_prior
from fastdiff.runtime.denoiser import denoiser
from fastdiff.runtime.tape import record

TIMES = torch.tensor([[999.0], [321.7], [20.5]])
TOKENS = PRIOR["num_embeddings"]


def prior(kind="karlo", dtype=torch.float32, **more):
    return noisy(PriorTransformer(**PRIOR | PRIORS[kind] | more)).to(dtype)


def conditions(module, count, dtype=torch.float32):
    """Texts of different lengths."""
    config = module.config
    text = torch.randn(count, TOKENS, config.embedding_dim if config.encoder_hid_proj_type else 48)
    embedding = torch.randn(count, config.embedding_proj_dim or config.embedding_dim)
    lengths = 1 + torch.arange(count)[:, None] * 3 % TOKENS
    return PriorConditions(
        embedding.to(dtype), text.to(dtype), torch.arange(TOKENS)[None] < lengths
    )


def latents(module, count, dtype=torch.float32):
    return torch.randn(count, module.config.embedding_dim).to(dtype)


def doubled(tree):
    return tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


def by_diffusers(module, x, time, given, copies=1):
    return module(torch.cat([x] * copies), time, *given, return_dict=False)[0]


def by_us(network, x, given, copies=1, step=1):
    """Our prediction for the step number `step` of `TIMES`, hoisted with the other steps."""
    network.check(x, given, copies)
    rows, constants = network.hoist(given, TIMES, ())
    return network.unpack(network.predict(network.pack(x), rows[step], constants), ())


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "dtype", "batch", "copies"),
    covered(PRIORS, (torch.float32, torch.bfloat16), (1, 2, 3), (1, 2)),
)
def test_predictions(kind, dtype, batch, copies):
    module = prior(kind, dtype)
    given, x = conditions(module, batch * copies, dtype), latents(module, batch, dtype)
    exact = copy.deepcopy(module).double()
    eager = by_diffusers(module, x, TIMES[1, 0], given, copies)
    truth = by_diffusers(exact, x.double(), TIMES[1, 0], doubled(given), copies)
    ours = by_us(borrow_prior(module, Loan(module)), x, given, copies)
    verdict = judge("prediction", ours, eager, truth)
    assert verdict.passed, verdict


@torch.no_grad()
@pytest.mark.parametrize("kind", PRIORS)
def test_the_cache_is_exact(kind):
    """In float64: what is added to the score of a hidden token makes its share exactly 0."""
    module = prior(kind, torch.float64)
    given, x = conditions(module, 4, torch.float64), latents(module, 2, torch.float64)
    network = borrow_prior(module, Loan(module))
    for step, time in enumerate(TIMES[:, 0]):
        ours = by_us(network, x, given, 2, step)
        assert (ours - by_diffusers(module, x, time, given, 2)).abs().max() < 1e-13


@torch.no_grad()
def test_a_single_call_with_a_timestep_for_each_picture():
    module, times = prior(dtype=torch.float64), torch.tensor([7, 500, 999])
    given, x = conditions(module, 3, torch.float64), latents(module, 3, torch.float64)
    want = by_diffusers(module, x, times, given)
    ours = denoiser(borrow_prior(module, Loan(module)))(x, times, given)
    assert (ours - want).abs().max() < 1e-13


@torch.no_grad()
def test_a_step_goes_onto_a_tape():
    module = prior()
    network = borrow_prior(module, Loan(module))
    given, x = conditions(module, 4), latents(module, 2)
    rows, constants = network.hoist(given, TIMES, ())
    tape = record(network.predict, (x.clone(), rows[2].clone(), constants))
    assert tape is not None
    assert torch.equal(tape.run(), network.predict(x, rows[2], constants))


def test_inputs_that_diffusers_refuses_or_mixes_are_refused():
    """Each is refused with a reason; diffusers' own call then runs. To mix: to let one picture
    influence another."""
    module = prior()
    network = borrow_prior(module, Loan(module))
    x, given = latents(module, 2), conditions(module, 2)
    others = {
        "no attention_mask": given._replace(attention_mask=None),
        "attention_mask [2, 3]": given._replace(attention_mask=given.attention_mask[:, :3]),
        "a text of 5 tokens": given._replace(encoder_hidden_states=torch.randn(2, 5, 24)),
        "encoder_hidden_states is missing": given._replace(encoder_hidden_states=None),
        "proj_embedding is for 4": given._replace(proj_embedding=torch.randn(4, 24)),
    }
    for reason, other in others.items():
        with pytest.raises(Unsupported, match=reason.replace("[", r"\[")):
            network.check(x, other)
    with pytest.raises(Unsupported, match="hidden_states has the shape"):
        network.check(x[:, None], given)
    hidden = given.attention_mask.clone()
    hidden[1, 0] = False  # the first token then attends to all hidden ones, the latents among them
    with pytest.raises(Unsupported, match="hides the first token"):
        network.hoist(given._replace(attention_mask=hidden), TIMES, ())
    with pytest.raises(Unsupported, match="reach other pictures"):
        network.check(x * torch.tensor([[1.0], [float("nan")]]), given)
    network.check(x[:1] * float("nan"), conditions(module, 1))  # there is no other picture
    module.causal_attention_mask -= 3e4  # no change after a softmax, but as low as for others
    with pytest.raises(Unsupported, match="hides all tokens from one of them"):
        network.hoist(given, TIMES, ())
    module.causal_attention_mask.zero_()  # every token sees all others
    with pytest.raises(Unsupported, match="hides the first token"):
        network.hoist(given, TIMES, ())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda net: setattr(net, "additional_embeddings", 3), "3 tokens beside"),
        (lambda net: net.transformer_blocks[0].set_chunk_feed_forward(2), "in chunks"),
        (lambda net: setattr(net.transformer_blocks[1].attn1, "heads", 4), "mask for 3 heads"),
    ],
)
def test_other_structures_are_refused(change, reason):
    module = prior()
    change(module)
    with pytest.raises(Unsupported, match=reason):
        borrow_prior(module, Loan(module, rehearsal=True))


@torch.no_grad()
def test_edits_in_place_are_seen():
    module = prior(dtype=torch.float64)
    network = borrow_prior(module, Loan(module))
    given, x = conditions(module, 1, torch.float64), latents(module, 1, torch.float64)
    for name, weight in module.named_parameters():
        if not name.startswith("clip_"):  # those that are read after the loop
            weight += 0.01 * torch.randn_like(weight)
    ours = by_us(network, x, given)
    assert isinstance(ours, Tensor)
    assert (ours - by_diffusers(module, x, TIMES[1, 0], given)).abs().max() < 1e-13
