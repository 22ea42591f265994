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
    _state: tuple[int, ...] = ()

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
        loan = Loan(self.module)
        try:
            self.network = self.kind.borrow(self.module, loan)
        except Unsupported as unsupported:
            loan.end()
            self.refused = str(unsupported)
            self._state = _state(self.module)
        else:
            self.loan, self.refused = loan, None

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
        changed = _state(module) != self._state if self.loan is None else not self.loan.intact()
        if changed:
            self.take()
        if self.loan is None:
            return self.refused
        return "a hook wraps one of its modules" if self.loan.hooked() else None


def _state(module: nn.Module) -> tuple[int, ...]:
    """Which modules and memory the module is made of now."""
    return (
        *(id(child) for child in module.modules()),
        *(id(getattr(child, "processor", None)) for child in module.modules()),
        *(parameter.data_ptr() for parameter in module.parameters()),
    )


def slot_of(module: Any) -> Slot | None:
    """The slot that stands for a module's calls, or None."""
    slot = getattr(module, "__dict__", {}).get("_compiled_call_impl")
    return slot if isinstance(slot, Slot) else None
