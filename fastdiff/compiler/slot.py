"""A module whose calls run on a compact network for as long as that gives the same result.

The slot sits where `nn.Module.compile()` puts a compiled call (`_compiled_call_impl`): the module
stays the object, class and state_dict it was, and a deepcopy or pickle of it is plain diffusers.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reason = self._obstacle(args)
        if reason is None:
            try:
                result = self.kind.call(self.network, *args, **kwargs)
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
        try:
            self.kind.borrow(self.module, Loan(self.module, rehearsal=True))
        except Unsupported as unsupported:
            self.refused = str(unsupported)
        else:
            self.refused, self.loan = None, Loan(self.module)
            self.network = self.kind.borrow(self.module, self.loan)

    def release(self) -> None:
        """Give the weights back."""
        if self.loan is not None:
            self.loan.end()
        self.network = self.loan = None

    def _obstacle(self, args: tuple[Any, ...]) -> str | None:
        """What, apart from the arguments' meaning, keeps this call from the compact network."""
        module = self.module
        if module.training:
            return "the module is in training mode"
        if torch.is_grad_enabled() and (
            next(module.parameters()).requires_grad
            or any(isinstance(a, Tensor) and a.requires_grad for a in args)
        ):
            return "gradients are enabled; call it under torch.no_grad()"
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return "it is being traced"
        if torch.is_autocast_enabled(next(module.parameters()).device.type):
            return "autocast is on"
        if self.loan is None or not self.loan.intact():
            self.take()
        if self.loan is None:
            return self.refused
        return "a hook wraps one of its modules" if self.loan.hooked() else None


def slot_of(module: Any) -> Slot | None:
    """The slot that stands for a module's calls, or None."""
    slot = getattr(module, "__dict__", {}).get("_compiled_call_impl")
    return slot if isinstance(slot, Slot) else None
