"""Every kernel x CPU implementation x case x dtype, inside the error budget."""

import pytest
import torch
from covered import covered, first_of_each
from held import asked, cost, hold, small
from torch.utils.flop_counter import FlopCounterMode

from fastdiff.kernels.attention import attention
from fastdiff.kernels.contract import FLOATS, Case, KernelSpec, max_error, poisoned_memory, verify
from fastdiff.kernels.dispatch import (
    KERNELS,
    NATIVE,
    NATIVE_DTYPES,
    NotNative,
    all_kernels,
    implementation,
)
from fastdiff.kernels.gelu_gate import gelu_gate
from fastdiff.kernels.linear.spec import SPEC as LINEAR
from fastdiff.kernels.observe import counting

ALL = [
    pytest.param(kernel, case, id=f"{kernel.spec.name}-{case.name}")
    for kernel in all_kernels().values()
    for case in kernel.spec.cases
]
CHEAPEST_FIRST = sorted(ALL, key=lambda known: cost(known.values[0].spec, known.values[1]))
LIBRARIES = [known for known in ALL if "triton" not in known.values[0].implementations]
PLAIN = ("gelu_gate", "softmax")
"""Ops that are plain torch on a CPU."""
REFUSED = {
    "linear": lambda c: not c.get("packed", True),
    "conv2d": lambda c: not c.get("packed", True),
    "geglu": lambda c: c.D > 1,  # their weights are stored by rows
    "group_norm_silu": lambda c: (
        c.get("shift") or c.get("keep") or (c.get("C2") and c.get("residual"))
    ),
    "ada_norm": lambda c: c.get("limit") or c.get("later"),
    "residual": lambda c: c.get("limit"),
}
"""Cases that a kernel in C++ does not compute in any dtype."""
ISAS = NATIVE.isas() if NATIVE else [None]


def in_cpp(kernel, case, dtype):
    """Whether a kernel in C++ computes a case; `test_a_named_kernel_runs_or_says_why_not` checks
    this."""
    name = kernel.spec.name
    known = NATIVE is not None and (dtype in NATIVE_DTYPES or name == "concat")
    return known and name not in PLAIN and not REFUSED.get(name, lambda case: False)(case)


def on_every_isa(known, **how):
    return covered(
        known,
        FLOATS,
        ISAS,
        possible=lambda kernel, case, dtype, isa: in_cpp(kernel, case, dtype),
        **how,
    )


def of_size(kernel, is_small):
    """A kernel's cases that are small, or all others."""
    own = [known for known in ALL if known.values[0] is kernel]
    return [known for known in own if small(kernel.spec, known.values[1]) == is_small]


CPP = [
    parameter
    for kernel in all_kernels().values()
    for parameter in (
        *on_every_isa(of_size(kernel, True), always=lambda *values: True),
        # each real size is tested once, on one of the instruction sets in one of the dtypes
        *on_every_isa(of_size(kernel, False), together=1),
    )
]
TORCH = first_of_each(
    covered(
        CHEAPEST_FIRST,
        FLOATS,
        possible=lambda kernel, case, dtype: not in_cpp(kernel, case, dtype),
    ),
    kind=lambda kernel, case, dtype: (dtype, asked(kernel.spec, case)),
    always=lambda kernel, case, dtype: small(kernel.spec, case),
)


@pytest.mark.parametrize(("kernel", "case", "dtype", "isa"), CPP)
def test_cpp_is_inside_the_budget(kernel, case, dtype, isa, chosen):
    chosen(isa)
    verdicts = hold(kernel.spec, kernel.implementations["cpu"](), case, dtype)
    assert all(v.passed for v in verdicts), verdicts


@pytest.mark.parametrize(("kernel", "case", "dtype"), TORCH)
def test_torch_is_inside_the_budget_where_there_is_no_cpp_kernel(kernel, case, dtype):
    verdicts = hold(kernel.spec, kernel.implementations["cpu"](), case, dtype)
    assert all(v.passed for v in verdicts), verdicts


QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize(("kernel", "case"), ALL)
def test_op_is_well_defined(kernel, case):
    """Schema, fake and strides agree with what the implementation does."""
    inputs = kernel.spec.inputs(case, torch.float32, torch.device("cpu"), torch.Generator())
    verdicts = torch.library.opcheck(kernel.op, (), inputs, test_utils=QUICK)
    assert set(verdicts.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("kernel", "case"),
    first_of_each(
        [known for known in CHEAPEST_FIRST if small(known.values[0].spec, known.values[1])],
        kind=lambda kernel, case: kernel.spec.name,
    ),
)
def test_op_can_be_traced_with_symbolic_sizes(kernel, case):
    inputs = kernel.spec.inputs(case, torch.float32, torch.device("cpu"), torch.Generator())
    verdict = torch.library.opcheck(kernel.op, (), inputs, test_utils="test_aot_dispatch_dynamic")
    assert set(verdict.values()) == {"SUCCESS"}


