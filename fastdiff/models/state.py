"""Lent parameters in state dicts, pickles and copies.

Savers treat parameters that share a storage as one and drop the rest, or refuse some strides. So a
lent parameter has its own storage, cut out of the kernels' memory, if it is contiguous there.
If it is not, it goes home before a state dict, a pickle or a copy is made: to its own memory in
its former layout. The next use moves it back, with everything written in the meantime. Until then
those weights take their memory twice. To free the kernels' memory instead would cost a new
recording at each use, and PEFT reads state dicts to swap adapters.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.lora import base_of, is_lora

_KEY, _GETSTATE = "fastdiff", "__getstate__"


def apart(view: Tensor) -> Tensor:
    """The same memory with its own storage, if `view` is contiguous."""
    if not view.is_contiguous() or view.device.type == "meta":
        return view
    start = view.storage_offset() * view.element_size()
    storage = view.untyped_storage()[start : start + view.nbytes]
    own = torch.empty(0, dtype=view.dtype, device=view.device)
    return own.set_(storage, 0, view.shape, view.stride())


class Home:
    """Memory of a parameter that a state dict holds."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = weakref.ref(tensor), tensor._version

    @property
    def held(self) -> Tensor | None:
        """The tensor, as long as other code holds it."""
        return self._tensor()

    def is_of(self, parameter: Tensor) -> bool:
        held = self.held
        return held is not None and held.data_ptr() == parameter.data_ptr()

    def written(self) -> bool:
        """Whether it has been written since the last call of this method."""
        held, before = self.held, self._version
        self._version = before if held is None else held._version
        return self._version != before


Homes = dict[int, list[Home]]
"""By the parameter's id; they outlast a loan."""


class Lent:
    """A parameter that the runtime reads: in `view`, or if that is None, where it is.

    Use it without gradients, and in inference mode just if the parameter was made in it.
    """

    def __init__(
        self,
        parameter: Tensor,
        view: Tensor | None = None,
        homes: list[Home] | None = None,
        waits: bool = False,
    ) -> None:
        self.parameter, self._view = parameter, view
        self._stride, self._at_home = _home_strides(parameter), True
        self._device, self.waits = parameter.device, waits
        self._homes = [] if homes is None else homes
        self._homes[:] = [home for home in self._homes if home.is_of(parameter)]
        self.address = parameter.data_ptr()
        """Where the loan put it; differs from its data_ptr once other code moves it."""
        self.come_back()
        self.strays = parameter.stride() != self._stride

    def go_home(self, device: torch.device | None = None) -> None:
        """Move it to memory in its former layout: the same memory, if other code still holds that.

        device: where the memory of one that waits must be; None: where it was.
        """
        if self._view is None or self._at_home or self.parameter.data_ptr() != self.address:
            return
        self.collect()
        where = (device or self._device) if self.waits else self.parameter.device
        held = (home.held for home in self._homes)
        home = next((h for h in held if h is not None and not self.waits), None)
        if home is None:
            like = self.parameter
            home = torch.empty_strided(like.shape, self._stride, dtype=like.dtype, device=where)
        self._move(home)
        self._at_home = True

    def come_back(self) -> None:
        """Move it to the kernels' memory, unless other code has moved it from home."""
        if self._view is None or not self._at_home or self.parameter.data_ptr() != self.address:
            return
        self._move(apart(self._view))
        self._at_home = False
        for home in self._homes:
            home.written()

    def hand_out(self, tensor: Tensor) -> None:
        """Note that a state dict holds `tensor`, the parameter's present memory."""
        self._homes.append(Home(tensor))

    def collect(self) -> bool:
        """Take over what was written at home; returns whether anybody still holds that memory."""
        self._homes[:] = [home for home in self._homes if home.held is not None]
        for home in self._homes:
            held = home.held
            if held is None or not home.written() or home.is_of(self.parameter):
                continue
            if self.parameter.data_ptr() == self.address:
                self.parameter.data.copy_(held)
        return bool(self._homes)

    def _move(self, memory: Tensor) -> None:
        if memory.data_ptr() != self.parameter.data_ptr():
            memory.copy_(self.parameter.detach())
        self.parameter.data = memory
        self.address = memory.data_ptr()


def bring_home(root: nn.Module, lent: Collection[Lent]) -> None:
    """Move the parameters that wait, and adapters that were put on them since, to where the others
    of `root` are now."""
    waiting = {id(one.parameter): one for one in lent if one.waits}
    device = next((one.parameter.device for one in lent if not one.waits), None)
    for one in waiting.values():
        one.go_home(device)
        if device is not None and one.parameter.device != device:  # other code has moved it
            one.parameter.data = one.parameter.detach().to(device)
    for module in root.modules() if waiting else ():
        if is_lora(module) and id(base_of(module).weight) in waiting:
            module.to(device)


def _home_strides(parameter: Tensor) -> tuple[int, ...]:
    """The strides at home: the parameter's, or contiguous ones if those leave gaps."""
    former = torch.empty_strided(parameter.shape, parameter.stride(), device="meta")
    last = former.ndim == 4 and former.is_contiguous(memory_format=torch.channels_last)
    if last or former.is_contiguous():
        return parameter.stride()
    return torch.empty(parameter.shape, device="meta").stride()


class Gate:
    """Calls `go_home` before the state of lent parameters' modules is read; with True before the
    modules are copied or pickled."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        lent: Callable[[Tensor], Lent | None],
        go_home: Callable[[bool], None],
    ) -> None:
        self._modules: list[Any] = list(modules)
        self._lent, self._go_home = lent, go_home
        for module in self._modules:
            module._state_dict_pre_hooks[_KEY] = self._before_reading
            module._state_dict_hooks[_KEY] = self._hand_out
            # before other hooks change the entries
            module._state_dict_hooks.move_to_end(_KEY, last=False)
            vars(module)[_GETSTATE] = partial(self._state_of, module)

    def leave(self) -> None:
        for module in self._modules:
            if vars(module).get(_GETSTATE) is not None:
                module._state_dict_pre_hooks.pop(_KEY, None)
                module._state_dict_hooks.pop(_KEY, None)
                vars(module).pop(_GETSTATE)
        self._modules = []

    def _before_reading(self, *_: Any) -> None:
        self._go_home(False)

    def _hand_out(self, module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
        """Give a state dict its own tensors, whose versions count only writes through it."""
        for name, parameter in module._parameters.items():
            given = state.get(prefix + name)
            lent = None if parameter is None else self._lent(parameter)
            if lent is None or given is parameter or not isinstance(given, Tensor):
                continue
            own = lent.parameter.data
            if given.data_ptr() == own.data_ptr() and not own.is_inference():
                state[prefix + name] = own
                lent.hand_out(own)

    def _state_of(self, module: Any) -> dict[str, Any]:
        """The state for a deepcopy or pickle of a module, without our hooks."""
        self._go_home(True)
        state: dict[str, Any] = getattr(type(module), _GETSTATE)(module)
        state.pop(_GETSTATE, None)
        for name in ("_state_dict_pre_hooks", "_state_dict_hooks"):
            state[name] = OrderedDict((k, v) for k, v in state[name].items() if k != _KEY)
        return state
