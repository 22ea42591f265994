"""`qk_norm` computes what diffusers computes, at any strides, and refuses wrong arguments."""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from diffusers.models.normalization import RMSNorm

from fastdiff.kernels.contract import judge
from fastdiff.kernels.dispatch import KERNELS, implementation
from fastdiff.kernels.qk_norm import qk_norm
from fastdiff.kernels.qk_norm.gpu import candidates, pick

B, L, H, K = 2, 21, 3, 128
WHICH = pytest.mark.parametrize("which", ["cpu", "triton"])


def packed():
    """q and k as slices of a packed projection [B, L, 3, H, K]."""
    q, k, _ = torch.randn(B, L, 3, H, K).unbind(2)
    return q, k


@WHICH
@pytest.mark.parametrize("rotary", [False, True])
def test_norms_and_rotations_of_diffusers(which, rotary):
    """SD3.5's norms of queries and keys, and Flux's, which also rotates 21 positions."""
    norms = [RMSNorm(K, eps=1e-6) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight, 1, 0.2)
    cos, sin = get_1d_rotary_pos_embed(
        K, torch.arange(L), use_real=True, repeat_interleave_real=True
    )
    cos, sin = (cos.float(), sin.float()) if rotary else (None, None)
    tensors = packed()

    def truth(x, norm):
        y = norm(x)
        return apply_rotary_emb(y, (cos, sin), sequence_dim=1) if rotary else y

    with torch.no_grad():
        weights = [norm.weight for norm in norms]
        got = KERNELS["qk_norm"].implementations[which]()(*tensors, *weights, 1e-6, cos, sin)
        for y, x, norm in zip(got, tensors, norms, strict=True):
            eager = truth(x, norm)
            exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            exact = exact * norm.weight.double()
            if rotary:
                turned = torch.view_as_complex(exact.unflatten(-1, (-1, 2)))
                angle = torch.complex(cos.double(), sin.double())[:, ::2][:, None]
                exact = torch.view_as_real(turned * angle).flatten(-2)
            verdict = judge("y", y, eager, exact)
            assert verdict.passed, verdict
            assert verdict.eager_error < 1e-5  # theirs is the same mathematics
            assert y.is_contiguous()


@WHICH
def test_half_precision_is_as_close_as_diffusers(which):
    q, k = (tensor.half() for tensor in packed())
    cos, sin = torch.randn(2, L, K)
    norm = RMSNorm(K, eps=1e-6).half()
    with torch.no_grad():
        run = KERNELS["qk_norm"].implementations[which]()
        got, _ = run(q, k, norm.weight, norm.weight, 1e-6, cos, sin)
        theirs = apply_rotary_emb(norm(q), (cos, sin), sequence_dim=1)
    exact = implementation("qk_norm", "reference")(
        q.double(), k.double(), None, None, 1e-6, cos.double(), sin.double()
    )[0]
    verdict = judge("q", got, theirs, exact)
    assert verdict.passed, verdict


@WHICH
def test_kernel_reads_any_strides(which):
    """Heads before tokens, an odd offset, padded rows: the results are those of contiguous
    tensors."""
    run = implementation("qk_norm", which)
    q, k = torch.randn(B, H, L, K).transpose(1, 2), torch.randn(B, L, H, K + 3)[..., 1 : K + 1]
    for got, expected in zip(run(q, k), run(q.contiguous(), k.contiguous()), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("L", "H"), [(1, 1), (1, 5), (7, 1)])
def test_kernel_of_single_tokens_and_heads(L, H):
    """Triton makes an argument that is 1 a constant of the kernel."""
    inputs = (*torch.randn(2, 3, L, H, 8), None, None, 1e-6, *torch.randn(2, L, 8))
    ours = implementation("qk_norm", "triton")(*inputs)
    for got, expected in zip(ours, qk_norm(*inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@WHICH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.randn(B, L, H + 1, K)}, r"k is .*\[2, 21, 4, 128\].*; expected .*\[2, 21, 3"),
        ({"q_weight": torch.ones(K - 1)}, r"q_weight is .*\[127\].*; expected .*\[128\]"),
        ({"cos": torch.ones(L, K)}, "cos and sin belong together"),
        ({"cos": torch.ones(L, K), "sin": torch.ones(L, K // 2)}, r"sin is .*\[21, 64\]"),
        ({"cos": torch.ones(L, K), "sin": torch.ones(L, K).half()}, r"sin is torch\.float16"),
        ({"cos": torch.ones(L, K), "sin": torch.ones(L, 2 * K)[:, :K]}, "sin has strides"),
        ({"q": torch.randn(B, L, K, H).transpose(2, 3)}, "q has strides .*; the last must be 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_shapes_dtypes_and_strides_are_refused(which, change, message):
    q, k = packed()
    with pytest.raises(ValueError, match=message):
        implementation("qk_norm", which)(**({"q": q, "k": k} | change))


def test_rotating_heads_of_odd_width_is_refused():
    q, angles = torch.randn(1, 2, 1, 5), torch.ones(2, 5)
    with pytest.raises(ValueError, match="rotary embedding needs pairs; heads are 5 wide"):
        qk_norm(q, q, cos=angles, sin=angles)


@pytest.mark.parametrize("K", [3, 64, 128, 160])
def test_the_rule_is_the_first_candidate(K):
    configs = candidates(1024, 24, K, 8, 90)
    assert configs[0] == pick(1024, 24, K, 8, 90)
    assert len(set(configs)) == len(configs)
