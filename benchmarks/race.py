"""Times one Triton kernel on one size against its rivals, in turn, after checking each result.

Every size has two yardsticks that no kernel can cheat: a copy of as many bytes as the size must
move (half read, half written) and, if there are products, a plain product of as many FLOPs. Their
times divided by ours are our shares of this GPU's actual bandwidth and matrix rate.
"""

import random
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff.bench.kernels import check, floor_ms, inputs_of, sampler
from fastdiff.kernels.attention import products
from fastdiff.kernels.contract import Case
from fastdiff.kernels.dispatch import Kernel
from fastdiff.kernels.joint_attention import spec as joint

REPLAYS = 21
SIDE = 4096
"""Side of the square factor in a plain product: large enough for any GPU's full rate."""

Run = Callable[[], object]
Inputs = dict[str, Any]


def compiled(dry_run: bool) -> Callable[[Kernel, Inputs], Run]:
    """torch.compile of the reference with static shapes; in a dry run without code generation."""
    torch._dynamo.reset()  # after eight recompilations a function would run eagerly

    def rival(kernel: Kernel, inputs: Inputs) -> Run:
        backend = {"backend": "eager"} if dry_run else {}
        return partial(torch.compile(kernel.spec.reference, dynamic=False, **backend), **inputs)

    return rival


def scaled_dot_product(backend: SDPBackend) -> Callable[[Kernel, Inputs], Run]:
    def rival(kernel: Kernel, inputs: Inputs) -> Run:
        q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
        attend = partial(
            F.scaled_dot_product_attention, q, k, v, inputs["mask"], scale=inputs["scale"]
        )

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return attend()

        return run

    return rival


def joined(backend: SDPBackend) -> Callable[[Kernel, Inputs], Run]:
    """torch's attention over both sequences: they are concatenated, and the result is split."""

    def attend(a: Any) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (a.q, a.k, a.v))
        mask = None if a.mask is None else a.mask.to(q.dtype)
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=a.scale)
        return out.transpose(1, 2)

    return lambda kernel, inputs: partial(joint.formula, joint.Arguments(**inputs), attend)


def rivals(
    kernel: Kernel, which: str, dry_run: bool, inductor: bool
) -> dict[str, Callable[[Kernel, Inputs], Run]]:
    """The rivals of a kernel, by name; each takes the kernel and one set of inputs."""
    if inductor:
        return {"inductor": compiled(dry_run)}
    found: dict[str, Callable[[Kernel, Inputs], Run]] = {
        "eager": lambda kernel, inputs: partial(kernel.spec.reference, **inputs),
    }
    for other in kernel.implementations.keys() - {"reference", "cpu", "triton", which}:
        run = kernel.implementations[other]  # CUDA C++ besides Triton
        found[other] = lambda kernel, inputs, run=run: partial(run(), **inputs)
    attend = {"attention": scaled_dot_product, "joint_attention": joined}.get(kernel.spec.name)
    for backend in ("CUDNN", "FLASH", "EFFICIENT") if attend else ():
        found[f"sdpa {backend.lower()}"] = attend(getattr(SDPBackend, f"{backend}_ATTENTION"))
    if kernel.spec.name == "attention":
        found["products"] = lambda kernel, inputs: partial(products.run, **inputs)
    return found


def copying(source: Tensor) -> Run:
    """A kernel that reads one tensor and writes another. Not `copy_`, which in a CUDA graph is not
    a kernel and only moves 2.7 TB/s on an H200."""
    return partial(torch.mul, source, 1.0, out=torch.empty_like(source))


def yardsticks(
    kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device, sets: int
) -> dict[str, list[Run]]:
    """A copy and a product with a size's bytes and FLOPs, on as many sets of tensors."""
    elements = max(1, kernel.spec.bytes(case, dtype.itemsize) // (2 * dtype.itemsize))
    found: dict[str, list[Run]] = {"copy": []}
    for _ in range(sets):
        source = torch.randn(elements, device=device, dtype=dtype)
        found["copy"].append(copying(source))
    if kernel.spec.products:
        rows = _product_rows(kernel, case)
        side = torch.randn(SIDE, SIDE, device=device, dtype=dtype)
        tall = [torch.randn(rows, SIDE, device=device, dtype=dtype) for _ in range(sets)]
        found["product"] = [partial(torch.mm, one, side) for one in tall]
    return found


def race(
    kernel: Kernel, case: Case, device: torch.device, which: str, dry_run: bool, inductor: bool
) -> dict[str, Any]:
    """Samples of all in milliseconds, or why there are none; the size's bytes, FLOPs and floor.

    `inductor`: only against torch.compile of the reference, which takes seconds to make.

    Raises OutOfBudget if our kernel's result is wrong.
    """
    spec, dtype = kernel.spec, torch.float32 if dry_run else torch.float16
    check(kernel, case, dtype, device, which)
    sets = inputs_of(kernel, case, dtype, device)
    ours = kernel.implementations[which]()
    runs: dict[str, Callable[[], list[Run]]] = {
        "ours": lambda: [partial(ours, **inputs) for inputs in sets]
    }
    for name, rival in rivals(kernel, which, dry_run, inductor).items():
        runs[name] = lambda rival=rival: [rival(kernel, inputs) for inputs in sets]
    for name, yardstick in yardsticks(kernel, case, dtype, device, len(sets)).items():
        runs[name] = lambda yardstick=yardstick: yardstick
    samples: dict[str, Any] = {}
    times: dict[str, list[float] | str] = {}
    for name, build in runs.items():
        try:
            samples[name], times[name] = sampler(build(), device), []
        except Exception as error:  # a backend that does not support this size is a result, too
            times[name] = f"{type(error).__name__}: {str(error)[:200]}"
    order = random.Random(0)
    for _ in range(2 if dry_run else REPLAYS):
        for name in order.sample(list(samples), len(samples)):
            times[name].append(samples[name]())
    return {
        "kernel": spec.name,
        "case": case.name,
        "sizes": case.sizes,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": spec.bytes(case, dtype.itemsize),
        "flops": spec.flops(case),
        "floor_ms": floor_ms(kernel, case, dtype, device),
        "product_flops": 2 * SIDE**2 * _product_rows(kernel, case) if spec.products else 0,
        "samples_ms": times,
    }


def _product_rows(kernel: Kernel, case: Case) -> int:
    """Rows of the product with a size's FLOPs; a multiple of 16 for matrix instructions."""
    return max(16, round(kernel.spec.flops(case) / (2 * SIDE**2) / 16) * 16)


def medians(row: dict[str, Any]) -> dict[str, float]:
    """The milliseconds of each that ran."""
    return {
        name: median(times) for name, times in row["samples_ms"].items() if isinstance(times, list)
    }
