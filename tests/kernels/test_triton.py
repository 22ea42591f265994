"""Every Triton kernel, in Triton's interpreter, is inside the error budget in every case."""

from functools import cache, partial

import pytest
import torch
from covered import covered, first_of_each
from held import cost, small
from traffic import Counting

from fastdiff.kernels.attention.spec import SPEC as ATTENTION
from fastdiff.kernels.contract import FLOATS, judge, power_parts, verify
from fastdiff.kernels.dispatch import KERNELS, all_kernels, implementation
from fastdiff.kernels.inspect import planned

TRITON = {name: k.spec for name, k in all_kernels().items() if "triton" in k.implementations}


def interpreted(name, case, dtype):
    """Whether to test a case in a dtype. The interpreter is slow in bfloat16: only small cases
    without matrix products run in it."""
    spec = TRITON[name]
    return dtype != torch.bfloat16 or (not spec.products and spec.bytes(case, 2) < 4_000_000)


@cache
def launched(name, case, dtype):
    """What tells launches apart: kernels, absent arguments, and constants that are 0 or false."""
    return tuple(
        (
            launch.kernel.__name__,
            frozenset(at for at, given in launch.arguments.items() if given is None),
            frozenset(at for at, value in launch.constants.items() if not value),
        )
        for launch in planned(KERNELS[name], case, dtype, 0)
    )


def taken_in_turn(name, case, dtype):
    """Whether a small case takes its turn in this dtype: the first case runs in one dtype, the next
    in another, and so on."""
    spec = TRITON[name]
    if not small(spec, case):
        return False
    seen = [one for one in FLOATS if interpreted(name, case, one)]
    return seen[spec.cases.index(case) % len(seen)] is dtype


# Real sizes only add programs to the same launches, and the interpreter is slow: beside the small
# cases, the cheapest of each kind of launch runs in each dtype. Tests of the C++ kernels use all.
ALL = first_of_each(
    covered(
        [
            pytest.param(name, case, id=f"{name}-{case.name}")
            for name, spec in TRITON.items()
            for case in sorted(spec.cases, key=partial(cost, spec))
        ],
        FLOATS,
        possible=interpreted,
    ),
    kind=lambda name, case, dtype: (dtype, launched(name, case, dtype)),
    always=lambda name, case, dtype: small(TRITON[name], case),
)
CASES = first_of_each(
    [one for one in ALL if pytest.mark.product not in one.marks],
    kind=launched,
    always=taken_in_turn,
)


@pytest.mark.parametrize(("name", "case", "dtype"), CASES)
def test_case_is_within_its_budget_and_costs_what_its_spec_says(name, case, dtype):
    spec = TRITON[name]
    run = Counting(spec, implementation(name, "triton"))
    for verdict in verify(spec, run, case, dtype):
        assert verdict.passed, verdict
    assert run.bytes == spec.bytes(case, dtype.itemsize)
    done = run.traffic.products if spec.products else run.traffic.arithmetic
    assert done >= spec.flops(case)
    # masked tiles compute more than is needed, and some programs repeat work rather than wait
    if run.traffic.idle == 0 and not case.get("repeats"):
        # 3 % for what a kernel computes per channel or row, which no formula counts
        assert done == pytest.approx(spec.flops(case), rel=0 if spec.products else 0.03)


def test_group_norm_far_mean_is_exact_where_eager_is_not():
    """Eager's own error makes the budget of this case wide, so the error has a bound of its own."""
    spec = TRITON["group_norm_silu"]
    case = next(case for case in spec.cases if case.name == "far-mean")
    verdict = verify(spec, implementation("group_norm_silu", "triton"), case, torch.float32)[0]
    assert verdict.error < 1e-3, verdict


@pytest.mark.parametrize("Lk", [7, 77, 300, 400])  # short keys, two parts, several flash blocks
def test_attention_masks_of_every_shape(Lk):
    run = implementation("attention", "triton")
    q = torch.randn(2, 19, 2, 40)
    k, v = torch.randn(2, 2, Lk, 2, 40).unbind(0)
    for shape in ((2, 2, 19, Lk), (1, 1, 19, Lk), (2, 1, 1, Lk), (1, 2, 1, Lk), (Lk,)):
        mask = torch.where(torch.rand(shape) > 0.5, 0.0, float("-inf"))
        mask[..., -1] = 0.0  # whole flash blocks may be masked, but no whole row
        mask[..., : Lk // 2] = float("-inf")
        for dtype in (torch.float32, torch.float16):  # only fp16 stays on chip
            inputs = [tensor.to(dtype) for tensor in (q, k, v, mask)]
            exact = ATTENTION.reference(*(tensor.double() for tensor in inputs))
            verdict = judge(f"mask {shape}", run(*inputs), ATTENTION.reference(*inputs), exact)
            assert verdict.passed, verdict


def test_attention_row_without_any_key_is_nan_as_in_the_reference():
    q, k, v = torch.randn(3, 1, 20, 1, 32).unbind(0)
    mask = torch.zeros(1, 1, 20, 20)
    mask[..., 3, :] = float("-inf")
    got = implementation("attention", "triton")(q, k, v, mask)
    assert got.isnan().all(-1).flatten().tolist() == [i == 3 for i in range(20)]


def test_group_norm_row_of_any_stride():
    """A row that is a slice of a wider projection, in a sum with a residual."""
    spec = TRITON["group_norm_silu"]
    x, residual = torch.randn(2, 2, 5, 3, 24).unbind(0)
    row = torch.randn(2, 100)[:, 7:31]
    weight, bias = torch.randn(2, 24).unbind(0)
    inputs = (x, weight, bias, 4, 1e-5, "silu", row, residual)
    got = implementation("group_norm_silu", "triton")(*inputs)
    for ours, reference in zip(got, spec.reference(*inputs), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_guided_step_refuses_float64_state():
    spec = TRITON["guided_step"]
    case = spec.cases[0]
    inputs = spec.inputs(case, torch.float64, torch.device("cpu"), torch.Generator())
    with pytest.raises(ValueError, match="got torch.float64; 'triton' takes"):
        implementation("guided_step", "triton")(**inputs)


@pytest.mark.parametrize(
    ("width", "least", "parts"),
    [(40, 1, (32, 8)), (40, 16, (32, 16)), (64, 16, (64, 0)), (30, 1, (32, 0)), (77, 16, (64, 16)),
     (160, 16, (128, 32)), (1, 1, (1, 0)), (8, 16, (16, 0)), (10, 1, (8, 2)), (308, 16, (256, 64))],
)  # fmt: skip
def test_power_parts(width, least, parts):
    assert power_parts(width, least) == parts
