"""What a kernel is: one data object from which tests, benches, `inspect` and export follow.

Correctness is an error budget against the same mathematics in float64, never a tolerance:

    err(ours, exact) <= 2 * (err(eager, exact) + eps(dtype) * max|exact|)

where err is the largest absolute difference, `eager` is the plain-torch reference run in the
kernel's own dtype and `exact` the same reference run in float64 on the same (rounded) inputs.
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
    Y and X rows and columns of a picture. Everything else is an option of the op itself.
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
    """A dataclass of the op's arguments, from which its schema follows. The functions of an op's
    folder take one of them; whoever asks for the op gives its fields, as to the op itself. Each
    call makes one: with slots and not frozen, which takes three times as long."""
    formula: Callable[[Any], Any]
    """The op in plain torch, in the dtype it is given."""
    inputs: Callable[[Case, torch.dtype, torch.device, torch.Generator], dict[str, Any]]
    """Keyword arguments of the op for a case, strided as the models stride them."""
    cases: tuple[Case, ...]
    bytes: Callable[[Case, int], int]
    """Least DRAM traffic of a case in bytes, given the element size: every byte of the inputs that
    is needed and every byte of the outputs, each once. Counted, in tests, from the loads and stores
    of the Triton kernel; from the tensors where a library computes."""
    flops: Callable[[Case], int]
    """Of a case: 2 for each multiply-add of a matrix product; without products the floating-point
    operations on each element of the output, an exponential or a division counting as one."""
    work: Callable[[Any], tuple[str, tuple[int, ...]]] | None = None
    """Of a product: what `choices` compares calls by, (kind, sizes). None: no product."""
    fake: Callable[[Any], Any] | None = None
    """Shapes and strides of the outputs for tracing; None: the formula can be traced."""
    mutates: tuple[str, ...] = ()
    """Arguments written in place; the contract compares them like outputs."""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    products: bool = False
    """Whether the Triton kernel multiplies matrices: Triton's interpreter multiplies the raw bits
    of bfloat16, so there the kernel is tested in the other dtypes only."""

    @property
    def schema(self) -> str:
        """torch's, after the name, e.g. "(Tensor x, float eps) -> Tensor"."""

        def prototype() -> None: ...

        described: Any = prototype
        described.__signature__ = signature(self.arguments).replace(
            return_annotation=signature(self.formula).return_annotation
        )
        inferred = torch.library.infer_schema(described, mutates_args=self.mutates)
        return inferred.replace("SymInt", "int")  # what an op is asked for is part of a recording

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """The formula, called as the op is."""
        return self.formula(self.arguments(*args, **kwargs))

    def called(self, run: Callable[[Any], Any]) -> Callable[..., Any]:
        """`run`, which takes the op's arguments as one, called as the op is."""

        def as_op(*args: Any, **kwargs: Any) -> Any:
            return run(self.arguments(*args, **kwargs))

        return as_op