@pytest.mark.parametrize("held", [verify, hold])
def test_a_wrong_kernel_is_caught(held):
    case = LINEAR.cases[0]

    def slightly_wrong(x, weight, bias, act, residual):
        return LINEAR.reference(x, weight, bias, act, residual) * (1 + 1e-5)

    def reads_before_it_writes(x, weight, bias, act, residual):
        out = torch.empty(*x.shape[:-1], weight.shape[0])
        out[..., 1:] = LINEAR.reference(x, weight, bias, act, residual)[..., 1:]
        return out

    for wrong in (slightly_wrong, reads_before_it_writes):
        assert not all(v.passed for v in held(LINEAR, wrong, case, torch.float32))


def test_poisoned_memory_is_nan_inside_only():
    with poisoned_memory():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_max_error_counts_nan_and_infinity():
    nan, inf = float("nan"), float("inf")
    assert max_error(torch.tensor([1.0, nan]), torch.tensor([1.0, 2.0])) == inf
    assert max_error(torch.tensor([inf, 1.0]), torch.tensor([inf, 1.5])) == 0.5
    assert max_error(torch.tensor([inf]), torch.tensor([-inf])) == inf


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match=r"'cuda'.*reference, cpu, triton"):
        implementation("attention", "cuda")


@pytest.mark.parametrize(("kernel", "case"), LIBRARIES)
def test_bytes_and_flops_of_a_library_are_those_of_its_tensors(kernel, case):
    """Those of our own Triton kernels are counted in test_triton.py."""
    spec = kernel.spec
    inputs = spec.inputs(case, torch.float32, torch.device("cpu"), torch.Generator())
    with FlopCounterMode(display=False) as counter:
        made = spec.reference(**inputs)
    tensors = [value for value in (*inputs.values(), made) if isinstance(value, torch.Tensor)]
    assert spec.bytes(case, 4) == sum(tensor.nbytes for tensor in tensors)
    assert spec.flops(case) == counter.get_total_flops()


def test_bytes_and_flops_by_hand():
    specs = {name: kernel.spec for name, kernel in KERNELS.items()}
    square = {"B": 1, "Y": 4, "X": 4, "C": 8, "G": 2}
    expected = {
        ("group_norm_silu", Case("c", **square)): (2 * (4 * 4 * 8 * 2 + 2 * 8), None),
        ("attention", Case("c", B=1, Lq=8, Lk=4, H=2, K=16)): (
            2 * (2 * 8 + 2 * 4) * 32,
            4 * 2 * 8 * 4 * 16,
        ),
        ("linear", Case("c", B=1, L=2, D=3, N=5)): (2 * (2 * 8 + 15 + 5), 60),
    }
    for (name, case), (moved, flops) in expected.items():
        spec: KernelSpec = specs[name]
        assert spec.bytes(case, 2) == moved
        assert flops is None or spec.flops(case) == flops


@pytest.mark.parametrize(
    ("kernel", "case", "dtype"),
    covered(
        ALL,
        (*FLOATS, torch.float64),
        possible=lambda kernel, case, dtype: kernel.spec.name not in PLAIN,  # torch by contract
    ),
)
def test_a_named_kernel_runs_or_says_why_not(kernel, case, dtype):
    """The C++ kernel is called, or one sentence says what it got and what it does not take."""
    name = kernel.spec.name
    inputs = kernel.spec.inputs(case, dtype, torch.device("cpu"), torch.Generator())
    with counting() as called:
        if in_cpp(kernel, case, dtype):
            implementation(name, "cpu")(**inputs)
            assert called
        else:
            refusal = "got .* takes?" if NATIVE else "not built"
            with pytest.raises(NotNative, match=f"^{name}: .*{refusal}"):
                implementation(name, "cpu")(**inputs)
            assert not called


IMPLEMENTATIONS = [
    (kernel, which)
    for kernel in KERNELS.values()
    for which in kernel.implementations
    if which != "reference"
]


@pytest.mark.parametrize(
    ("kernel", "which"), IMPLEMENTATIONS, ids=[f"{k.spec.name}-{w}" for k, w in IMPLEMENTATIONS]
)
def test_tensors_on_other_devices_and_unsupported_dtypes_are_refused(kernel, which, monkeypatch):
    if which == "cuda":
        pytest.skip("built with -DFASTDIFF_CUDA=ON only; see test_cuda.py")
    name, case = kernel.spec.name, kernel.spec.cases[-1]
    inputs = kernel.spec.inputs(case, torch.float32, torch.device("cpu"), torch.Generator())
    elsewhere = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    run = implementation(name, which)
    with pytest.raises(ValueError, match=f"{name}: got tensors on meta; '{which}' takes"):
        run(**elsewhere)
    if which == "triton":
        double = kernel.spec.inputs(case, torch.float64, torch.device("cpu"), torch.Generator())
        with pytest.raises(ValueError, match=f"{name}: got torch.float64; 'triton' takes"):
            run(**double)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ValueError, match=f"{name}: got tensors on cpu; 'triton' takes .* cuda"):
            run(**inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_impl_cpu_never_falls_back(dtype):
    q, h = torch.ones(1, 4, 1, 8, dtype=dtype), torch.ones(1, 4, 8, dtype=dtype)
    with pytest.raises(ValueError, match=f"attention: got {dtype}"):
        attention(q, q, q, impl="cpu")
    assert attention(q, q, q).dtype == gelu_gate(h).dtype == dtype  # without `impl`, by torch
