"""Whoever asks lent modules for their state gets it as it was before they were lent.

Savers take parameters that share a storage for one and drop the rest, or refuse strides. So a state
dict, a pickle and a copy first have the weights given back; the next use borrows them anew. That
costs a copy of the weights each time, and no memory: a state dict of copies would need it twice.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_KEY = "fastdiff"
_GETSTATE = "__getstate__"


class Handed:
    """The tensors that state dicts gave away, for as long as somebody holds them.

    They were a parameter's memory, so what is written into them counts as written into it.
    """

    def __init__(self) -> None:
        self._given: dict[int, list[Home]] = {}

    def add(self, parameter: Tensor, tensor: Tensor) -> None:
        self._given.setdefault(id(parameter), []).append(Home(parameter, tensor))

    def forget(self) -> None:
        """Forget those that nobody holds any more."""
        for key, homes in [*self._given.items()]:
            self._given[key] = [home for home in homes if home.held is not None]
            if not self._given[key]:
                del self._given[key]

    def homes(self, parameter: Tensor) -> tuple["Home", ...]:
        """Those that are the parameter's memory now."""
        found = self._given.get(id(parameter), ())
        return tuple(home for home in found if home.is_memory_of(parameter))


class Home:
    """Memory that a parameter has left, and to which it returns if somebody still holds it."""

    def __init__(self, parameter: Tensor, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._parameter = weakref.ref(parameter)
        self._version = tensor._version

    @property
    def held(self) -> Tensor | None:
        """The memory, as a tensor; None where nobody holds it any more."""
        return self._tensor()

    def is_memory_of(self, parameter: Tensor) -> bool:
        tensor = self.held
        return (
            tensor is not None
            and self._parameter() is parameter
            and tensor.data_ptr() == parameter.data_ptr()
            and tensor.stride() == parameter.stride()
        )

    def left(self) -> None:
        """The parameter is elsewhere from now on."""
        tensor = self.held
        self._version = 0 if tensor is None else tensor._version

    def written(self) -> bool:
        """Whether something was written there since the parameter left, or was last asked."""
        tensor = self.held
        if tensor is None or tensor._version == self._version:
            return False
        self._version = tensor._version
        return True


@dataclass(frozen=True)
class Lent:
    """A parameter whose memory the runtime reads."""

    parameter: Tensor
    address: int
    """Where it lies, for as long as nobody else moves it."""
    stride: tuple[int, ...] | None = None
    """Of the memory that it gets back; None: it was left where it is."""
    homes: tuple[Home, ...] = ()

    def collect(self) -> None:
        """Take over what was written where the parameter was before."""
        for home in self.homes:
            held = home.held
            if held is None or self.parameter.data_ptr() != self.address:
                continue
            if home.written():
                with torch.inference_mode(False), torch.no_grad():
                    self.parameter.copy_(held)

    def give_back(self) -> None:
        """Move the parameter to where it was, or to memory of its own."""
        if self.stride is None or self.parameter.data_ptr() != self.address:
            return
        self.collect()
        own = next((home.held for home in self.homes if home.held is not None), None)
        with torch.inference_mode(self.parameter.is_inference()):
            if own is None:
                own = torch.empty_strided(
                    self.parameter.shape,
                    self.stride,
                    dtype=self.parameter.dtype,
                    device=self.parameter.device,
                )
            self.parameter.data = own.copy_(self.parameter.detach())


class Gate:
    """Stands before the state of modules: `give_back` is called before anybody sees it."""

    def __init__(self, give_back: Callable[[], None], handed: Handed) -> None:
        self._give_back, self._handed = give_back, handed
        self._modules: list[Any] = []

    def stand_before(self, modules: Iterable[Any]) -> None:
        """Before these modules' state, and no others'."""
        self.leave()
        self._modules = list(modules)
        for module in self._modules:
            module._state_dict_pre_hooks[_KEY] = self._ask
            module._state_dict_hooks[_KEY] = self._hand_out
            vars(module)[_GETSTATE] = partial(_state_of, module, self._give_back)

    def leave(self) -> None:
        for module in self._modules:
            module._state_dict_pre_hooks.pop(_KEY, None)
            module._state_dict_hooks.pop(_KEY, None)
            vars(module).pop(_GETSTATE, None)
        self._modules = []

    def _ask(self, *_: Any) -> None:
        self._give_back()

    def _hand_out(self, module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
        """Let a state dict hold tensors whose versions tell writes into them from others."""
        for name, parameter in module._parameters.items():
            given = state.get(prefix + name)
            if parameter is None or given is parameter or not isinstance(given, Tensor):
                continue
            own = parameter.data
            if given.data_ptr() == own.data_ptr() and not own.is_inference():
                state[prefix + name] = own
                self._handed.add(parameter, own)


def _state_of(module: Any, give_back: Callable[[], None]) -> dict[str, Any]:
    """What a copy or pickle of a module holds: nothing of ours."""
    give_back()
    state: dict[str, Any] = getattr(type(module), _GETSTATE)(module)
    state.pop(_GETSTATE, None)
    for name in ("_state_dict_pre_hooks", "_state_dict_hooks"):
        state[name] = OrderedDict((k, v) for k, v in state[name].items() if k != _KEY)
    return state
