"""What the contract of `group_norm_silu` cannot express: refusals, launches."""

import pytest
import torch

from fastdiff.kernels.concat import concat
from fastdiff.kernels.contract import judge, verify
from fastdiff.kernels.dispatch import NATIVE, implementation
from fastdiff.kernels.group_norm_silu import group_norm_silu
from fastdiff.kernels.group_norm_silu.gpu import candidates, pick, run
from fastdiff.kernels.group_norm_silu.launches import LaunchConfig
from fastdiff.kernels.group_norm_silu.spec import SPEC
from fastdiff.kernels.occupancy import SMS
from fastdiff.kernels.tuned import forced, recorded

# (L, C) of every norm of a U-Net: SD1.5 at 512², SDXL at 1024², 32 groups
UNETS = [
    (4096, 320), (4096, 640), (4096, 960), (1024, 320), (1024, 640), (1024, 960), (1024, 1280),
    (1024, 1920), (256, 640), (256, 1280), (256, 1920), (256, 2560), (64, 1280), (64, 2560),
    (16384, 320), (16384, 640), (16384, 960), (4096, 1280), (4096, 1920), (1024, 2560),
]  # fmt: skip

COMPILED = """
import torch
from fastdiff.kernels.group_norm_silu.gpu import run
from fastdiff.kernels.inspect import _source
found = {}
for Y, X in (64, 64), (64, 72), (65, 77), (96, 96), (128, 128), (7, 149):
    x = torch.empty(2, Y, X, 320, dtype=torch.float16, device="meta")
    channels = torch.empty(320, dtype=torch.float16, device="meta")
    for launch in run.plan(90, x, channels, channels, 32, 1e-5, 'silu')[0]:
        sources = found.setdefault(launch.kernel.__name__, set())
        sources.add((_source(launch).hash(), launch.num_warps))
print({name: len(sources) for name, sources in found.items()})
"""


def test_another_picture_size_compiles_no_new_kernel(compiling):
    assert compiling(COMPILED).strip() == "{'_statistics_kernel': 1, '_apply_kernel': 1}"


