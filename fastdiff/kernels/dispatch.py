"""Registers each kernel once as a torch op and finds its implementations.

`fastdiff::<name>` runs CPU tensors through `cpu.py` (plain torch if that raises `NotNative`, or if
`choices` has measured torch to be faster), CUDA tensors through `gpu.py` (imported on the first
CUDA call, so that triton stays optional) and fake tensors through the reference. An implementation
requested by `implementation(name, which)` runs or raises; there is no silent fallback.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch

from fastdiff.kernels import choices
from fastdiff.kernels.contract import KernelSpec

NAMESPACE = __name__.partition(".")[0]
"""The namespace of our ops in torch, and our package: "fastdiff", or the name of a copy."""


def _load_native() -> Any:
    try:
        return import_module(f"{NAMESPACE}._C")
    except ModuleNotFoundError:  # built without a compiler; any other ImportError is raised
        return None


NATIVE: Any = _load_native()
"""The C++ kernels (`csrc/`), or None if the package was installed without a compiler."""
NOT_BUILT = (
    "fastdiff was installed without its C++ CPU kernels, so a CPU draws about as fast as eager, not"
    " two to three times as fast; install a C++ compiler, then fastdiff again (pip install"
    " --force-reinstall --no-deps --no-cache-dir)"
)
"""The cost of the missing kernels, and how to get them."""


NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class NotNative(ValueError):
    """A C++ kernel does not take these arguments; the message says which, and what it takes."""


def native_dtype(what: str, x: torch.Tensor) -> int:
    """x's dtype as a number of the C++ kernels; NotNative if they do not take x. `what`: the op."""
    number = NATIVE_DTYPES.get(x.dtype)
    if number is not None and NATIVE is not None and x.numel():
        return number
    if NATIVE is None:
        raise NotNative(f"{what}: its C++ kernel was not built; install with a C++ compiler")
    if number is None:
        raise NotNative(f"{what}: got {x.dtype}; the C++ kernel takes {_list(NATIVE_DTYPES)}")
    raise NotNative(f"{what}: got {list(x.shape)}; the C++ kernel takes no empty tensor")


def _list(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names))


def expects(
    what: str, tensor: torch.Tensor | None, like: torch.Tensor, shape: tuple[int, ...]
) -> None:
    """Raise ValueError unless `tensor` (or None) can be read by its address alone: of `like`'s
    dtype and device, of this shape, contiguous (in each row, if there are rows)."""
    if tensor is None:
        return
    beside = tensor.is_contiguous() if tensor.ndim != 2 else tensor.stride(1) == 1
    if tensor.dtype != like.dtype or tensor.device != like.device or tensor.shape != shape:
        raise ValueError(
            f"{what} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; expected"
            f" {like.dtype} {list(shape)} on {like.device}"
        )
    if not beside:
        raise ValueError(f"{what} has strides {tensor.stride()}; make it contiguous")


