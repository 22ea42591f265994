"""What the contract of `linear` cannot express: which GELU runs where, and in how many launches."""

import pytest
import torch
from torch.nn import functional as F

from fastdiff.bench.graph import NAMES, launched
from fastdiff.kernels.linear import linear


def given(dtype=torch.float32, device="cpu"):
    x, weight, bias = torch.randn(2, 5, 24), torch.randn(32, 24), torch.randn(32)
    return [tensor.to(dtype).to(device) for tensor in (x, weight, bias)]


@pytest.mark.parametrize("packed", [True, False])
def test_a_cpu_computes_each_gelu_by_its_own_formula(packed):
    """torch's product with a fused GELU computes the exact GELU on a CPU, and GELU by tanh on
    CUDA."""
    x, weight, bias = given(torch.float64)
    weight = weight.t().contiguous().t() if packed else weight
    y = F.linear(x, weight, bias)
    by_tanh = F.gelu(y, approximate="tanh")
    assert torch.equal(linear(x, weight, bias, "gelu_tanh"), by_tanh)
    assert torch.equal(linear(x, weight, bias, "gelu"), F.gelu(y))
    assert (by_tanh - F.gelu(y)).abs().max() > 1e-4
    single = [tensor.float() for tensor in (x, weight, bias)]
    ours = linear(*single, "gelu_tanh").double()
    assert (ours - by_tanh).abs().max() < 2e-5 < (ours - F.gelu(y)).abs().max()


@pytest.mark.parametrize(
    ("act", "kernels"),
    [("gelu_tanh", [NAMES["_addmm_activation"]]), ("gelu", [NAMES["addmm"], "torch gelu"])],
)
def test_launches_of_a_gelu_on_a_gpu(act, kernels):
    x, weight, bias = given(torch.float16, "meta")
    seen = launched(lambda: linear(x, weight, bias, act), 90)
    assert [kernel for kernel, _ in seen] == kernels
    bytes_moved = 2 * (10 * 24 + 32 * 24 + 32 + 10 * 32)
    assert (seen[0][1].bytes, seen[0][1].flops) == (bytes_moved, 2 * 10 * 24 * 32)


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="act is 'relu'; it must be one of none, silu, gelu, "):
        linear(*given(), act="relu")
