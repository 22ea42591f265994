"""A recorded network gives what the network gives, bit for bit; what cannot be recorded runs
without a recording."""

import copy
import threading

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastdiff
from fastdiff.kernels.dispatch import NATIVE
from fastdiff.kernels.linear import linear
from fastdiff.models import Loan, borrow_unet
from fastdiff.models.trunk import Conditions
from fastdiff.runtime import recordings, tape
from fastdiff.runtime.recordings import Recorded

pytestmark = pytest.mark.skipif(NATIVE is None, reason="tapes hold C++ kernels; none are built")


@pytest.fixture
def network(demo):
    unet = copy.deepcopy(demo.unet)
    return borrow_unet(unet, Loan(unet))


def inputs_for(network, rows=16, columns=16, batch=2):
    with torch.no_grad():
        sample, text = torch.randn(batch, 4, rows, columns), torch.randn(batch, 24, 128)
        (row,), constants = network.hoist(Conditions(text), torch.tensor([[7]]), (rows, columns))
    return network.pack(sample).contiguous(), row, constants


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if leaf is not None]


@torch.no_grad()
def test_recordings_equal_the_network_bit_for_bit(network):
    tapes = Recorded(network.predict)
    shapes = [(16, 16), (12, 20), (16, 16), (9, 5), (12, 20), (16, 16)]
    for rows, columns in shapes:
        given = inputs_for(network, rows, columns)
        kept = [tensor.clone() for tensor in tensors(given)]
        first, second = tapes(*given), tapes(*given)
        assert torch.equal(first, network.predict(*given))
        assert torch.equal(first, second)
        assert first.data_ptr() != second.data_ptr()  # an output is never overwritten later
        assert all(map(torch.equal, tensors(given), kept))
    assert len(tapes._kept._values) == 3
    assert None not in tapes._kept._values.values()


@torch.no_grad()
def test_weight_edits_are_seen(network):
    tapes = Recorded(network.predict)
    given = inputs_for(network)
    before = tapes(*given)
    network.conv_out.weight.mul_(2.0)
    after = tapes(*given)
    assert torch.equal(after, network.predict(*given))
    assert not torch.equal(before, after)


@torch.no_grad()
def test_the_least_recently_used_shape_is_evicted(network, monkeypatch):
    monkeypatch.setattr(recordings, "SHAPES", 2)
    tapes = Recorded(network.predict)
    first, second, third = (inputs_for(network, rows, 8) for rows in (8, 12, 16))
    for given in (first, second, first, third):
        tapes(*given)
        tapes(*given)  # the first call of a shape is not recorded
    heights = [key[0][0][1] for key in tapes._kept._values]
    assert heights == [8, 16]


@torch.no_grad()
def test_functions_with_other_ops_than_kernels_are_not_taped():
    weight = torch.randn(8, 8).t()
    calls = []

    def with_an_op_between(x):
        calls.append(x)
        return linear(linear(x, weight).exp(), weight)

    def with_a_copy_inside_a_kernel(x):
        return linear(x.transpose(0, 1), weight)

    for function in (with_an_op_between, with_a_copy_inside_a_kernel):
        tapes = Recorded(function)
        for _ in range(3):
            x = torch.randn(8, 8)
            assert torch.equal(tapes(x), function(x))
        assert list(tapes._kept._values.values()) == [None]
    assert len(calls) == 7  # one try to record, three calls through `tapes`, three direct calls


@torch.no_grad()
def test_large_activations_are_not_kept(network, monkeypatch):
    monkeypatch.setattr(tape, "TAPE_BYTES", 1 << 20)
    tapes = Recorded(network.predict)
    given = inputs_for(network)
    for _ in range(2):
        assert torch.equal(tapes(*given), network.predict(*given))
    assert list(tapes._kept._values.values()) == [None]


def test_two_threads_share_a_pipeline(demo):
    """Each gets the prediction that it gets alone."""
    pipe = fastdiff.compile(copy.deepcopy(demo))
    text = torch.randn(2, 24, 128)
    samples = [torch.randn(2, 4, 16, 16) for _ in range(2)]
    with torch.no_grad():
        alone = [pipe.unet(sample, 7, text)[0] for sample in samples]
    wrong = []

    def work(sample, expected):
        with torch.no_grad():
            for _ in range(30):
                if not torch.equal(pipe.unet(sample, 7, text)[0], expected):
                    wrong.append(sample)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(samples, alone, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_a_tape_gives_memory_of_the_dtype_asked_for():
    """`new_empty` on a tape once ignored its dtype and gave that of the tensor it was called on."""
    seen = []

    def function(x):
        wide = x.new_empty(5, dtype=torch.float64)
        seen.append((wide.dtype, wide.shape, x.new_empty(3).dtype))
        return linear(x, x.t())

    x = torch.randn(8, 8)
    assert tape.record(function, (x,)) is not None
    assert seen == [(torch.float64, torch.Size([5]), torch.float32)]
