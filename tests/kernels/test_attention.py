"""Masks of every shape, the choice of an implementation, and joint attention's errors.

test_contract.py and test_triton.py test that every case of both ops is inside its error budget.
"""

import math

import pytest
import torch

from fastdiff.kernels.attention import CUDA_CHOICES, choose, gpu, products
from fastdiff.kernels.attention import attention as run_attention
from fastdiff.kernels.attention.spec import SPEC as ATTENTION
from fastdiff.kernels.contract import Case, judge
from fastdiff.kernels.dispatch import NATIVE, all_kernels, implementation
from fastdiff.kernels.inspect import planned
from fastdiff.kernels.joint_attention import gpu as joint_gpu
from fastdiff.kernels.joint_attention import joint_attention
from fastdiff.kernels.joint_attention.spec import SPEC as JOINT
from fastdiff.kernels.planned import Planning, distinct

KERNELS = ["triton", *(NATIVE.isas() if NATIVE else ())]
"""The Triton kernel in the interpreter, and the C++ kernels of this CPU's instruction sets."""
ISAS = KERNELS[1:]
ARCHS = (80, 86, 89, 90, 100, 120)
WIDTHS = (40, 64, 80, 96, 128, 160, 512)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("size", [2, 4])
def test_the_first_candidate_of_the_tuner_is_the_default(arch, size):
    for K in WIDTHS:
        for Lk in (1, 77, 300, 4096):
            tried = gpu.candidates(Lk, K, size, arch)
            assert tried[0] == gpu.pick(Lk, K, size, arch)
            assert len(set(tried)) == len(tried) <= 20
        tried = joint_gpu.candidates(K, size, arch)
        assert tried[0] == joint_gpu.pick(K, size, arch)
        assert all(config.keys for config in tried)


def test_the_width_of_loads_follows_from_strides_and_head_widths():
    def vector(tensor):
        return gpu.alignment(tensor.shape[3], tensor)[1]

    packed = torch.empty(2, 8, 3, 5, 40, dtype=torch.float16)
    assert vector(packed[:, :, 1]) == 16  # heads are 80 bytes wide; 16 divides every stride
    assert vector(torch.empty(2, 8, 5, 36, dtype=torch.float16)) == 8
    assert vector(torch.empty(2, 8, 5, 33, dtype=torch.float16)) == 2
    assert vector(torch.empty(2, 8, 5, 40)) == 16
    shifted = torch.empty(2, 8, 208, dtype=torch.float16)[..., 4:204].unflatten(2, (5, 40))
    assert vector(shifted) == 2  # Triton only knows whether a pointer is a multiple of 16
    with pytest.raises(ValueError, match="the last one must be 1"):
        vector(packed[:, :, 1].transpose(2, 3))


@pytest.fixture
def kernel_of(chosen):
    """kernel_of(name, which): one of an op's kernels; `which` is one of `KERNELS`."""

    def kernel(name, which):
        if which != "triton":
            chosen(which)
        return implementation(name, "triton" if which == "triton" else "cpu")

    return kernel


def held(run, spec, *inputs, **options):
    """What `run` returns, after checking that it is inside the error budget of `spec`."""

    def cast(value):
        return value.double() if isinstance(value, torch.Tensor) else value

    def outputs(result):
        return result if isinstance(result, tuple) else (result,)

    got = run(*inputs, **options)
    eager = spec.reference(*inputs, **options)
    exact = spec.reference(*map(cast, inputs), **{n: cast(v) for n, v in options.items()})
    for i, of_each in enumerate(zip(*map(outputs, (got, eager, exact)), strict=True)):
        verdict = judge(f"output {i}", *of_each)
        assert verdict.passed, verdict
    return got


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("which", KERNELS)
def test_any_scale(which, scale, kernel_of):
    """A negative scale reverses the order of the scores, and so moves the largest one."""
    inputs = 4 * torch.randn(3, 1, 300, 2, 40)
    for dtype in [torch.float32] if which == "triton" else [torch.float32, torch.bfloat16]:
        held(kernel_of("attention", which), ATTENTION, *inputs.to(dtype).unbind(0), scale=scale)


