"""`contract.verify` for several implementations of a case, and which cases are cheap."""

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.contract import (
    Case,
    KernelSpec,
    Verdict,
    _copied,
    _outputs,
    judge,
    poisoned_memory,
)


@lru_cache(maxsize=2)  # enough if tests take all implementations of a case in a row
def truth(
    spec: KernelSpec, case: Case, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of a case; outputs of the reference in `dtype` and in float64, by name."""
    inputs = spec.inputs(case, dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    eager = _outputs(spec, spec.reference, _copied(inputs))
    exact = _outputs(spec, spec.reference, _copied(inputs, torch.float64))
    return inputs, eager, exact


def hold(
    spec: KernelSpec, run: Callable[..., Any], case: Case, dtype: torch.dtype
) -> list[Verdict]:
    """Run one implementation on one case and hold every output against the error budget."""
    inputs, eager, exact = truth(spec, case, dtype)
    with poisoned_memory():
        got = _outputs(spec, run, _copied(inputs))
    return [judge(name, got[name], eager[name], exact[name]) for name in got]


def cost(spec: KernelSpec, case: Case) -> float:
    """Roughly the time that torch takes for a case, in nanoseconds."""
    return spec.bytes(case, 4) + spec.flops(case) / 20


def small(spec: KernelSpec, case: Case) -> bool:
    """Whether a case takes at most milliseconds: every edge case, and the demo's sizes."""
    return cost(spec, case) < 2_000_000


def asked(spec: KernelSpec, case: Case) -> Hashable:
    """The options of a case: all but its sizes (capital letters) and values (floats)."""
    return spec.name, *(
        (name, None if name[0].isupper() or isinstance(value, float) else value)
        for name, value in sorted(case.sizes.items())
    )
