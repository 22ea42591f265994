"""A module whose calls run on a compact network for as long as that gives the same result.

The slot sits where `nn.Module.compile()` puts a compiled call (`_compiled_call_impl`): the module
stays the object, class and state_dict it was, and a deepcopy or pickle of it is plain diffusers.
"""

import threading
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._pytree import tree_leaves

from fastdiff.models.borrow import Loan, Unsupported


@dataclass(frozen=True)
class Kind:
    """How one class of module is taken over."""

    borrow: Callable[[nn.Module, Loan], Any]
    """(module, loan) -> network on borrowed weights; raises Unsupported."""
    call: Callable[..., Any]
    """(network, *the module's own arguments) -> the module's own output; raises Unsupported."""


@dataclass
class Slot:
    """Stands for `module(...)`: fast where exact, else the module's own call, the reason noted."""

    name: str
    module: nn.Module
    kind: Kind
    network: Any = None
    loan: Loan | None = None
    refused: str | None = None
    """Why the module as it is now cannot be borrowed."""
    eager: Counter[str] = field(default_factory=Counter)
    """Calls that ran eagerly since compile, by reason."""
    fast: int = 0
    """Calls that ran on the compact network since compile."""
    _taking: Any = field(default_factory=threading.Lock, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reason = self._obstacle(tree_leaves((args, kwargs)))
        network = None if reason else self._ready()
        if reason is None and network is None:
            reason = self.refused
        if reason is None:
            try:
                result = self.kind.call(network, *args, **kwargs)
            except Unsupported as unsupported:
                reason = str(unsupported)
            else:
                self.fast += 1
                return result
        if reason not in self.eager:
            warnings.warn(
                f"fastdiff: {self.name} runs eagerly: {reason}", RuntimeWarning, stacklevel=3
            )
        self.eager[reason] += 1
        return self.module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    def take(self) -> None:
        """Borrow the module's weights as it is now; on refusal leave it as it was."""
        self.release()
        with torch.inference_mode(False), torch.no_grad():
            try:
                self.kind.borrow(self.module, Loan(self.module, rehearsal=True))
            except Unsupported as unsupported:
                self.refused = str(unsupported)
                return
            self.refused, self.loan = None, Loan(self.module)
            try:
                self.network = self.kind.borrow(self.module, self.loan)
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Give the weights back."""
        loan, self.loan, self.network = self.loan, None, None
        if loan is not None:
            with torch.inference_mode(False), torch.no_grad():
                loan.end()

    def _ready(self) -> Any:
        """The network on the module as it is now, or None where that is refused."""
        with self._taking:
            if self.loan is None or self.loan.hooked() or not self.loan.intact():
                self.take()
            return self.network

    def _obstacle(self, leaves: list[Any]) -> str | None:
        """What in how the module is called, rather than in what it is, asks for an eager call."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if torch.is_grad_enabled() and (
            any(parameter.requires_grad for parameter in self.module.parameters())
            or any(tensor.requires_grad for tensor in tensors)
        ):
            return "gradients are enabled; call it under torch.no_grad()"
        if (
            torch.compiler.is_compiling()
            or torch._C._get_tracing_state() is not None
            or torch._C._len_torch_dispatch_stack() > 0
            or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors)
        ):
            return "it is traced or counted"
        if tensors and torch.is_autocast_enabled(tensors[0].device.type):
            return "autocast is on"
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
            return "global forward hooks are set"
        return None


def slot_of(module: Any) -> Slot | None:
    """The slot that stands for a module's calls, or None."""
    slot = getattr(module, "__dict__", {}).get("_compiled_call_impl")
    return slot if isinstance(slot, Slot) else None
