"""Runs a module's calls on a compact network for as long as that gives the same result.

The slot sits where `nn.Module.compile()` puts a compiled call (`_compiled_call_impl`). The module
keeps its identity, class and state_dict; a deepcopy or pickle of it is plain diffusers. A second
reference to the slot stays on the module, since `nn.Module.compile()` overwrites the first.
"""

import copy
import logging
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._pytree import tree_leaves

from fastdiff.compiler.promotion import (
    Promotion,
    as_type,
    first_overflow,
    overflowed,
    scaled_alike,
    version_of,
)
from fastdiff.compiler.transforms import transformed
from fastdiff.families import Kind
from fastdiff.models.borrow import Loan, Unsupported
from fastdiff.models.state import Homes
from fastdiff.models.watch import Unwritten

logger = logging.getLogger(__name__)
_CALL, _KEPT = "_compiled_call_impl", "_fastdiff_slot"


@dataclass
class Slot:
    """Replaces `module(...)`: fast if exact, else the module's own call, for a noted reason."""

    name: str
    module: nn.Module
    kind: Kind
    network: Any = None
    loan: Loan | None = None
    refused: str | None = None
    """Why the module cannot be borrowed in its present state, if so."""
    eager: Counter[str] = field(default_factory=Counter)
    """Calls that ran eagerly since compile, by reason."""
    fast: int = 0
    """Calls that ran on the compact network since compile."""
    promotion: Promotion | None = None
    """The float32 copy that is used since float16 overflowed."""
    promoted: list[str] = field(default_factory=list)
    """The layers that overflowed since compile."""
    kernels: Any = None
    """The kernels to wait for before the first call: `ahead.Kernels`."""
    ended: bool = False
    """Whether the module was restored; the slot then borrows nothing any more."""
    _homes: Homes = field(default_factory=dict, repr=False)
    _unwritten: Unwritten | None = None
    """Detects writes to the weights while a frozen network (an engine) is in use."""
    _taking: Any = field(default_factory=threading.Lock, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # must come first: dynamo traces neither locks nor loggers
        if torch.compiler.is_compiling():
            return self.module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        try:
            network = self.offer(args, kwargs, scale=self.kind.scale(*args, **kwargs))
            result = self._guarded(network, args, kwargs)
        except Unsupported as unsupported:
            reason = str(unsupported)
        else:
            self.fast += 1
            return result
        if reason not in self.eager:
            logger.warning("fastdiff: %s runs eagerly: %s", self.name, reason)
        self.eager[reason] += 1
        with self._taking:
            if self.loan is not None and self.loan.waiting:
                self.release()  # the module's own layers need all weights on its device
        return self.module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __bool__(self) -> bool:
        # peft and others take a true value for torch.compile's, and then refuse to hotswap
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or pickle of the module has no slot."""
        return type(None), ()

    def put(self) -> None:
        """Take over the module's calls."""
        vars(self.module).update({_CALL: self, _KEPT: self})

    def offer(self, *given: Any, scale: float = 1.0) -> Any:
        """The network for a call with the tensors in `given`, on the module as it is now.

        `scale` multiplies the module's LoRA adapters until the next offer.

        Raises Unsupported if only the module's own call gives the same result.
        """
        reason = "it was restored" if self.ended else self._obstacle(tree_leaves(given))
        network = None if reason else self._ready(scale)
        if network is None:
            raise Unsupported(reason or self.refused or "")
        if self.kernels is not None:
            self.kernels.wait()
        if self.promotion is not None:
            same = self.promotion.version == self.version
            if same and self.promotion.unwritten.values_hold():
                scaled_alike(self.module, self.promotion.module)
                return self.promotion.network
            self.promotion = None
        return network

    def promote(self, where: str, scale: float = 1.0) -> None:
        """Use a float32 copy until the weights change, since float16 overflowed in `where`."""
        module, version = copy.deepcopy(self.module).float(), self.version
        scaled_alike(self.module, module)
        with torch.inference_mode(False), torch.no_grad():
            loan = Loan(module, offload=self.kind.offload)
            network = (self.kind.exact or self.kind.borrow)(module, loan)
            loan.refresh(scale)
        unwritten = Unwritten(self.module.parameters())
        self.promotion = Promotion(network, module, version, unwritten)
        if where not in self.promoted:
            self.promoted.append(where)

    def _guarded(self, network: Any, args: Any, kwargs: Any) -> Any:
        """Run the network; if float16 overflows, run it in float32."""
        if self.promotion is None:
            result = self.kind.call(network, *args, **kwargs)
            half = self.loan is not None and self.loan.dtype == torch.float16
            watched = self.kind.guarded and half
            if not watched or not overflowed(result) or overflowed((args, kwargs)):
                return result
            self.promote(
                first_overflow(self.module, lambda: self.kind.call(network, *args, **kwargs))
            )
        assert self.promotion is not None
        args, kwargs = as_type((args, kwargs), torch.float16, torch.float32)
        result = self.kind.call(self.promotion.network, *args, **kwargs)
        return as_type(result, torch.float32, torch.float16)

    @property
    def version(self) -> int:
        """A number that grows with every change of the weights that autograd can see."""
        return self.epoch + version_of(self.module)

    @property
    def epoch(self) -> int:
        """A number that grows when weights are borrowed again, or LoRA adapters merged again."""
        return 0 if self.loan is None else self.loan.epoch

    def take(self, scale: float = 1.0) -> None:
        """Borrow the module's weights as they are now; on refusal leave the module unchanged."""
        self.release()
        with torch.inference_mode(False), torch.no_grad():
            try:
                rehearsed = Loan(self.module, rehearsal=True)
                self.kind.borrow(self.module, rehearsed)
            except Unsupported as unsupported:
                self.refused = str(unsupported)
                return
            self.refused = None
            own, offload = self._homes, self.kind.offload
            self.loan = Loan(self.module, homes=own, rehearsed=rehearsed, offload=offload)
            if self.kind.frozen:
                self._unwritten = Unwritten(self.module.parameters())
            try:
                self.network = self.kind.borrow(self.module, self.loan)
                self.loan.refresh(scale)
            except BaseException:
                self.release()
                raise

    def end(self) -> None:
        """Give the weights back for good, and restore the module's own call."""
        self.ended = True
        self.release()
        names = vars(self.module)
        for name in (_CALL, _KEPT):  # keep a call that other code put there
            if names.get(name) is self:
                del names[name]

    def release(self) -> None:
        """Give the weights back."""
        self.network, self.promotion, self._unwritten = None, None, None
        if self.loan is not None:
            with torch.inference_mode(False), torch.no_grad():
                self.loan.end()
            self.loan = None

    def _ready(self, scale: float) -> Any:
        """The network on the module as it is now; None if it cannot be borrowed."""
        with self._taking:
            if self.loan is None or not self._holds(self.loan, scale):
                self.take(scale)
            return self.network

    def _holds(self, loan: Loan, scale: float) -> bool:
        """Whether the loan is valid, if need be after merging LoRA adapters again in place."""
        before = loan.epoch
        if not loan.intact():
            return False
        if self.kind.frozen and loan.epoch != before:  # an engine has only one state
            return False
        if self._unwritten is not None and not self._unwritten.hold():
            return False
        try:
            loan.refresh(scale)
        except Unsupported:
            return False
        return True

    def _obstacle(self, leaves: list[Any]) -> str | None:
        """Why this way of calling the module needs an eager call, if it does."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if torch.is_grad_enabled():
            if any(tensor.requires_grad for tensor in tensors):
                return "its inputs ask for gradients"
            if any(parameter.requires_grad for parameter in self.module.parameters()):
                return "gradients are enabled; call it under torch.no_grad()"
        if reason := transformed(leaves):
            return reason
        if tensors and torch.is_autocast_enabled(tensors[0].device.type):
            return "autocast is on"
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
            return "global forward hooks are set"
        return None


def slot_of(module: Any) -> Slot | None:
    """The slot that runs a module's calls, or None."""
    slot = getattr(module, "__dict__", {}).get(_CALL)
    return slot if isinstance(slot, Slot) else None


def kept_slot(module: Any) -> Slot | None:
    """The slot that was made for a module, even if another call has replaced it; None if there
    is none, or it has ended."""
    slot = getattr(module, "__dict__", {}).get(_KEPT)
    return slot if isinstance(slot, Slot) and slot.module is module else None


def waiting_notes(slot: Slot) -> list[str]:
    """The report's text for weights that wait in host memory."""
    loan = slot.loan
    if loan is None or not slot.kind.offload:
        return []
    if not loan.offloads:
        return ["offload_hoisted moves nothing: its weights are in host memory already"]
    adapted = "" if loan.waiting else ", those with adapters stay on the device"
    return [f"{loan.waiting / 1e9:.3g} GB of its weights wait in host memory{adapted}"]
