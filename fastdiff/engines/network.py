"""A network in another runtime's file, with the interface of our own networks."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.engines.bound import Bound, Engine
from fastdiff.models import Unsupported
from fastdiff.models.checks import check_count
from fastdiff.models.hoisted import Hoisted
from fastdiff.runtime import graphs

Ports = dict[str, list[Any]]
"""The inputs or outputs of a file: dtype and sides of each; named sides are free."""


class Constants(NamedTuple):
    conditions: tuple[Tensor, ...]
    """In the file's order."""
    negated: bool = False
    """Whether the loop takes the prediction's negative."""


class EngineNetwork:
    """Inputs and outputs as `fastdiff export` names them, channels first: the latents, the
    timestep, then conditions by name. The engine recomputes in every step what our own network
    hoists.

    Args:
        engine: runs the file.
        inputs, outputs: the file's.
        multiple: must divide the latents' height and width.
        most: the largest height and width; None: unlimited.
        for_file, float32: see `Denoised`; the former of conditions alone.
    """

    def __init__(
        self,
        engine: Engine,
        inputs: Ports,
        outputs: Ports,
        multiple: int,
        most: int | None = None,
        for_file: Callable[[Any], Any] = lambda given: given,
        float32: bool = False,
    ) -> None:
        self.engine, self._inputs = engine, inputs
        self.multiple, self._most = multiple, most
        self._for_file, self._float32 = for_file, float32
        self._latents, self._timestep, *self._conditions = inputs
        ((self._output, (_, *made)),) = outputs.items()
        self._axis = 1 if len(made) == 4 else len(made) - 1  # as `channel_axis` of the latents
        self._channels = made[self._axis]
        self._last = self._axis == 1 and self._channels != inputs[self._latents][2]
        """Whether channels come last in a loop though not in the file: its step splits what is said
        of the variance off there."""
        self._bound: dict[tuple[torch.Size, ...], Bound] = {}
        self._lock = threading.Lock()

    @property
    def recordable(self) -> bool:
        """Whether a CUDA graph may hold its steps."""
        return self.engine.recordable

    @property
    def dtype(self) -> torch.dtype:
        return _dtype(self._inputs[self._latents])

    def check(self, latents: Tensor, given: Any, copies: int = 1) -> None:
        """Raise Unsupported unless the engine takes exactly these tensors."""
        if self._float32 and latents.dtype == torch.float32:
            latents = latents.to(self.dtype)
        tensors = {self._latents: latents}
        told = _told(self._for_file(given))
        for name in told:
            if name not in self._conditions:
                raise Unsupported(f"it was given {name}, which is not an input of the engine")
        for name in self._conditions:
            if name not in told:
                raise Unsupported(f"{name}, an input of the engine, is missing")
        tensors |= told
        for name, tensor in tensors.items():
            self._check(name, tensor)
        if not all(tensor.numel() for tensor in tensors.values()):
            raise Unsupported("it was given an empty tensor")
        sides = list(latents.shape[2:]) if latents.ndim == 4 else []  # packed ones have none
        if any(side % self.multiple for side in sides):
            raise Unsupported(
                f"{self._latents} has the sides {sides}; the engine takes"
                f" multiples of {self.multiple}"
            )
        if self._most is not None and max(sides) > self._most:
            raise Unsupported(
                f"{self._latents} has the sides {sides}; the engine takes at most {self._most}"
            )
        for name in self._conditions[:1]:
            check_count(name, tensors[name], latents, copies)
        texts = len(tensors[self._conditions[0]]) if self._conditions else len(latents)
        tensors |= {name: self._for(texts, name, tensors[name]) for name in self._conditions}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        shapes[self._latents] = (texts, *latents.shape[1:])
        if reason := self.engine.refusal(shapes):
            raise Unsupported(reason)

    def _check(self, name: str, tensor: Tensor) -> None:
        _, *sides = port = self._inputs[name]
        if len(sides) != tensor.ndim or any(
            isinstance(side, int) and side != got
            for side, got in zip(sides, tensor.shape, strict=True)
        ):
            raise Unsupported(
                f"{name} has the shape {list(tensor.shape)}; the engine takes {sides}"
            )
        if tensor.dtype != _dtype(port) or tensor.device != self.engine.device:
            raise Unsupported(
                f"{name} is {tensor.dtype} on {tensor.device}, the engine takes {port[0]} on"
                f" {self.engine.device}"
            )

    def hoist(self, given: Any, timesteps: Tensor, sides: Sequence[int]) -> Hoisted:
        """The timesteps as rows [steps, 1] float32; the conditions unchanged."""
        first = timesteps[:, :1]
        if timesteps.shape[1] > 1 and not bool((timesteps == first).all()):  # SD3 repeats one
            raise Unsupported("the pictures have different timesteps")
        told = _told(self._for_file(given))
        own = tuple(told[name] for name in self._conditions)
        pairs = zip(self._conditions, own, strict=True)
        spread = tuple(self._for(len(own[0]), name, one) for name, one in pairs)
        return Hoisted(first.float(), Constants(spread, getattr(given, "negated", False)))

    def _for(self, texts: int, name: str, tensor: Tensor) -> Tensor:
        """A condition that is given once for all halves of guidance, once for each."""
        of_pictures = self._inputs[name][1] == self._inputs[self._latents][1]
        times = texts // max(1, len(tensor)) if of_pictures else 1
        return tensor.repeat(times, *[1] * (tensor.ndim - 1)) if times > 1 else tensor

    def pack(self, latents: Tensor) -> Tensor:
        """[B, C, Y, X] or [B, L, C], unchanged, or as [B, Y, X, C] if the engine says something of
        the variance."""
        return latents.permute(0, 2, 3, 1).contiguous() if self._last else latents

    def predict(self, x: Tensor, row: Tensor, constants: Constants) -> Tensor:
        """Latents [B, …] as `pack` gives them -> [G·B, …]; `row`: [1]; constants for G·B
        pictures."""
        x = x.permute(0, 3, 1, 2) if self._last else x
        conditions = constants.conditions
        batch, texts = x.shape[0], _texts(x, conditions)
        bound = self._bind(x, conditions)
        with self._lock:  # threads share the engine's memory
            given = bound.inputs
            given[self._latents].unflatten(0, (texts // batch, batch)).copy_(x)
            given[self._timestep].copy_(row.reshape(given[self._timestep].shape))
            for name, tensor in zip(self._conditions, conditions, strict=True):
                given[name].copy_(tensor)
            bound.run()
            out = bound.outputs[self._output]  # which the next run overwrites
            made = -out if constants.negated else out.clone()
        return made.permute(0, 2, 3, 1).contiguous() if self._last else made

    def predict_in_turn(self, x: Tensor, row: Tensor, constants: Constants) -> Tensor:
        """`predict` for single calls, which do not run within a plan's turn."""
        with graphs.in_turn(self.engine.device):
            return self.predict(x, row, constants)

    def unpack(self, x: Tensor, sides: Sequence[int]) -> Tensor:
        """Undo `pack`."""
        return (x.permute(0, 3, 1, 2) if self._last else x).contiguous()

    def _bind(self, x: Tensor, conditions: tuple[Tensor, ...]) -> Bound:
        # a plan gives each picture once, a call repeats it for guidance; the engine gets the same
        texts, sides = _texts(x, conditions), list(x.shape[1:])
        key = (x.shape[1:], *(tensor.shape for tensor in conditions))
        if key not in self._bound:
            timestep = list(self._inputs[self._timestep][1:])
            inputs: dict[str, Sequence[int]] = {
                self._latents: (texts, *x.shape[1:]),
                self._timestep: timestep,
            }
            inputs |= {n: t.shape for n, t in zip(self._conditions, conditions, strict=True)}
            sides[self._axis - 1] = self._channels
            outputs = {self._output: (texts, *sides)}
            self._bound[key] = self.engine.bind(inputs, outputs)
        return self._bound[key]


def _told(given: Any) -> dict[str, Tensor]:
    """The conditions that are there, by the names of a file's inputs."""
    told: dict[str, Tensor] = {}
    for name, value in given._asdict().items():
        if value is given._field_defaults.get(name):
            continue
        more = value if isinstance(value, Mapping) else {name: value}
        told |= {own: tensor for own, tensor in more.items() if tensor is not None}
    return told


def _texts(x: Tensor, conditions: tuple[Tensor, ...]) -> int:
    """The pictures of a run: one for each text, or for each latent if there are no conditions."""
    return len(conditions[0] if conditions else x)


def _dtype(port: list[Any]) -> torch.dtype:
    kind: torch.dtype = getattr(torch, port[0])
    return kind