@pytest.mark.parametrize("arch", SMS)
@pytest.mark.parametrize(("L", "C"), UNETS)
def test_norms_of_a_unet_read_whole_cache_lines_and_fill_the_chip(arch, L, C):
    config = pick(2, L, C // 32, 32, 2, arch)
    segment = config.groups * C // 32 * 2
    assert segment >= (32 if config.slabs == 1 else 128)
    assert segment % 16 == 0
    programs = 2 * 32 // config.groups * max(1, config.slabs)
    if config.slabs == 1:  # in one launch
        assert programs >= 2 / 5 * SMS[arch].number
    elif config.slabs:
        rounds = -(-programs // SMS[arch].number)
        assert rounds <= 2
        assert programs >= 0.75 * rounds * SMS[arch].number
    else:
        assert L <= 256


def test_candidates_begin_with_the_rule_and_cover_whole_groups():
    for L, C in UNETS:
        shape = (2, L, C // 32, 32, 2, 90)
        found = candidates(*shape)
        assert found[0] == pick(*shape)
        assert len(set(found)) == len(found)
        assert all(32 % config.groups == 0 and config.slabs <= L for config in found)


def test_only_a_program_with_channels_of_two_pictures_keeps_a_smaller_tile():
    """SD1.5's concatenations at 16²: one group of 1280 + 1280 channels never has both pictures, two
    of 1280 + 640 do. A launch asks for its configuration once, so a tuner sees what runs."""
    for first, second, slabs in ((1280, 1280, 0), (1280, 640, 4), (1920, 0, 0)):
        x, beside = (
            torch.empty(2, 16, 16, C, dtype=torch.float16, device="meta") for C in (first, second)
        )
        line = torch.empty(first + second, dtype=torch.float16, device="meta")
        with recorded() as picks:
            more = {"beside": beside} if second else {}
            launches, _ = run.plan(90, x, line, line, 32, 1e-5, "silu", **more)
        (one,) = picks
        assert one.config.slabs == slabs
        assert {launch.num_warps for launch in launches} == {one.config.num_warps}


def test_a_skip_connection_of_half_the_batch_with_a_row_on_a_cpu():
    x, beside, row = torch.randn(4, 3, 5, 8), torch.randn(2, 3, 5, 6), torch.randn(4, 8)
    weight, bias = torch.randn(2, 14).unbind(0)
    both = concat(x + row[:, None, None, :], beside)
    y, _ = group_norm_silu(x, weight, bias, 7, 1e-5, row=row, beside=beside)
    torch.testing.assert_close(y, group_norm_silu(both, weight, bias, 7, 1e-5)[0])


@pytest.mark.parametrize("slabs", [1, 4])
def test_a_far_mean_is_exact_in_slabs_and_with_a_far_shift(slabs):
    """Sums of squares around zero would lose all digits of a deviation of 1e-4 of the mean."""
    x = (torch.randn(1, 64, 64, 64, dtype=torch.float64) * 0.1 + 1000).float()
    shift = torch.full((64,), -900.0)
    weight, bias = torch.ones(64), torch.zeros(64)
    inputs = {"groups": 16, "eps": 1e-5, "act": "none", "shift": shift}
    exact, _ = SPEC.reference(x.double(), weight.double(), bias.double(), **inputs)
    with forced("group_norm_silu", LaunchConfig(8, 256, slabs, 4)):
        got, _ = implementation("group_norm_silu", "triton")(x, weight, bias, **inputs)
    assert (got - exact).abs().max() < 1e-3


@pytest.mark.parametrize("slabs", [1, 3])
@pytest.mark.parametrize("name", ["odd-cat", "odd-kept", "odd-scaled"])
def test_groups_that_are_read_twice_by_one_program_or_in_two_launches(name, slabs):
    (case,) = (case for case in SPEC.cases if case.name == name)
    with forced("group_norm_silu", LaunchConfig(1, 16, slabs, 4)):
        verdicts = verify(SPEC, implementation("group_norm_silu", "triton"), case, torch.float32)
    assert all(verdict.passed for verdict in verdicts), verdicts


@pytest.mark.skipif(NATIVE is None, reason="needs the C++ kernels")
@pytest.mark.parametrize("first", [0.0, 1000.0])
def test_first_pixels_far_from_the_mean_on_a_cpu(first):
    """The C++ kernel sums squares around the mean of a slab's first eighth, which is far from the
    mean of the slab here."""
    x = torch.randn(1, 64, 64, 64) * 0.1 + 10
    x.view(1, 4, 16, 64, 64)[:, :, :2] = first  # a slab is 16 rows
    inputs = {"groups": 16, "eps": 1e-5, "act": "none"}
    parts = (x, torch.ones(64), torch.zeros(64))
    exact, _ = SPEC.reference(*(part.double() for part in parts), **inputs)
    eager, _ = SPEC.reference(*parts, **inputs)
    got, _ = implementation("group_norm_silu", "cpu")(*parts, **inputs)
    assert judge("first", got, eager, exact).passed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"groups": 5}, "12 channels do not split into 5"),
        ({"beside": torch.ones(3, 2, 2, 4)}, r"beside is \[3, 2, 2, 4\]"),
        ({"shift": torch.ones(12)}, r"shift is \[12\]; expected \[8\]"),
        ({"row": torch.ones(1, 8)}, r"row is \[1, 8\]; expected \[4, 8\]"),
        ({"residual": torch.ones(2, 2, 2, 8)}, r"residual is \[2, 2, 2, 8\]; expected \[4, 2, 2"),
        ({"weight": torch.ones(8)}, r"weight is \[8\]; expected \[12\]"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    inputs = {"weight": torch.ones(12), "groups": 4, "beside": torch.ones(2, 2, 2, 4)} | wrong
    with pytest.raises(ValueError, match=message):
        group_norm_silu(torch.ones(4, 2, 2, 8), bias=torch.ones(12), eps=1e-5, **inputs)
