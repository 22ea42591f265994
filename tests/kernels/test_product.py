"""The C++ matrix product across its inner borders: blocks of rows, chunks of the sum, panels and
copied rows."""

import pytest
import torch
from held import hold

from fastdiff.kernels.contract import Case
from fastdiff.kernels.conv2d.spec import SPEC as CONV2D
from fastdiff.kernels.dispatch import NATIVE, implementation
from fastdiff.kernels.geglu.spec import SPEC as GEGLU
from fastdiff.kernels.linear.spec import SPEC as LINEAR

pytestmark = pytest.mark.skipif(NATIVE is None, reason="installed without a compiler")

CASES = [
    (LINEAR, Case("blocks", B=1, L=1061, D=137, N=70)),  # 528 rows share a copy of the weight
    (LINEAR, Case("chunks", B=1, L=97, D=1155, N=390, residual=True)),  # 384 steps; 5 panels of 64
    (LINEAR, Case("few", B=1, L=17, D=801, N=101, act="silu")),  # the weight is not copied
    (LINEAR, Case("wide", B=1, L=530, D=50, N=1100, act="gelu", beside=4)),
    # sums go from registers straight to the output
    (LINEAR, Case("straight", B=4, L=133, D=64, N=80, residual=True, parts=2)),
    (CONV2D, Case("first", B=1, Y=37, X=29, C=4, N=330)),  # from few channels
    (CONV2D, Case("first-odd", B=2, Y=11, X=30, C=3, N=64, residual=True)),
    (CONV2D, Case("first-down", B=1, Y=18, X=23, C=5, N=37, kernel=5, stride=2)),
    (CONV2D, Case("last", B=1, Y=37, X=29, C=130, N=3, residual=True)),  # to few channels
    (CONV2D, Case("last-down", B=2, Y=20, X=13, C=50, N=7, stride=2, padding=(0, 1))),
    (CONV2D, Case("short-down", B=2, Y=41, X=27, C=12, N=70, stride=2, padding=(0, 1))),
    (CONV2D, Case("short-up", B=1, Y=19, X=15, C=20, N=36, size=(37, 29))),
    (CONV2D, Case("odd-channels", B=2, Y=23, X=19, C=129, N=68)),
    (CONV2D, Case("deep", B=1, Y=25, X=23, C=400, N=80, residual=True)),
    (CONV2D, Case("deep-down", B=1, Y=49, X=47, C=200, N=340, stride=2)),
    (CONV2D, Case("deep-point", B=1, Y=25, X=23, C=770, N=66, kernel=1)),
]


DTYPES = (torch.float32, torch.bfloat16)
ISAS = NATIVE.isas() if NATIVE else []
GATED = Case("borders", B=1, L=541, D=431, N=181)


@pytest.mark.parametrize("isa", ISAS)  # changes fastest
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spec", "case"), CASES, ids=lambda value: getattr(value, "name", None))
def test_every_border_is_inside_the_budget(spec, case, dtype, isa, chosen):
    chosen(isa)
    verdicts = hold(spec, implementation(spec.name, "cpu"), case, dtype)
    assert all(v.passed for v in verdicts), verdicts


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gated_product_across_its_borders(dtype, isa, chosen):
    def borrowed(x, weight, bias, act):
        return implementation("geglu", "cpu")(x, weight.t().contiguous().t(), bias, act)

    chosen(isa)
    verdicts = hold(GEGLU, borrowed, GATED, dtype)
    assert all(v.passed for v in verdicts), verdicts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 64, 1100])
def test_how_threads_share_a_product_changes_no_bit(rows, dtype):
    """Each sum is added in the same order, whichever thread, block and panel computes it."""
    x = torch.randn(rows, 700).to(dtype)
    weight = torch.randn(700, 330).to(dtype).t()
    picture = torch.randn(1, -(-rows // 4), 4, 70).to(dtype)
    taps = torch.randn(3, 3, 70, 150).to(dtype).permute(3, 2, 0, 1)
    linear, conv2d = (implementation(name, "cpu") for name in ("linear", "conv2d"))
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            made.append((linear(x, weight), conv2d(picture, taps, None, 1, [1, 1])))
    finally:
        torch.set_num_threads(before)
    for again in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, made[0], strict=True))
