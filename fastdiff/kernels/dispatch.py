"""Registers each kernel once as a torch op and finds its implementations.

`fastdiff::<name>` runs on CPU tensors through `cpu.py`, on CUDA tensors through `gpu.py` (imported
on the first CUDA call, so that triton stays optional) and on fake tensors through the reference.
An explicit `implementation(name, which)` that cannot run raises; nothing falls back silently.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch

from fastdiff.kernels.contract import KernelSpec


def _load_native() -> Any:
    try:
        return import_module("fastdiff._C")
    except ModuleNotFoundError:  # built without a compiler; any other ImportError is shown
        return None


NATIVE: Any = _load_native()
"""The C++ kernels (`csrc/`), or None where the package was installed without a compiler."""
NOT_BUILT = (
    "fastdiff was installed without its C++ CPU kernels, so a CPU draws about as fast as eager, not"
    " two to three times as fast; install a C++ compiler, then fastdiff again (pip install"
    " --force-reinstall --no-deps --no-cache-dir)"
)
"""What that costs, and how to get them."""


NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def expects(
    what: str, tensor: torch.Tensor | None, like: torch.Tensor, shape: tuple[int, ...]
) -> None:
    """Raise ValueError unless `tensor` (or None) can be read by its address alone: like `like` in
    dtype and device, of this shape, its elements side by side (a row's, where there are rows)."""
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


@dataclass(frozen=True)
class Kernel:
    """A registered kernel: its contract, its torch op and its implementations by name."""

    spec: KernelSpec
    op: Any
    implementations: dict[str, Callable[[], Callable[..., Any]]]


KERNELS: dict[str, Kernel] = {}
_LIBRARY = torch.library.Library("fastdiff", "DEF")


def register(
    spec: KernelSpec,
    cpu: Callable[..., Any],
    gpu: str | None = None,
    others: Mapping[str, str] | None = None,
) -> Any:
    """Define `fastdiff::<spec.name>`; returns the op's overload.

    `cpu` runs CPU tensors. `gpu` names the module whose `run` is the Triton implementation; None
    means that the reference (a library call such as a cuDNN convolution) runs on CUDA tensors.
    `others`: modules with a `run`, by the name of the implementation; only `implementation` asks
    for them.
    """

    def loader(module: str) -> Callable[[], Callable[..., Any]]:
        return lambda: import_module(module).run

    def on_cuda(*args: Any, **kwargs: Any) -> Any:
        return implementations["triton"]()(*args, **kwargs)

    _LIBRARY.define(spec.name + spec.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(spec.name, cpu, "CPU")
    _LIBRARY.impl(spec.name, on_cuda if gpu else spec.reference, "CUDA")
    torch.library.register_fake(f"fastdiff::{spec.name}", spec.fake or spec.reference, lib=_LIBRARY)
    modules = ({"triton": gpu} if gpu else {}) | dict(others or {})
    implementations = {"reference": lambda: spec.reference, "cpu": lambda: cpu}
    implementations |= {which: loader(module) for which, module in modules.items()}
    op = getattr(torch.ops.fastdiff, spec.name).default
    KERNELS[spec.name] = Kernel(spec, op, implementations)
    return op


def all_kernels() -> dict[str, Kernel]:
    """Every kernel by name: `KERNELS` once each kernel's folder has been imported."""
    for module in iter_modules([str(Path(__file__).parent)]):
        if module.ispkg:
            import_module(f"fastdiff.kernels.{module.name}")
    return KERNELS


def implementation(name: str, which: str) -> Callable[..., Any]:
    """The implementation `which` of a kernel ("reference", "cpu", "triton", "cuda"), or ValueError
    where it has none of that name."""
    kernel = KERNELS[name]
    if which not in kernel.implementations:
        valid = ", ".join(kernel.implementations)
        raise ValueError(f"{name} has no implementation {which!r}; it has: {valid}")
    return kernel.implementations[which]()
