"""Every kind of network, compiled and called once."""

import pytest
import torch
from small import NETS

import fastdiff
from fastdiff.compiler.slot import slot_of


@pytest.fixture(scope="module", params=NETS)
def compiled(request):
    """(the module to call, its arguments, its keyword arguments)"""
    torch.manual_seed(0)
    model, net, given, options = NETS[request.param]()
    fastdiff.compile(model)
    with torch.no_grad():
        net(*given, **options)
    assert slot_of(net).fast == 1
    return net, given, options