def address(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def rows(tensor: torch.Tensor | None) -> tuple[int, int]:
    """The address of the rows of [B, D], and their stride in elements; zeros for None."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


@dataclass(frozen=True)
class Kernel:
    """A registered kernel: its contract, its torch op and its implementations by name."""

    spec: KernelSpec
    op: Any
    implementations: dict[str, Callable[[], Callable[..., Any]]]
    """As the op runs them: "cpu" is `plain` if `own` raises NotNative or `choices` says so."""
    own: Callable[..., Any]
    """Only the `run` of `cpu.py`."""
    plain: Callable[..., Any]
    """torch's own ops on a CPU."""
    library: Callable[..., Any]
    """Runs CUDA tensors if there is no Triton kernel: torch's and NVIDIA's libraries."""


KERNELS: dict[str, Kernel] = {}
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def register(
    spec: KernelSpec,
    cpu: Callable[..., Any],
    gpu: str | None = None,
    others: Mapping[str, str] | None = None,
    otherwise: Callable[[Any], Any] | None = None,
    library: Callable[[Any], Any] | None = None,
) -> Any:
    """Define `fastdiff::<spec.name>`; returns the op's overload.

    `cpu` runs CPU tensors; `otherwise` (default: the spec's formula) runs those for which `cpu`
    raises NotNative or `choices` says that torch is faster. If a table names one of an op's
    algorithms, it is passed to `cpu` as the second argument. `gpu` names the module whose `run` is
    the Triton implementation, a Launcher; if None, `library` (default: the formula) runs on CUDA
    tensors.
    `others`: modules with a `run`, by the name of the implementation; they run only when requested
    by `implementation`.
    """
    arguments, plain = spec.arguments, otherwise or spec.formula

    def loader(module: str) -> Callable[[], Callable[..., Any]]:
        return lambda: spec.called(module_of(module).run)

    def on_cuda(*args: Any, **kwargs: Any) -> Any:
        return implementations["triton"]()(*args, **kwargs)

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        given = arguments(*args, **kwargs)
        who = choices.LIBRARY if NATIVE is None else choices.runs(spec, given, NATIVE.isa())
        if who == choices.LIBRARY:
            return plain(given)
        try:
            return cpu(given) if who == choices.OWN else cpu(given, who)
        except NotNative:
            return plain(given)

    _LIBRARY.define(spec.name + spec.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(spec.name, on_cpu, "CPU")
    by_library, fake = spec.called(library or spec.formula), spec.called(spec.fake or spec.formula)
    _LIBRARY.impl(spec.name, on_cuda if gpu else by_library, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{spec.name}", fake, lib=_LIBRARY)
    implementations: dict[str, Callable[[], Callable[..., Any]]] = {
        "reference": lambda: spec.reference,
        "cpu": lambda: on_cpu,
    }
    if gpu is not None:
        implementations["triton"] = lambda: module_of(gpu).run
    implementations |= {which: loader(module) for which, module in (others or {}).items()}
    op = getattr(getattr(torch.ops, NAMESPACE), spec.name).default
    KERNELS[spec.name] = Kernel(
        spec, op, implementations, spec.called(cpu), spec.called(plain), by_library
    )
    return op


@cache
def module_of(name: str) -> Any:
    """Import a module of Triton kernels and hash their sources, called functions before callers.

    Triton's cache is keyed by that hash. Up to 3.7 it includes the constants of called functions
    only if these were hashed before, so without this order it could differ between processes.
    """
    module = import_module(name)
    for function in list(vars(module).values()):  # in order: imported functions come first
        if hasattr(function, "cache_key"):
            if function.__module__ != name:
                module_of(function.__module__)
            _ = function.cache_key
    return module


def kernel_of(op: Any) -> Kernel | None:
    """The kernel that a dispatched op calls; None if the op is not one of ours."""
    return KERNELS[op.name().partition("::")[2]] if op.namespace == NAMESPACE else None


def all_kernels() -> dict[str, Kernel]:
    """Every kernel by name: `KERNELS` after each kernel's folder is imported."""
    for module in iter_modules([str(Path(__file__).parent)]):
        if module.ispkg:
            import_module(f"{__package__}.{module.name}")
    return KERNELS


def implementation(name: str, which: str) -> Callable[..., Any]:
    """The implementation `which` of a kernel ("reference", "cpu", "triton", "cuda").

    When called, it runs or raises ValueError if it does not support its arguments: tensors on
    another device, of another dtype, or other options.

    Raises:
        ValueError: the kernel has no implementation of that name.
    """
    kernel = KERNELS[name]
    if which not in kernel.implementations:
        valid = ", ".join(kernel.implementations)
        raise ValueError(f"{name} has no implementation {which!r}; it has: {valid}")
    run = kernel.own if which == "cpu" else kernel.implementations[which]()
    # the reference takes everything, others check for themselves
    if which not in ("cpu", "triton"):
        return run

    @wraps(run)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_request(kernel.spec, which, (*args, *kwargs.values()))
        return run(*args, **kwargs)

    return checked


def _check_request(spec: KernelSpec, which: str, arguments: Iterable[Any]) -> None:
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    devices = {tensor.device.type for tensor in tensors}
    taken = {"cpu"} if which == "cpu" or interpreted() else {"cuda"}
    if not devices <= taken:
        raise ValueError(
            f"{spec.name}: got tensors on {_list(sorted(devices))}; {which!r} takes those on"
            f" {_list(taken)}"
        )
    if which != "triton":
        return
    first, *others = (tensor.dtype for tensor in tensors if tensor.is_floating_point())
    wrong = [first] if first not in spec.dtypes else []
    wrong += [dtype for dtype in others if dtype not in (*spec.dtypes, torch.float32)]
    if wrong:
        raise ValueError(f"{spec.name}: got {wrong[0]}; {which!r} takes {_list(spec.dtypes)}")


def interpreted() -> bool:
    """Whether Triton's kernels run under its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
