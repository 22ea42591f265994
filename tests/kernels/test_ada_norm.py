"""`ada_norm` computes what diffusers computes, and refuses wrong arguments."""

import pytest
import torch
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    SD35AdaLayerNormZeroX,
)
from torch import nn

from fastdiff.kernels.ada_norm import ada_norm
from fastdiff.kernels.ada_norm.gpu import candidates, pick
from fastdiff.kernels.contract import judge, verify
from fastdiff.kernels.dispatch import KERNELS, NATIVE, implementation
from fastdiff.kernels.observe import counting

B, L, D = 2, 13, 64
WHICH = pytest.mark.parametrize("which", ["cpu", "triton"])


def inside(got, wanted):
    """wanted(dtype): diffusers' result in a dtype; float32's is eager's, float64's exact."""
    with torch.no_grad():
        verdict = judge("y", got, wanted(torch.float32), wanted(torch.float64))
    assert verdict.passed, verdict


@WHICH
@pytest.mark.parametrize(
    ("module", "chunks", "norms"),
    [
        (AdaLayerNormZero(D), 6, [(0, 1)]),
        (SD35AdaLayerNormZeroX(D), 9, [(0, 1), (6, 7)]),
        (AdaLayerNormContinuous(D, D, elementwise_affine=False, eps=1e-6), 2, [(1, 0)]),
    ],
    ids=["zero", "sd35-dual", "continuous"],
)
def test_first_norm_of_a_block(which, module, chunks, norms):
    """Scale and shift are chunks of the module's own projection of the time embedding."""
    x, emb = torch.randn(B, L, D), torch.randn(B, D)
    with torch.no_grad():
        rows = module.float().linear(module.silu(emb)).chunk(chunks, dim=1)
        for shift, scale in norms:
            y, total = KERNELS["ada_norm"].implementations[which]()(
                x, 1e-6, scale=rows[scale], shift=rows[shift]
            )
            assert total.shape == (0,)

            def wanted(dtype, last=shift == 6):
                if isinstance(module, AdaLayerNormContinuous):
                    return module.to(dtype)(x.to(dtype), emb.to(dtype))
                outputs = module.to(dtype)(x.to(dtype), emb=emb.to(dtype))
                return outputs[5 if last else 0]

            inside(y, wanted)


@WHICH
def test_gated_residual_and_second_norm_of_a_block(which):
    """`hidden + gate * attention`, its norm and modulation, as JointTransformerBlock has them."""
    hidden, attention = torch.randn(2, B, L, D).unbind(0)
    gate, scale, shift = torch.randn(B, 3 * D).chunk(3, dim=1)
    norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)

    def wanted(dtype, normed=True):
        h, a, g, s, t = (v.to(dtype) for v in (hidden, attention, gate, scale, shift))
        h = h + g.unsqueeze(1) * a
        return norm2(h) * (1 + s[:, None]) + t[:, None] if normed else h

    y, total = KERNELS["ada_norm"].implementations[which]()(
        attention, 1e-6, scale=scale, shift=shift, gate=gate, residual=hidden
    )
    inside(y, wanted)
    inside(total, lambda dtype: wanted(dtype, normed=False))


@WHICH
def test_halves_of_guidance_share_a_residual(which):
    x, shared = torch.randn(4, L, D), torch.randn(2, L, D)
    weight, bias = torch.randn(2, D).unbind(0)
    run = implementation("ada_norm", which)
    for got, expected in zip(
        run(x, 1e-5, weight, bias, residual=shared),
        run(x, 1e-5, weight, bias, residual=torch.cat([shared, shared])),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_far_mean_is_exact_where_eager_is_not():
    """Eager's own error makes the budget of this case wide, so the error has a bound of its own."""
    spec = KERNELS["ada_norm"].spec
    case = next(case for case in spec.cases if case.name == "far-mean")
    verdict = verify(spec, implementation("ada_norm", "triton"), case, torch.float32)[0]
    assert verdict.error < 1e-3, verdict


@pytest.mark.skipif(NATIVE is None, reason="built without a compiler")
def test_a_norm_with_all_its_options_is_one_kernel_in_cpp():
    x, weight, row = torch.randn(B, L, D), torch.ones(D), torch.ones(B, D)
    with counting() as called:
        ada_norm(x, 1e-5, weight, weight, residual=x)
        ada_norm(x, 1e-5, scale=row, shift=row, gate=row, residual=x)
        ada_norm(x, 1e-5, weight, rms=True)
    assert called == ["ada_norm"] * 3


@WHICH
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.ones(D + 1)}, r"weight is .*\[65\].*; expected .*\[64\]"),
        ({"scale": torch.ones(1, D)}, r"scale is .*\[1, 64\].*; expected .*\[2, 64\]"),
        ({"shift": torch.ones(D, B).T}, r"shift has strides \(1, 2\)"),
        ({"scale": torch.ones(B, D).half()}, r"scale is torch\.float16"),
        ({"residual": torch.ones(3, L, D)}, r"residual is .*\[3, 13, 64\].*; expected .*\[2, 13"),
        ({"gate": torch.ones(B, D)}, "gate needs a residual, but there is none"),
        ({"bias": torch.ones(D), "rms": True}, "RMSNorm has no bias"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_shapes_dtypes_and_strides_are_refused(which, arguments, message):
    with pytest.raises(ValueError, match=message):
        implementation("ada_norm", which)(torch.randn(B, L, D), 1e-5, **arguments)


def test_kernel_refuses_scattered_rows():
    x = torch.randn(B, D, L).transpose(1, 2)
    with pytest.raises(ValueError, match="make it contiguous"):
        implementation("ada_norm", "triton")(x, 1e-5)
    assert ada_norm(x, 1e-5)[0].is_contiguous()


@pytest.mark.parametrize("D", [1, 3, 64, 320, 1280, 1536, 2432, 3072, 12288])
def test_every_candidate_divides_rows_among_whole_warps(D):
    own = pick(1024, D, 8, 90)
    configs = candidates(1024, D, 8, 90)
    assert configs[0] == own
    for config in configs:
        assert config.rows * config.lanes == 32 * config.num_warps
    assert 32 * own.lanes >= D
