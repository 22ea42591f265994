"""GEGLU and its gate: what their contracts cannot express."""

import math

import pytest
import torch
from held import hold
from torch.nn import functional as F

from fastdiff.kernels.dispatch import NATIVE, implementation
from fastdiff.kernels.geglu import geglu
from fastdiff.kernels.geglu.spec import SPEC
from fastdiff.kernels.gelu_gate import gelu_gate

ARCHS = (80, 90, 100, 120)


@pytest.mark.product  # test_inspect.py tests float16, and CI's table all launches
def test_the_gate_keeps_enough_bytes_in_flight_in_bfloat16(compiled):
    """4.3 TB/s times 0.8 us over 132 SMs are 26 KiB an SM; a warp has 2 KiB in flight."""
    gates = compiled(ARCHS, "bfloat16", cases=("sd15-32-part",), ops=("gelu_gate",))
    assert len(gates) == len(ARCHS)
    for row in gates:
        assert row["faults"] == []
        assert row["registers"] <= 48
        assert row["occupancy"] * 48 * 2 >= 26  # 48 warps on sm_86, 89 and 120, 64 on the others


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gate_of_infinity_and_nan(dtype):
    inf, nan = float("inf"), float("nan")
    gates = torch.tensor([inf, nan, 65504.0, -65504.0, 0.0, -0.0], dtype=dtype)
    h = torch.cat([torch.ones_like(gates), gates])[None]
    got = gelu_gate(h, impl="triton")[0].tolist()
    assert got[0] == inf
    assert math.isnan(got[1])
    assert got[2] == 65504.0
    assert -1e-11 < got[3] <= 0.0
    assert got[4] == got[5] == 0.0


def test_gate_is_closer_to_the_truth_than_torch():
    """At all magnitudes: the kernel approximates Phi, so small gates are as exact as large ones."""
    sign = torch.tensor([-1.0, 1.0])[:, None]
    gates = (sign * torch.logspace(-6, 1.5, 20000)).view(-1, 200)
    exact = F.gelu(gates.double())
    ours = gelu_gate(torch.cat([torch.ones_like(gates), gates], 1), impl="triton")
    error, eager = (((got - exact) / gates).abs().max() for got in (ours, F.gelu(gates)))
    assert error < 1e-7 < eager


@pytest.mark.skipif(NATIVE is None, reason="installed without a compiler")
@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
def test_borrowed_weights_run_our_own_loop(case, monkeypatch):
    """Borrowed weights are stored by columns. The GPU kernel does not take them so, and therefore
    no case of the spec has them."""

    def borrowed(x, weight, bias, act):
        monkeypatch.setattr(F, "linear", None)  # the reference runs before and after
        try:
            return geglu(x, weight.t().contiguous().t(), bias, act)
        finally:
            monkeypatch.undo()

    for dtype in (torch.float32, torch.bfloat16):
        for verdict in hold(SPEC, borrowed, case, dtype):
            assert verdict.passed, (dtype, verdict)


def test_strides_that_are_taken_and_refused():
    """x may be part of wider rows; the C++ kernel takes only a weight that is stored by columns."""
    weight, run = torch.randn(2 * 24, 16), implementation("geglu", "cpu")
    x = torch.randn(6, 21)[:, 3:19]
    packed = weight.t().contiguous().t()
    for got in (geglu(x, weight), geglu(x, packed), run(x, packed)):
        torch.testing.assert_close(got, SPEC.reference(x, weight), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"geglu: got a weight of strides \(16, 1\)"):
        run(x, weight)
    with pytest.raises(ValueError, match=r"gelu_gate: h .* strides \(\d+, \d+, \d+\)"):
        gelu_gate(torch.randn(3, 4, 16).transpose(0, 1), impl="triton")
    with pytest.raises(ValueError, match=r"gelu_gate: bias has strides \(2,\)"):
        gelu_gate(torch.ones(2, 48), torch.ones(96)[::2], impl="triton")


def test_empty_input():
    weight = torch.randn(8, 4)
    assert geglu(torch.empty(0, 4), weight).shape == (0, 4)
    assert gelu_gate(torch.empty(2, 0, 8)).shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.ones(8, 5)}, r"x \[2, 4\], weight \[8, 5\]"),
        ({"weight": torch.ones(7, 4)}, r"weight \[7, 4\]; expected \[..., D\], \[2N, D\]"),
        ({"bias": torch.ones(4)}, r"bias is \[4\]; expected \[8\]"),
        ({"bias": torch.ones(8).half()}, "all must be of one dtype"),
        ({"act": "relu"}, "geglu: act is 'relu'; it must be gelu, silu or silu_first"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        geglu(**{"x": torch.ones(2, 4), "weight": torch.ones(8, 4)} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"h": torch.ones(2, 3)}, r"h is \[2, 3\]; expected \[..., 2N\]"),
        ({"bias": torch.ones(2)}, r"bias is torch.float32 \[2\]; expected torch.float32 \[4\]"),
        ({"impl": "split"}, "'split'.*reference, cpu, triton"),
        ({"act": "relu"}, "gelu_gate: act is 'relu'; it must be gelu, silu or silu_first"),
    ],
)
def test_a_wrong_argument_of_the_gate_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        gelu_gate(**{"h": torch.ones(2, 4)} | arguments)
