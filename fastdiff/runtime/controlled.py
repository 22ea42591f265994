"""A network and the ControlNets of the same step, as one `Network` of a loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from fastdiff.kernels.observe import scope
from fastdiff.kernels.residual import residual
from fastdiff.models.hoisted import Hoisted
from fastdiff.runtime.denoiser import Denoiser
from fastdiff.runtime.loop import Plans
from fastdiff.runtime.tape import between


class Rows(NamedTuple):
    own: Any
    """The network's."""
    nets: tuple[Any, ...]
    """Those of each ControlNet."""
    scales: tuple[Tensor, ...]
    """[steps, 1] each: what its residuals are multiplied by."""


class Constants(NamedTuple):
    own: Any
    nets: tuple[Any, ...]
    blank: Tensor
    """Zeros of the shape of the network's text."""
    in_turn: bool
    """Whether the network's first blocks take residuals in turn, not in groups."""


@dataclass(frozen=True)
class Controlled:
    """`network` (a `models.flux.Flux`) with ControlNets, whose residuals it adds."""

    network: Any
    nets: tuple[ReferenceType[Any], ...]
    """They are others' to keep: whoever runs a step has them."""
    places: tuple[int, ...]
    """Which of the conditions' `controls` each of them is told."""
    counts: tuple[int, int]
    """How many residuals the first blocks get, and the others: of two ControlNets that give
    different numbers of them, diffusers adds the first ones."""

    @property
    def recordable(self) -> bool:
        return bool(self.network.recordable)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.network.dtype
        return dtype

    @property
    def lives(self) -> bool:
        """Whether all its ControlNets are still kept."""
        return all(net is not None for net in self._nets)

    def check(self, latents: Tensor, given: Any, copies: int = 1) -> None:
        self.network.check(latents, given, copies)
        for net, place in zip(self._nets, self.places, strict=True):
            net.check(latents, given.controls[place].beside(given))

    def hoist(self, given: Any, timesteps: Tensor, sides: Sequence[int]) -> Hoisted:
        """Compute everything that does not depend on the latents, for all networks."""
        return self.beside(self.network.hoist(given, timesteps, sides), given, timesteps, sides)

    def beside(self, own: Hoisted, given: Any, timesteps: Tensor, sides: Sequence[int]) -> Hoisted:
        """`hoist`, where the network's own part is there already."""
        rows, constants = own
        told = [given.controls[place] for place in self.places]
        made = [
            net.hoist(control.beside(given), timesteps, sides)
            for net, control in zip(self._nets, told, strict=True)
        ]
        kind = torch.float64 if self.dtype == torch.float64 else torch.float32
        scales = [
            torch.tensor(control.scales, dtype=kind, device=timesteps.device)[:, None]
            for control in told
        ]
        return Hoisted(
            Rows(rows, tuple(one.rows for one in made), tuple(scales)),
            Constants(
                *(constants, tuple(one.constants for one in made)),
                *(torch.zeros_like(constants.text), given.controlnet_blocks_repeat),
            ),
        )

    def pack(self, latents: Tensor) -> Tensor:
        packed: Tensor = self.network.pack(latents)
        return packed

    def predict(self, x: Tensor, row: Rows, constants: Constants) -> Tensor:
        """The part that every step repeats; the ControlNets predict once for all of a picture's
        texts."""
        count, others = self.counts
        first: list[Tensor] = []
        rest: list[Tensor] = []
        parts = zip(self._nets, row.nets, constants.nets, row.scales, strict=True)
        for i, (net, own, told, scale) in enumerate(parts):
            with scope(f"control {i}"):
                made = net.residuals(x, own, told)
                for one in made:
                    between(partial(one.mul_, scale))
                at = net.counts[0]
                first = _sum(first, made[:count])
                rest = _sum(rest, made[at:][:others])
        whole = self.network.controlled(
            *(constants.own, constants.blank, first, rest, constants.in_turn)
        )
        prediction: Tensor = self.network.predict(x, row.own, whole)
        return prediction

    def unpack(self, x: Tensor, sides: Sequence[int]) -> Any:
        return self.network.unpack(x, sides)

    @property
    def _nets(self) -> list[Any]:
        return [net() for net in self.nets]


def _sum(made: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    """Both, added; one of them if the other is empty."""
    if not made or not more:
        return made or more
    return [residual(*both) for both in zip(made, more, strict=True)]


def hoist(
    network: Any,
    before: tuple[Any, Hoisted] | None,
    given: Any,
    timesteps: Tensor,
    sides: Sequence[int],
) -> Hoisted:
    """`network.hoist`, but for what is there already.

    before: a network that was told the same, and what it hoisted: of the network itself with other
    ControlNets or none, or of any other.
    """
    if before is None or _bare(before[0]) is not _bare(network):
        made: Hoisted = network.hoist(given, timesteps, sides)
        return made
    other, own = before
    if isinstance(other, Controlled):
        own = Hoisted(own.rows.own, own.constants.own)
    if isinstance(network, Controlled):
        return network.beside(own, given, timesteps, sides)
    return own


def _bare(network: Any) -> Any:
    return network.network if isinstance(network, Controlled) else network


def controlled(
    denoiser: Denoiser, nets: Sequence[Any], places: Sequence[int], counts: tuple[int, int]
) -> Denoiser:
    """A denoiser of the same network with ControlNets in its steps; the same one each time.

    nets: those that are at `places` among a loop's ControlNets.
    """
    kept, key = denoiser.beside, (*map(id, nets), *places, *counts)
    for other in [other for other, made in kept.items() if not made.network.lives]:
        del kept[other]  # another net may have got the same id
    if key not in kept:
        own = Controlled(denoiser.network, tuple(map(ref, nets)), tuple(places), counts)
        kept[key] = Denoiser(own, Plans(own, denoiser.plans.searches), denoiser.once)
    made: Denoiser = kept[key]
    return made
