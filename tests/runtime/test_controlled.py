"""A transformer and the ControlNets of its steps as one network, against diffusers in float64."""

import copy
from weakref import ref

import pytest
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from diffusers.models.transformers import transformer_flux
from small import FLUX, noisy
from torch import Tensor
from torch.utils._pytree import tree_map
from turning import turned_in_float64

from fastdiff.kernels.contract import judge
from fastdiff.models import Loan
from fastdiff.models.flux import Conditions, borrow_flux
from fastdiff.models.flux_control import Control, ControlConditions, borrow_flux_control
from fastdiff.runtime.controlled import Controlled, hoist
from fastdiff.runtime.tape import record

TIMES, SCALES = torch.tensor([[0.5], [0.125]]), ((0.3, 0.7), (1.2, 0.0))
"""Of two steps, and of both ControlNets in each."""
COUNTS = ((2, 3), (1, 2))
"""Blocks of the ControlNets; the first ones of each are added."""


def networks(dtype):
    """Random ones; the second ControlNet's picture is of two kinds."""
    nets = []
    for (first, others), more in zip(COUNTS, ({}, {"num_mode": 2}), strict=True):
        config = FLUX | {"num_layers": first, "num_single_layers": others} | more
        nets.append(noisy(FluxControlNetModel(**config)))
    return [net.to(dtype) for net in (noisy(FluxTransformer2DModel(**FLUX)), *nets)]


def conditions(count, picture, text, guided, dtype):
    """Positions are exact in every dtype; the ControlNets are told the second half."""
    halves = 1 + guided
    texts, pooled = torch.randn(halves * count, text, 20), torch.randn(halves * count, 32)
    kinds = torch.arange(count)[:, None] % 2
    given = [
        ControlConditions(
            *((part[-count:].to(dtype) if guided else None) for part in (texts, pooled)),
            *(None, None, None),
            *(torch.randn(count, picture, 16).to(dtype), kinds),
        )
        for _ in SCALES
    ]
    return Conditions(
        *(texts.to(dtype), pooled.to(dtype)),
        torch.tensor([[0, i // 3, i % 3] for i in range(picture)]).to(dtype),
        torch.zeros(text, 3, dtype=dtype),
        controls=tuple(map(Control, given, SCALES)),
    )


def by_diffusers(modules, x, given, step):
    """What a loop of diffusers' own predicts in a step."""
    transformer, *nets = modules
    timestep, count = TIMES[step].to(x.dtype).expand(len(x)), len(given.encoder_hidden_states)
    firsts, others = [], []
    for net, control in zip(nets, given.controls, strict=True):
        told = control.beside(given)._asdict()
        made = net(
            *(x, told.pop("controlnet_cond"), told.pop("controlnet_mode")),
            **(told | {"timestep": timestep, "conditioning_scale": control.scales[step]}),
            return_dict=False,
        )
        firsts, others = ([*kept, new] for kept, new in zip((firsts, others), made, strict=True))
    halves = count // len(x)
    residuals = [
        [sum(same).repeat(halves, 1, 1) for same in zip(*kind, strict=False)]
        for kind in (firsts, others)
    ]
    return transformer(
        x.repeat(halves, 1, 1),
        *(given.encoder_hidden_states, given.pooled_projections),
        *(timestep.repeat(halves), given.img_ids, given.txt_ids),
        controlnet_block_samples=residuals[0],
        controlnet_single_block_samples=residuals[1],
        return_dict=False,
    )[0]


def doubled(tree):
    return tree_map(
        lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, tree
    )


@pytest.mark.parametrize(
    ("counts", "guided", "dtype"),
    [
        ((1, 15, 7), False, torch.float32),
        ((2, 6, 1), True, torch.float32),
        ((3, 1, 5), False, torch.bfloat16),
        ((1, 15, 3), True, torch.float16),
    ],
)
def test_predictions(counts, guided, dtype):
    """And on a tape, whose scales are the row's."""
    modules, given = networks(dtype), conditions(*counts, guided, dtype)
    x = torch.randn(*counts[:2], 16).to(dtype)
    with torch.no_grad():
        eager = [by_diffusers(copy.deepcopy(modules), x, given, step) for step in (0, 1)]
        with turned_in_float64(transformer_flux):
            exact = [copy.deepcopy(module).double() for module in modules]
            truths = [by_diffusers(exact, x.double(), doubled(given), step) for step in (0, 1)]
        transformer, *others = modules
        nets = [borrow_flux_control(net, Loan(net)) for net in others]
        own = borrow_flux(transformer, Loan(transformer))
        both = Controlled(own, tuple(map(ref, nets)), (0, 1), (1, 2))
        both.check(x, given, 1 + guided)
        hoisted = both.hoist(given, TIMES, ())
        rows = [tree_map(lambda row, at=at: row[at].clone(), hoisted.rows) for at in (0, 1)]
        buffers = x.clone(), tree_map(Tensor.clone, rows[0]), hoisted.constants
        tape = record(both.predict, buffers) if dtype != torch.float16 else None
        for row, theirs, right in zip(rows, eager, truths, strict=True):
            made = both.predict(x, row, hoisted.constants)
            verdict = judge("prediction", made, theirs, right)
            assert verdict.passed, verdict
            if dtype != torch.float16:
                tree_map(lambda own, now: own.copy_(now), buffers[1], row)
                assert torch.equal(tape.run(), made)


def test_what_is_there_is_not_hoisted_again():
    modules, given = networks(torch.float32), conditions(1, 6, 3, False, torch.float32)
    transformer, *others = modules
    with torch.no_grad():
        nets = [borrow_flux_control(net, Loan(net)) for net in others]
        own = borrow_flux(transformer, Loan(transformer))
        one, two = (Controlled(own, (ref(nets[i]),), (i,), (1, 2)) for i in (0, 1))
        first = hoist(one, None, given, TIMES, ())
        second = hoist(two, (one, first), given, TIMES, ())
        bare = hoist(own, (two, second), given, TIMES, ())
        assert first.rows.own is second.rows.own is bare.rows
        assert hoist(one, (own, bare), given, TIMES, ()).constants.own is bare.constants
        for network, made in ((two, second), (own, bare)):
            again = tree_map(torch.equal, made.rows, network.hoist(given, TIMES, ()).rows)
            assert all(again.nets + again.scales) if network is two else again
