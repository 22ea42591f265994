"""Planned launches of our kernels: which of them share a compiled kernel, and which do not."""

from dataclasses import replace

import pytest
import torch

from fastdiff.kernels.ada_norm.gpu import run as ada_norm
from fastdiff.kernels.contract import float_bits
from fastdiff.kernels.dispatch import all_kernels, implementation
from fastdiff.kernels.group_norm_silu import group_norm_silu
from fastdiff.kernels.group_norm_silu.gpu import run as group_norm
from fastdiff.kernels.planned import Planning, distinct, specialised
from fastdiff.kernels.residual.gpu import run as residual

HALF = {"dtype": torch.float16, "device": "meta"}


def norm(batch, side, channels, beside=0, eps=1e-5, act="silu", **added):
    x, weight = torch.empty(batch, side, side, channels, **HALF), torch.empty(channels, **HALF)
    both = torch.empty(channels + beside, **HALF)
    given = {
        "row": torch.empty(batch, 64 + channels, **HALF)[:, 64:],
        "shift": weight,
        "residual": torch.empty_like(x),
    }
    given = {name: given[name] for name in added}
    if beside:
        given["beside"] = torch.empty(1, side, side, beside, **HALF)
    return group_norm.plan(90, x, both, both, 32, eps, act, **given)[0]


def test_group_norms_that_differ_in_arguments_share_their_kernels():
    launches = []
    for channels in (320, 640, 1280):  # 8, 4 and 2 groups in a segment
        launches += norm(2, 64, channels)
        launches += norm(1, 72, channels, row=True)
        launches += norm(2, 64, channels, row=True, shift=True, eps=1e-6, act="none")
        launches += norm(2, 64, channels, beside=channels)  # no segment has both x and `beside`
    assert [launch.kernel.__name__ for launch in distinct(launches)] == [
        "_statistics_kernel",
        "_apply_kernel",
    ]
    launches += norm(2, 64, 640, residual=True, shift=True)  # its loop reads and writes more
    launches += norm(2, 64, 640, beside=320)  # of segments of 120 channels, one has both
    assert len(distinct(launches)) == 5


def test_a_norm_on_chip_is_one_kernel_with_any_addends():
    launches = []
    for channels, beside in ((1280, 0), (640, 0), (1280, 1280)):
        for added in ((), ("row",), ("shift", "residual"), ("residual",)):
            launches += norm(2, 16, channels, beside, **dict.fromkeys(added, True))
    assert {launch.kernel.__name__ for launch in launches} == {"_one_pass_kernel"}
    assert len(distinct(launches)) == 1


def test_transformer_norms_are_one_kernel_per_width_and_residuals_one_per_tile():
    x, vector = torch.empty(2, 256, 640, **HALF), torch.empty(640, **HALF)
    shared = torch.empty(1, 256, 640, **HALF)
    norms = [
        launch
        for eps in (1e-5, 1e-6)
        for other in (None, x, shared)
        for launch in ada_norm.plan(90, x, eps, vector, vector, residual=other)[0]
    ]
    assert len(distinct(norms)) == 1
    sums = []
    for width in (320, 640, 1280):
        picture, shift = torch.empty(2, 64, 64, width, **HALF), torch.empty(width, **HALF)
        for other, more in ((picture, None), (None, shift), (picture, shift)):
            sums += residual.plan(90, picture, other, more)[0]
    assert len(distinct(sums)) == 1


def test_launches_that_triton_compiles_separately_are_distinct():
    (launch,) = norm(2, 16, 1280)
    changes = [
        {"num_warps": 4},
        {"num_stages": 2},
        {"constants": {**launch.constants, "ROWS": 128}},
        {"arguments": {**launch.arguments, "x_ptr": torch.empty(1, device="meta")}},
        {"arguments": {**launch.arguments, "x_ptr": torch.empty(9, **HALF)[1:]}},
        {"arguments": {**launch.arguments, "row_ptr": None}},
        {"arguments": {**launch.arguments, "L": 2**31}},
    ]
    others = [replace(launch, **change) for change in changes]
    assert distinct([launch, *others, launch]) == [launch, *others]
    same = replace(launch, arguments={**launch.arguments, "L": 1, "C": 17}, grid=(7,))
    assert distinct([launch, same]) == [launch]


def test_integers_are_specialised_unless_the_kernel_says_no():
    kernel = all_kernels()["guided_step"]
    case = kernel.spec.cases[0]
    inputs = kernel.spec.inputs(case, torch.float16, torch.device("cpu"), torch.Generator())
    (launch,), _ = kernel.implementations["triton"]().plan(90, **inputs)
    for elements, known in ((16, True), (17, False)):
        _, _, divisible = specialised(
            replace(launch, arguments={**launch.arguments, "E": elements})
        )
        assert ("E" in divisible) == known
    types, constants, _ = specialised(replace(launch, arguments={**launch.arguments, "E": 1}))
    assert constants["E"] == 1
    assert "E" not in types


def test_planning_an_op_returns_an_output_of_its_shape():
    x, weight = torch.empty(1, 512, 512, 128, **HALF), torch.empty(128, **HALF)
    with Planning(90) as planning:
        y, _ = group_norm_silu(x, weight, weight, 32, 1e-6)
    assert y.shape == x.shape
    assert [launch.kernel.__name__ for launch in planning.launches] == [
        "_statistics_kernel",
        "_apply_kernel",
    ]


@pytest.mark.parametrize("eps", [0.5, 3e-39])
def test_eps_is_the_float_that_was_given(eps):
    """Kernels get the bits of eps; read as another type, they would be a very different number."""
    x, vector = torch.randn(2, 5, 24), torch.ones(24)
    runs = {
        "ada_norm": {"x": x, "eps": eps, "weight": vector},
        "qk_norm": {"q": x.view(2, 5, 3, 8), "k": x.view(2, 5, 3, 8), "eps": eps},
        "group_norm_silu": {
            **{"x": x.view(2, 5, 1, 24), "weight": vector, "bias": vector},
            **{"groups": 3, "eps": eps, "act": "none"},
        },
    }
    for name, inputs in runs.items():
        got = implementation(name, "triton")(**inputs)
        expected = implementation(name, "reference")(**inputs)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    assert torch.tensor(float_bits(eps), dtype=torch.int32).view(torch.float32) == torch.tensor(eps)