@dataclass(frozen=True)
class Launch:
    """One start of a Triton kernel: what the launcher starts is what `inspect` compiles.

    Each `gpu.py` has `plan(arch, arguments) -> (launches, outputs)`; it looks only at shapes,
    strides and dtypes, so fake tensors will do, and `run = Launcher(Arguments, plan)` starts what
    it returns.
    """

    kernel: Any
    arguments: Mapping[str, Tensor | int | None]
    """Run-time arguments in kernel order: inputs, integers, outputs. An absent tensor is None, for
    which the kernel is compiled anew, or another one that is not read or written in its place."""
    constants: Mapping[str, int | float | bool]
    """The kernel's constexpr arguments; every float is one of them, or `float_bits`."""
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int = 1
    vector: int = 16
    """Bytes that a thread can load and store at once, as the strides and widths allow: what
    `inspect` holds the widest loads and stores of the machine code to."""

    @property
    def unspecialised(self) -> frozenset[str]:
        """Names of the arguments whose values compile nothing anew, as the kernel says it."""
        said = getattr(self.kernel, "kwargs", None)  # of the interpreter's kernels
        names = self.kernel.do_not_specialize if said is None else said["do_not_specialize"]
        return frozenset(names or ())

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton is told beside the arguments."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": FP_FUSION,
        }

    def start(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


@dataclass(frozen=True)
class Launcher:
    """The Triton implementation of an op: starts what its planner returns."""

    arguments: Callable[..., Any]
    """The spec's."""
    planner: Callable[[int, Any], tuple[tuple[Launch, ...], Any]]
    """`plan` of a `gpu.py`."""

    def plan(self, arch: int, *args: Any, **kwargs: Any) -> tuple[tuple[Launch, ...], Any]:
        """The launches for the op's own arguments on an architecture, and its outputs."""
        return self.planner(arch, self.arguments(*args, **kwargs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The op's own arguments, the first one a CUDA tensor (CPU: under the interpreter)."""
        first = (*args, *kwargs.values())[0]
        launches, outputs = self.plan(architecture(first), *args, **kwargs)
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            for launch in launches:  # Triton starts them on the current device
                launch.start()
        return outputs


INTERPRETED_TILE = 65536
"""Elements of a tile under Triton's interpreter, which takes its time for an operation and not for
its size."""

FP_FUSION = True
"""Given explicitly: triton 3.10 changes the default, and with it the last bits of every result."""


def architecture(tensor: Tensor) -> int:
    """Compute capability of a tensor's device as 80, 86, 89, 90, 100, 120; 0 for CPU tensors, which
    Triton kernels take only under its interpreter."""
    if tensor.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def float_bits(value: float) -> int:
    """The bits of a float32 as an integer of 32: kernels take no floats, and are compiled anew for
    each value of a constexpr."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def power_parts(width: int, least: int = 1) -> tuple[int, int]:
    """Cover `width` by one or two powers of two of at least `least`: 40 -> (32, 8), 64 -> (64, 0).

    The second part may reach beyond `width` (30 -> (16, 16) becomes (32, 0)) and is then masked.
    """
    first = max(least, 1 << (width.bit_length() - 1))
    if first >= width:
        return first, 0
    second = max(least, 1 << (width - first - 1).bit_length())
    return (2 * first, 0) if second == first else (first, second)


@dataclass(frozen=True)
class Verdict:
    """One compared tensor of one case: `error <= allowed` passes."""

    output: str
    error: float
    allowed: float
    eager_error: float = field(default=float("nan"))

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def max_error(got: Tensor, exact: Tensor) -> float:
    """Largest |got - exact| in float64; a NaN where `exact` has none counts as infinite."""
    got, exact = got.double(), exact.double()
    same = (got == exact) | (got.isnan() & exact.isnan())  # equal infinities, untouched history
    difference = torch.where(same, 0.0, (got - exact).abs())
    largest = float(difference.max()) if difference.numel() else 0.0
    return float("inf") if largest != largest else largest


def judge(name: str, got: Tensor, eager: Tensor, exact: Tensor) -> Verdict:
    """Hold one output against the budget of its own dtype."""
    eager_error = max_error(eager, exact)
    finite = exact[exact.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    allowed = 2.0 * (eager_error + torch.finfo(got.dtype).eps * scale)
    return Verdict(name, max_error(got, exact), allowed, eager_error)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it `torch.empty` is filled with NaN, so that a read before a write is seen."""
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
    """Run one implementation on one case and hold every output against the error budget."""
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
    return named | {name: inputs[name] for name in spec.mutates}


def _copied(inputs: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Fresh tensors with the same strides, floating ones cast to `dtype` when it is given."""

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        target = dtype if dtype is not None and value.is_floating_point() else value.dtype
        fresh = torch.empty_strided(value.shape, value.stride(), dtype=target, device=value.device)
        return fresh.copy_(value)

    return {name: copy(value) for name, value in inputs.items()}
