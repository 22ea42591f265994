"""Z-Image against diffusers in float64, at reduced widths."""

import copy

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from small import ZIMAGE, noisy

import fastdiff
from fastdiff.compiler.slot import slot_of
from fastdiff.kernels.contract import judge
from fastdiff.models import Loan, Unsupported
from fastdiff.models.zimage import Conditions, borrow_zimage

SIZES = {
    "one": ([(8, 8)], (5,)),
    "captions of other lengths": ([(8, 16)] * 3, (5, 40, 20)),
    "pictures of other sizes": ([(8, 8), (6, 10), (8, 8)], (5, 33, 7)),
}


def made(dtype, sizes, lengths):
    pictures = [torch.randn(4, 1, *size).to(dtype) for size in sizes]
    captions = [torch.randn(length, 20).to(dtype) for length in lengths]
    return pictures, torch.tensor([0.0, 0.3, 0.999])[: len(sizes)], captions


def called(net, pictures, times, captions, dtype=None):
    """All predictions, as one row."""
    cast = [[one.to(dtype or one.dtype) for one in many] for many in (pictures, captions)]
    with torch.no_grad():
        outs = net(cast[0], times, cast[1], return_dict=False)[0]
    return torch.cat([out.flatten() for out in outs])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in SIZES), ("one", torch.bfloat16), ("one", torch.float16)],
)
def test_predictions(kind, dtype):
    """Latents of several sizes, with different timesteps; 64 tokens need no padding."""
    eager = noisy(ZImageTransformer2DModel(**ZIMAGE)).to(dtype)
    given, ours = made(dtype, *SIZES[kind]), fastdiff.compile(copy.deepcopy(eager))
    got = called(ours, *given)
    assert (slot_of(ours).fast, dict(slot_of(ours).eager)) == (1, {})
    truth = called(copy.deepcopy(eager).double(), *given, dtype=torch.float64)
    verdict = judge("predictions", got, called(eager, *given), truth)
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("shape", "captions", "what"),
    [
        ((1, 4, 8, 7), [(5, 20)], "do not divide into patches"),
        ((2, 4, 8, 8), [(5, 20)], "1 captions for 2 predictions"),
        ((1, 4, 8, 8), [], "cap_feats is missing"),
        ((1, 4, 8, 8), [(70, 20)], "positions up to"),
    ],
)
def test_wrong_inputs_are_refused(shape, captions, what):
    net = noisy(ZImageTransformer2DModel(**ZIMAGE))
    network = borrow_zimage(net, Loan(net))
    conditions = Conditions([torch.zeros(size) for size in captions])
    with pytest.raises(Unsupported, match=what):
        network.check(torch.zeros(shape), conditions)
