"""A network that always computes the same number of pictures, so that each picture has the same
bits however many are drawn with it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastdiff.models.blocks import require
from fastdiff.models.hoisted import Hoisted
from fastdiff.runtime.denoiser import Denoiser
from fastdiff.runtime.loop import Plans
from fastdiff.runtime.network import Network
from fastdiff.runtime.places import of_each

PLACES = 4
"""The pictures that it computes."""


@dataclass(frozen=True)
class Fixed:
    """`network` for at most `count` pictures, as the `Network` of a loop: unused places hold
    copies of the last picture."""

    network: Network
    count: int
    known: dict[Hashable, Any] = field(default_factory=dict)
    """The argument `known` of `of_each`."""

    @property
    def recordable(self) -> bool:
        return self.network.recordable

    @property
    def own_steps(self) -> bool:
        return bool(getattr(self.network, "own_steps", False))

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def check(self, latents: Tensor, given: Any, copies: int = 1) -> None:
        self.network.check(latents, given, copies)

    def hoist(self, given: Any, timesteps: Tensor, sides: Sequence[int]) -> Hoisted:
        made = self.network.hoist(given, timesteps, sides)
        own = of_each(self.network, given, timesteps, tuple(sides), made, self.known)
        require(own is not None, "conditions of which it does not show what is each picture's own")
        leaves, tree = tree_flatten(made.constants)
        constants = [
            self._filled(leaf) if alone else leaf
            for leaf, alone in zip(leaves, own or (), strict=True)
        ]
        return Hoisted(tree_map(self._rows, made.rows), tree_unflatten(constants, tree))

    def pack(self, latents: Tensor) -> Tensor:
        return self._filled(self.network.pack(latents))

    def predict(self, x: Tensor, row: Any, constants: Any) -> Tensor:
        return self.network.predict(x, row, constants)

    def unpack(self, x: Tensor, sides: Sequence[int]) -> Any:
        parts = x.reshape(-1, PLACES, *x.shape[1:])[:, : self.count]
        return self.network.unpack(parts.flatten(0, 1), sides)

    def _filled(self, x: Tensor) -> Tensor:
        """[n · count, …] -> [n · PLACES, …]"""
        parts = x.reshape(-1, self.count, *x.shape[1:])
        more = parts[:, -1:].expand(-1, PLACES - self.count, *x.shape[1:])
        return torch.cat([parts, more], dim=1).flatten(0, 1)

    def _rows(self, rows: Any) -> Any:
        """[steps, n, …] -> [steps, n' · PLACES, …]"""
        if not isinstance(rows, Tensor):
            return rows
        if rows.shape[1] == 1:
            return rows.expand(-1, PLACES, *rows.shape[2:])
        return torch.stack([self._filled(row) for row in rows])


def fixed(denoiser: Denoiser, count: int) -> Denoiser:
    """A denoiser whose loops draw `count` pictures with `Fixed`; the same one each time."""
    made = denoiser.plans.fixed.get(count)
    if made is None:
        network = Fixed(denoiser.network, count)
        made = denoiser.plans.fixed[count] = Denoiser(
            network, Plans(network, denoiser.plans.searches), denoiser.once
        )
    return made
