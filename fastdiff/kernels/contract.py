"""A kernel's contract: one data object that tests, benches, `inspect` and export all use.

Correctness is an error budget against the same mathematics in float64, never a tolerance:

    err(ours, exact) <= 2 * (err(eager, exact) + eps(dtype) * max|exact|)

where err is the largest absolute difference, `eager` is the plain-torch reference in the kernel's
own dtype, and `exact` is the same reference in float64 on the same (rounded) inputs.
"""

import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Case:
    """A named set of sizes: `Case("sd15-64px", B=2, L=4096).L == 4096`.

    Letters: B batch, L tokens (Lq queries, Lk keys), H heads, K head width, C channels, G groups,
    Y and X rows and columns of a picture. Other names are options of the op.
    """

    def __init__(self, name: str, **sizes: Any) -> None:
        self.name = name
        self.sizes = sizes

    def __getattr__(self, key: str) -> Any:
        try:
            return self.__dict__["sizes"][key]
        except KeyError:
            raise AttributeError(f"case has no size {key!r}") from None

    def get(self, key: str, default: Any = None) -> Any:
        return self.sizes.get(key, default)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.sizes.items())})"


@dataclass(frozen=True)
class KernelSpec:
    """The contract of one fused op; imports torch only."""

    name: str
    arguments: type[Any]
    """A dataclass of the op's arguments, which also defines its schema. The functions in an op's
    folder take one instance; callers of the op pass its fields. Every call makes one, so it has
    slots and is not frozen, which would take three times as long."""
    formula: Callable[[Any], Any]
    """The op in plain torch, in the dtype of its arguments."""
    inputs: Callable[[Case, torch.dtype, torch.device, torch.Generator], dict[str, Any]]
    """Keyword arguments of the op for a case, with strides as in the models."""
    cases: tuple[Case, ...]
    bytes: Callable[[Case, int], int]
    """The least DRAM traffic of a case in bytes, given the element size: all needed bytes of the
    inputs and all bytes of the outputs, once each. Tests count it from the loads and stores of the
    Triton kernel, or from the tensors if a library computes."""
    flops: Callable[[Case], int]
    """FLOPs of a case: 2 for each multiply-add of a matrix product. Without products, the
    floating-point operations per output element; an exponential or a division counts as one."""
    work: Callable[[Any], tuple[str, tuple[int, ...]]] | None = None
    """(kind, sizes), by which `choices` compares calls of a product; None for other ops."""
    fake: Callable[[Any], Any] | None = None
    """Shapes and strides of the outputs, for tracing; None if the formula can be traced."""
    mutates: tuple[str, ...] = ()
    """Arguments written in place; they are compared like outputs."""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    products: bool = False
    """Whether the Triton kernel multiplies matrices. Triton's interpreter multiplies the raw bits
    of bfloat16, so there such a kernel is tested only in the other dtypes."""

    @property
    def schema(self) -> str:
        """torch's schema without the name, e.g. "(Tensor x, float eps) -> Tensor"."""

        def prototype() -> None: ...

        described: Any = prototype
        described.__signature__ = signature(self.arguments).replace(
            return_annotation=signature(self.formula).return_annotation
        )
        inferred = torch.library.infer_schema(described, mutates_args=self.mutates)
        return inferred.replace("SymInt", "int")  # sizes are constants in a recording

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """The formula, called like the op."""
        return self.formula(self.arguments(*args, **kwargs))

    def called(self, run: Callable[[Any], Any]) -> Callable[..., Any]:
        """`run`, which takes the op's arguments as one object, called like the op."""

        def as_op(*args: Any, **kwargs: Any) -> Any:
            return run(self.arguments(*args, **kwargs))

        return as_op


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel: the launcher starts it, `inspect` compiles it.

    Each `gpu.py` has `plan(arch, arguments) -> (launches, outputs)`. It reads only shapes, strides
    and dtypes, so fake tensors work, too. `run = Launcher(Arguments, plan)` starts the launches.
    """

    kernel: Any
    arguments: Mapping[str, Tensor | int | None]
    """Run-time arguments in kernel order: inputs, integers, outputs. An absent tensor is None, for
    which another kernel is compiled, or else some tensor that is then neither read nor written."""
    constants: Mapping[str, int | float | bool]
    """The kernel's constexpr arguments, including all floats not passed as `float_bits`."""
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int = 1
    vector: int = 16
    """Bytes that a thread can load and store at once, given the strides and widths: `inspect`
    requires the machine code's widest loads and stores to be this wide."""

    @property
    def unspecialised(self) -> frozenset[str]:
        """The arguments whose values need no new compilation, as the kernel declares."""
        said = getattr(self.kernel, "kwargs", None)  # for the interpreter's kernels
        names = self.kernel.do_not_specialize if said is None else said["do_not_specialize"]
        return frozenset(names or ())

    @property
    def options(self) -> dict[str, int | bool]:
        """The launch options for Triton besides the arguments."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": FP_FUSION,
        }

    def start(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


@dataclass(frozen=True)
class Launcher:
    """The Triton implementation of an op: starts the launches that its planner returns."""

    arguments: Callable[..., Any]
    """The spec's dataclass."""
    planner: Callable[[int, Any], tuple[tuple[Launch, ...], Any]]
    """The `plan` of a `gpu.py`."""

    def plan(self, arch: int, *args: Any, **kwargs: Any) -> tuple[tuple[Launch, ...], Any]:
        """The launches for the op's arguments on an architecture, and its outputs."""
        return self.planner(arch, self.arguments(*args, **kwargs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument is a CUDA tensor (under the interpreter, a CPU tensor)."""
        first = (*args, *kwargs.values())[0]
        launches, outputs = self.plan(architecture(first), *args, **kwargs)
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            for launch in launches:  # Triton uses the current device
                launch.start()
        return outputs


INTERPRETED_TILE = 65536
"""Elements per tile under Triton's interpreter, whose time is per operation, whatever its size."""

FP_FUSION = True
"""Set explicitly, since triton 3.10 changes the default and so the last bits of every result."""


def architecture(tensor: Tensor) -> int:
    """The compute capability of a tensor's device: 80, 86, 89, 90, 100 or 120. 0 for CPU tensors,
    which Triton kernels accept only under its interpreter."""
    if tensor.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def float_bits(value: float) -> int:
    """The bits of a float32 as a 32-bit integer: kernels take no floats, and a constexpr would be
    compiled again for each value."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def power_parts(width: int, least: int = 1) -> tuple[int, int]:
    """Cover `width` by one or two powers of two of at least `least`: 40 -> (32, 8), 64 -> (64, 0).

    The second part may extend beyond `width` (30 -> (16, 16) becomes (32, 0)) and is then masked.
    """
    first = max(least, 1 << (width.bit_length() - 1))
    if first >= width:
        return first, 0
    second = max(least, 1 << (width - first - 1).bit_length())
    return (2 * first, 0) if second == first else (first, second)


@dataclass(frozen=True)
class Verdict:
    """The comparison of one tensor of one case; it passes if `error <= allowed`."""

    output: str
    error: float
    allowed: float
    eager_error: float = field(default=float("nan"))

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def max_error(got: Tensor, exact: Tensor) -> float:
    """The largest |got - exact| in float64; a NaN is infinite unless `exact` has one there."""
    got, exact = got.double(), exact.double()
    # equal infinities; NaNs in history that is not written
    same = (got == exact) | (got.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, (got - exact).abs())
    largest = float(difference.max()) if difference.numel() else 0.0
    return float("inf") if largest != largest else largest


def judge(name: str, got: Tensor, eager: Tensor, exact: Tensor) -> Verdict:
    """Compare one output with the error budget of its dtype."""
    eager_error = max_error(eager, exact)
    finite = exact[exact.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    allowed = 2.0 * (eager_error + torch.finfo(got.dtype).eps * scale)
    return Verdict(name, max_error(got, exact), allowed, eager_error)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """In this block `torch.empty` fills its result with NaN, to expose reads before writes."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        memory.fill_uninitialized_memory = filled


def verify(
    spec: KernelSpec,
    run: Callable[..., Any],
    case: Case,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> list[Verdict]:
    """Run one implementation on one case and compare every output with the error budget."""
    place = torch.device(device)
    generator = torch.Generator(device=place).manual_seed(seed)
    inputs = spec.inputs(case, dtype, place, generator)
    with poisoned_memory():
        got = _outputs(spec, run, _copied(inputs))
    eager = _outputs(spec, spec.reference, _copied(inputs))
    exact = _outputs(spec, spec.reference, _copied(inputs, torch.float64))
    return [judge(name, got[name], eager[name], exact[name]) for name in got]


def _outputs(
    spec: KernelSpec, run: Callable[..., Any], inputs: Mapping[str, Any]
) -> dict[str, Tensor]:
    returned = run(**inputs)
    if not isinstance(returned, tuple):
        returned = () if returned is None else (returned,)
    named = {f"output {i}": tensor for i, tensor in enumerate(returned)}
    given = {name: inputs[name] for name in spec.mutates if inputs[name] is not None}
    return named | given


def _copied(inputs: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """New tensors with the same strides; floating-point ones are cast to `dtype`, if given."""

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        target = dtype if dtype is not None and value.is_floating_point() else value.dtype
        fresh = torch.empty_strided(value.shape, value.stride(), dtype=target, device=value.device)
        return fresh.copy_(value)

    return {name: copy(value) for name, value in inputs.items()}
