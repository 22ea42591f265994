"""Parameters in the kernels' memory, and what those see who ask modules for their state.

Savers take parameters that share a storage for one and drop the rest, or refuse strides. So a lent
parameter has a storage of its own, cut out of the kernels' memory, where its numbers lie in a row;
where they do not, state dicts, pickles and deepcopies hold a copy, laid out as before. That takes
the memory of those weights once more, but only while somebody keeps it; to give the weights back
instead would cost a new recording at the next use, and PEFT asks for state dicts to swap adapters.
What is written into the copy in a state dict counts as written into the parameter.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_KEY, _GETSTATE = "fastdiff", "__getstate__"


def apart(view: Tensor) -> Tensor:
    """The same memory with a storage of its own, where the numbers of `view` lie in a row."""
    if not view.is_contiguous() or view.device.type == "meta":
        return view
    start = view.storage_offset() * view.element_size()
    storage = view.untyped_storage()[start : start + view.nbytes]
    return torch.empty(0, dtype=view.dtype, device=view.device).set_(
        storage, 0, view.shape, view.stride()
    )


@dataclass(frozen=True)
class Lent:
    """A parameter whose memory the runtime reads."""

    parameter: Tensor
    address: int
    """Where it lies, for as long as nobody else moves it."""
    stride: tuple[int, ...] | None = None
    """Of the memory that it gets back; None: it was left where it is."""

    def memory(self) -> Tensor:
        """Memory as the parameter had it before."""
        like = self.parameter
        with torch.inference_mode(like.is_inference()):
            return torch.empty_strided(
                like.shape, self.stride or like.stride(), dtype=like.dtype, device=like.device
            )

    def give_back(self, home: Tensor | None) -> None:
        """Move the parameter to `home`, or to memory of its own."""
        if self.stride is None or self.parameter.data_ptr() != self.address:
            return
        own = self.memory() if home is None else home
        with torch.inference_mode(self.parameter.is_inference()):
            self.parameter.data = own.copy_(self.parameter.detach())


class Copies:
    """What state dicts hold of lent parameters, for as long as somebody keeps it."""

    def __init__(self) -> None:
        self._copies: dict[int, list[_Copy]] = {}

    def add(self, parameter: Tensor, tensor: Tensor) -> None:
        self._copies.setdefault(id(parameter), []).append(_Copy(parameter, tensor))

    def collect(self) -> None:
        """Take over what was written into the copies."""
        for key in [*self._copies]:
            self._copies[key] = [copy for copy in self._copies[key] if copy.collect()]
            if not self._copies[key]:
                del self._copies[key]

    def parted(self) -> None:
        """Parameters have moved: those whose memory a copy was are elsewhere now."""
        for copies in self._copies.values():
            for copy in copies:
                copy.parted()

    def of(self, parameter: Tensor) -> Tensor | None:
        """The newest copy of a parameter, which takes over what was written into it."""
        copies = self._copies.get(id(parameter), [])
        living = [copy.tensor() for copy in copies if copy.collect()]
        return living[-1] if living else None


class _Copy:
    def __init__(self, parameter: Tensor, tensor: Tensor) -> None:
        self.parameter, self.tensor = weakref.ref(parameter), weakref.ref(tensor)
        self.parted()

    def parted(self) -> None:
        """Note where the parameter is, and that the copy holds what it holds."""
        parameter, tensor = self.parameter(), self.tensor()
        if parameter is not None and tensor is not None:
            self._address, self._version = parameter.data_ptr(), tensor._version

    def collect(self) -> bool:
        """Whether the copy still counts; not once others have moved the parameter."""
        parameter, tensor = self.parameter(), self.tensor()
        if parameter is None or tensor is None or parameter.data_ptr() != self._address:
            return False
        if tensor._version != self._version and tensor.data_ptr() != self._address:
            with torch.no_grad():
                parameter.data.copy_(tensor)
        self._version = tensor._version
        return True


class Gate:
    """Stands before the state of lent parameters' modules."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        lent: Callable[[Tensor], Lent | None],
        copies: Copies,
    ) -> None:
        self._modules: list[Any] = list(modules)
        self._lent, self._copies = lent, copies
        for module in self._modules:
            module._state_dict_hooks[_KEY] = self._hand_out
            vars(module)[_GETSTATE] = partial(self._state_of, module)

    def leave(self) -> None:
        for module in self._modules:
            module._state_dict_hooks.pop(_KEY, None)
            vars(module).pop(_GETSTATE, None)
        self._modules = []

    def _hand_out(self, module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
        """Put copies where a state dict would hold strided views."""
        for name, parameter in module._parameters.items():
            if parameter is None or state.get(prefix + name) is parameter:
                continue
            if (copy := self._plain(parameter)) is None:
                continue
            state[prefix + name] = copy
            if not copy.is_inference():
                self._copies.add(parameter, copy)

    def _state_of(self, module: Any) -> dict[str, Any]:
        """What a deepcopy or pickle of a module holds: nothing of ours."""
        state: dict[str, Any] = getattr(type(module), _GETSTATE)(module)
        hooks, parameters = state["_state_dict_hooks"], dict(state["_parameters"])
        state.pop(_GETSTATE, None)
        state["_state_dict_hooks"] = OrderedDict((k, v) for k, v in hooks.items() if k != _KEY)
        for name, parameter in parameters.items():
            if (copy := self._plain(parameter)) is not None:
                parameters[name] = nn.Parameter(copy, requires_grad=parameter.requires_grad)
        return state | {"_parameters": parameters}

    def _plain(self, parameter: Any) -> Tensor | None:
        """A copy of a parameter that lies in other strides than it did; of all others None."""
        lent = None if parameter is None else self._lent(parameter)
        if lent is None or lent.stride in (None, parameter.stride()):
            return None
        self._copies.of(parameter)
        with torch.inference_mode(parameter.is_inference()), torch.no_grad():
            return lent.memory().copy_(parameter.detach())
