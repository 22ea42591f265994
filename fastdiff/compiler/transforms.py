"""Detects when torch traces or transforms a call; then only the module's own call is right."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fastdiff.kernels.observe import is_counting, observed

_PLAIN = (Tensor, nn.Parameter)
_TRACED = "it is traced or counted"


def transformed(leaves: Sequence[Any]) -> str | None:
    """Why a call with these arguments cannot use our kernels; None if it can."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms it (grad, jvp, vmap, functionalize)"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are taken"
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return _TRACED
    if (observed() and not is_counting()) or _watched():
        return _TRACED
    if any(hasattr(leaf, "__torch_function__") and type(leaf) not in _PLAIN for leaf in leaves):
        return _TRACED  # other tensor classes, and torch.fx's proxies
    return None


def _watched() -> bool:
    """Whether a function mode, other than torch's default device, sees this thread's calls."""
    if torch._C._len_torch_function_stack() == 0:
        return False
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