@pytest.mark.parametrize("Lk", [77, 154, 700])
@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, float("-inf")])
@pytest.mark.parametrize("which", KERNELS)
def test_a_query_with_all_keys_masked(which, Lk, lowest, kernel_of):
    """If the mask is the lowest number: the mean of all values; if it is -inf: NaN, as in torch."""
    q, k, v = torch.randn(1, 9, 2, 40), *torch.randn(2, 1, Lk, 2, 40).unbind(0)
    mask = torch.zeros(1, 1, 9, Lk)
    mask[:, :, 3] = lowest
    mask[:, :, 5, : Lk // 2] = lowest
    got = held(kernel_of("attention", which), ATTENTION, q, k, v, mask)
    assert bool(got[:, 3].isnan().all()) == (lowest == float("-inf"))
    assert not got[:, 5].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_masks_of_every_shape_on_a_cpu(isa, dtype, kernel_of):
    """A row for each sample, head or query, or one for all; -inf masks keys also in bfloat16."""
    q, k, v = torch.randn(2, 70, 3, 40), *torch.randn(2, 2, 131, 3, 40).unbind(0)
    inputs = [t.to(dtype) for t in (q, k, v)]
    for shape in [(131,), (2, 1, 1, 131), (1, 3, 1, 131), (70, 131), (2, 3, 70, 131), (70, 1)]:
        mask = torch.randn(shape).to(dtype)
        mask[..., : shape[-1] // 2] = float("-inf")
        held(kernel_of("attention", isa), ATTENTION, *inputs, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_any_number_of_tokens_and_any_head_width_on_a_cpu(isa, dtype, kernel_of):
    """Head widths and key counts that leave half a pair or part of a vector; blocks of one to four
    vectors of queries."""
    for queries, keys, width in [
        *((n, 5, 8) for n in (1, 15, 16, 17, 33, 49, 64, 65)),
        *((3, n, 16) for n in (1, 2, 3, 7, 13, 127, 128, 129, 257)),
        *((20, 19, n) for n in (1, 2, 7, 31, 33, 41, 129)),
    ]:
        q = torch.randn(2, queries, 2, width).to(dtype)
        k, v = torch.randn(2, 2, keys, 2, width).to(dtype).unbind(0)
        held(kernel_of("attention", isa), ATTENTION, q, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_heads_too_large_to_be_copied_at_once_on_a_cpu(isa, dtype, kernel_of):
    """The heads of an autoencoder: keys are copied 4 MiB at a time, and several blocks of queries
    use each copy."""
    q, k, v = torch.randn(3, 1, 2051, 1, 512).to(dtype).unbind(0)
    mask = torch.randn(2051).to(dtype)
    held(kernel_of("attention", isa), ATTENTION, q[:, :150], k, v, mask)
    few = [t[:, 2000:] for t in (q, k, v)]
    held(
        kernel_of("joint_attention", isa),
        JOINT,
        *(t[:, :2000] for t in (q, k, v)),
        *few,
        text_bias=torch.randn(51),
    )


@pytest.mark.parametrize("isa", ISAS)
def test_products_of_bfloat16_are_as_exact_as_torchs(isa, kernel_of):
    """Tighter than the budget, which allows twice eager's error: over a whole head the error is at
    most 1.25 times that of torch's own kernel."""
    q, k, v = torch.randn(3, 1, 1024, 2, 80).bfloat16().unbind(0)
    exact = ATTENTION.reference(q.double(), k.double(), v.double())

    def error(out):
        return float((out.double() - exact).square().mean().sqrt())

    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v))
    ).transpose(1, 2)
    assert error(kernel_of("attention", isa)(q, k, v)) <= 1.25 * error(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_products_row_by_row(dtype, masked, monkeypatch):
    monkeypatch.setattr(products, "SCORES", 6 * 77 * 32)  # the last block is not full
    q, k, v = torch.randn(2, 100, 3, 512), *torch.randn(2, 2, 77, 3, 512).unbind(0)
    mask = torch.randn(2, 1, 1, 77) if masked else None
    inputs = [None if t is None else t.to(dtype) for t in (q, k, v, mask)]
    got = run_attention(*inputs, impl="products")
    exact = ATTENTION.reference(*(None if t is None else t.double() for t in inputs))
    verdict = judge("out", got, ATTENTION.reference(*inputs), exact)
    assert verdict.passed, verdict
    assert got.is_contiguous()


def test_wide_heads_run_as_matrix_products_unless_there_are_few_keys():
    assert (
        choose(512, 4096, 2).run == choose(640, 77, 4).run == choose(632, 77, 2).run == "products"
    )
    assert choose(640, 256, 2).run == "triton"
    assert choose(256, 4096, 2).run == "sdpa"
    assert choose(160, 4096, 2).run == "triton"
    wide = torch.empty(2, 256, 1, 640, dtype=torch.float16, device="meta")
    with Planning(90) as planning:
        assert run_attention(wide, wide, wide).shape == wide.shape
    assert [launch.kernel.__name__ for launch in planning.launches] == ["_wide_kernel"]
    assert {choice.run for choice in CUDA_CHOICES} <= {"triton", "sdpa", "products"}


def test_joint_attention_names_the_wrong_argument():
    q, text = torch.randn(1, 6, 2, 8), torch.randn(1, 3, 2, 8)
    with pytest.raises(
        ValueError, match=r"joint_attention: .*\[1, 3, 2, 4\].*; expected \[B, L, H"
    ):
        joint_attention(q, q, q, text, text, text[..., :4])
    shapes = torch.zeros(4), torch.zeros(2, 3)  # for a text of one sample with 3 tokens
    for wrong in (*shapes, torch.zeros(3, dtype=torch.float64), torch.zeros(6)[::2]):
        with pytest.raises(ValueError, match="joint_attention: text_bias (is|has)"):
            joint_attention(q, q, q, None, text, text, text_bias=wrong)
    with pytest.raises(ValueError, match="6 picture and 0 text tokens"):
        joint_attention(q, q, q, *[text[:, :0]] * 3)


@pytest.mark.parametrize("tokens", [6, 16, 30])  # fewer and more scores than a vector holds
def test_one_text_token_with_a_bias_replaces_many_equal_tokens(tokens):
    """SD3 without T5 has 256 text tokens of zeros."""
    states, words = torch.randn(3, 2, tokens + 3, 2, 8, dtype=torch.float64).split([tokens, 3], 2)
    many = torch.cat([words[:, :, :2], words[:, :, 2:].expand(-1, -1, 256, -1, -1)], 2)
    picture, text = joint_attention(*states.unbind(0), *many.unbind(0))
    bias = torch.tensor([0.0, 0.0, math.log(256)])
    ours, ours_text = joint_attention(*states.unbind(0), *words.unbind(0), text_bias=bias)
    # the bias is float32
    torch.testing.assert_close(ours, picture, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours_text, text[:, :3], rtol=1e-6, atol=1e-6)


def test_a_text_without_queries_is_attended_to_and_gets_no_output():
    q, k, v = torch.randn(3, 2, 9, 2, 8).unbind(0)
    _, *words = torch.randn(3, 2, 4, 2, 8).unbind(0)
    expected, _ = joint_attention(q, k, v, torch.randn(2, 4, 2, 8), *words)
    picture, text = joint_attention(q, k, v, None, *words)
    torch.testing.assert_close(picture, expected)
    assert text.shape == (0,)


def test_a_text_without_queries_runs_the_same_kernel():
    inputs = {True: None, False: None}
    kernel = all_kernels()["joint_attention"]
    for silent in inputs:
        case = Case("c", B=2, L=1024, T=333, H=2, K=64, silent=silent)
        inputs[silent] = planned(kernel, case, torch.float16, 90)[0]
    assert len(distinct(inputs.values())) == 1
    assert inputs[True].grid[0] == inputs[False].grid[0] - 6  # blocks of 64 queries


def test_joint_attention_is_attention_over_picture_and_text_concatenated():
    states = torch.randn(3, 2, 9, 2, 8)
    whole = ATTENTION.reference(*states.unbind(0))
    picture, text = joint_attention(*states[:, :, :6].unbind(0), *states[:, :, 6:].unbind(0))
    torch.testing.assert_close(torch.cat([picture, text], 1), whole)
