"""A recorded step for pictures that are each at a different step: the places of a batch.

Every place has rows of the scheduler's table, a ring of past steps, noise and the values that its
network computed once. So pictures of other schedulers, guidance and numbers of steps share a
recording; an empty place is computed by the network, but not stepped.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from fastdiff.kernels.observe import entered, observed
from fastdiff.models.hoisted import Hoisted
from fastdiff.runtime import graphs
from fastdiff.runtime.buffers import buffers_of
from fastdiff.runtime.guidance import Guidance
from fastdiff.runtime.loop import STEP, Plans
from fastdiff.runtime.network import Network
from fastdiff.runtime.recordings import Recording, buffer, first_of, kinds
from fastdiff.runtime.recurrence import MAX_DEPTH
from fastdiff.runtime.table import Table

ROWS = 341 * MAX_DEPTH
"""Rows of the table for each place; a picture of more steps has a separate recording. A multiple
of the depth: then a step's slot in the history is the same in all places."""
EMPTY = -1


@dataclass
class Seat:
    """A picture on its way through its steps. Tensors as the network packs them, for one picture;
    `S` as in `Buffers`."""

    hoisted: Hoisted
    own: tuple[bool, ...]
    """Which of the constants differ from picture to picture, as `of_each` returns it."""
    table: Tensor
    """[steps, columns] S."""
    x: Tensor
    """[1, …] the network's next input."""
    sample: Tensor
    """[1, …] S."""
    history: Tensor
    """[2, M, 1, …] S."""
    at: int = 0
    """The next step."""

    thresholds: bool = False
    """Whether its steps clip by a quantile."""

    @property
    def kind(self) -> Hashable:
        """Equal for pictures that may share a recording."""
        leaves, tree = tree_flatten((self.x, first_of(self.hoisted.rows), self.hoisted.constants))
        room = -(-len(self.table) // ROWS)
        return *map(kinds, leaves), str(tree), self.own, room, self.thresholds

    def shares(self, other: "Seat") -> bool:
        """Whether both, of one kind, have the same constants where a batch shares them."""
        return all(
            torch.equal(ours, theirs)
            for ours, theirs in zip(self._common(), other._common(), strict=True)
        )

    def _common(self) -> Iterator[Tensor]:
        leaves = tree_leaves(self.hoisted.constants)
        for leaf, own in zip(leaves, self.own, strict=True):
            if isinstance(leaf, Tensor) and not own:
                yield leaf


def seat_of(
    network: Network,
    latents: Tensor,
    table: Table,
    guidance: Guidance,
    hoisted: Hoisted,
    own: tuple[bool, ...],
) -> Seat:
    """A picture before its first step.

    Args:
        latents: [1, …] the scheduler's first sample.
        hoisted: computed for this picture alone.
    """
    state = torch.float64 if network.dtype == torch.float64 else torch.float32
    sample = network.pack(latents).to(state, copy=True).contiguous()
    return Seat(
        hoisted=hoisted,
        own=own,
        table=table.rows(guidance, depth=MAX_DEPTH).to(latents.device, state),
        x=(sample * table.scales[0].item()).to(network.dtype),
        sample=sample,
        history=sample.new_zeros(2, MAX_DEPTH, *sample.shape),
        thresholds=table.thresholds,
    )


def of_each(
    network: Network,
    given: Any,
    timesteps: Tensor,
    sides: Sequence[int],
    hoisted: Hoisted,
    known: dict[Hashable, tuple[bool, ...] | None],
) -> tuple[bool, ...] | None:
    """Which leaves of `hoisted.constants` differ from picture to picture of a batch: those that
    are twice as long when all conditions are doubled. None if that does not decide it.

    Args:
        given, timesteps: those of which `hoisted` was computed.
        known: what was found before for this network.
    """
    leaves, tree = tree_flatten(hoisted.constants)
    key = (*map(kinds, leaves), str(tree))
    if key not in known:
        twice = tree_map(lambda leaf: _twice(leaf) if isinstance(leaf, Tensor) else leaf, given)
        made = tree_leaves(network.hoist(twice, timesteps[:1], sides).constants)
        known[key] = _longer(leaves, made)
    return known[key]


def _longer(leaves: Sequence[Any], twice: Sequence[Any]) -> tuple[bool, ...] | None:
    """Which of some leaves are twice as long in other ones; None if they differ otherwise."""
    found = []
    for one, two in zip(leaves, twice, strict=True):
        same = not isinstance(one, Tensor) or one.shape == two.shape
        if not same and (2 * one.shape[0], *one.shape[1:]) != tuple(two.shape):
            return None
        found.append(not same)
    return tuple(found)


def _twice(leaf: Tensor) -> Tensor:
    """[G, …] -> [2G, …], each entry twice in a row: the order of a batch's predictions."""
    return leaf.repeat_interleave(2, 0) if leaf.ndim else leaf


class Places:
    """A recorded step for `count` pictures of one kind."""

    def __init__(self, plans: Plans, like: Seat, count: int) -> None:
        """like: a picture of that kind; see `share`."""

        def wide(leaf: Any, first: bool = False) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            leaf = leaf[0] if first else leaf
            return leaf[:1].expand(leaf.shape[0] * count, *leaf.shape[1:])

        leaves, tree = tree_flatten(like.hoisted.constants)
        pairs = list(zip(leaves, like.own, strict=True))
        constants = tree_unflatten([wide(leaf) if own else leaf for leaf, own in pairs], tree)
        room = -(-len(like.table) // ROWS) * ROWS
        buffers = buffers_of(
            wide(like.x),
            tree_map(partial(wide, first=True), like.hoisted.rows),
            constants,
            *(count * room, MAX_DEPTH, True, 0, like.thresholds, count),
        )
        self.network, self.count, self._room, self._plans = plans.network, count, room, plans
        self._buffers = buffers
        self._recording: Recording | None = None
        with suppress(torch.OutOfMemoryError):  # an unrecorded step needs less
            self._recording = plans.recorded(buffers)
        self._moves = buffer((count,), torch.int64, buffers.x.device).zero_()
        self._seats: dict[int, Seat] = {}
        self._rows = [self._by_place(leaf) for leaf in tree_leaves(buffers.row)]
        kept = tree_leaves(buffers.constants)
        self._constants = [
            self._by_place(leaf) if own else None for leaf, own in zip(kept, like.own, strict=True)
        ]
        graphs.fence(buffers.x.device)
        buffers.step.fill_(EMPTY)
        buffers.x.zero_()
        self.share(like)

    def share(self, like: Seat) -> None:
        """Let all pictures share those constants of `like` that are not a picture's own."""
        kept = tree_leaves(self._buffers.constants)
        for own, leaf, alone in zip(
            kept, tree_leaves(like.hoisted.constants), like.own, strict=True
        ):
            if isinstance(leaf, Tensor) and not alone:
                own.copy_(leaf)

    def _by_place(self, leaf: Tensor) -> Tensor:
        """[k · count, …] -> [count, k, …], in the same memory."""
        return leaf.view(-1, self.count, *leaf.shape[1:]).transpose(0, 1)

    @property
    def nbytes(self) -> int:
        """The memory that the recording keeps."""
        return 0 if self._recording is None else self._recording.nbytes

    @property
    def seats(self) -> Mapping[int, Seat]:
        """The pictures by place."""
        return self._seats

    def seat(self, seat: Seat) -> int:
        """Give a picture an empty place, which is returned."""
        place = next(place for place in range(self.count) if place not in self._seats)
        buffers = self._buffers
        graphs.fence(buffers.x.device)
        buffers.x[place].copy_(seat.x[0])
        buffers.sample[place].copy_(seat.sample[0])
        buffers.history[:, :, place].copy_(seat.history[:, :, 0])
        constants = tree_leaves(seat.hoisted.constants)
        for own, leaf in zip(self._constants, constants, strict=True):
            if own is not None:
                own[place].copy_(leaf)
        first = place * self._room
        buffers.table[first : first + len(seat.table)].copy_(seat.table)
        buffers.step[place].fill_(first + seat.at)
        self._moves[place].fill_(1)
        self._seats[place] = seat
        return place

    def leave(self, place: int) -> Seat:
        """Empty a place; its picture can go on in another."""
        seat, buffers = self._seats.pop(place), self._buffers
        graphs.fence(buffers.x.device)
        seat.x = buffers.x[place : place + 1].clone()
        seat.sample = buffers.sample[place : place + 1].clone()
        seat.history = buffers.history[:, :, place : place + 1].clone()
        buffers.step[place].fill_(EMPTY)
        buffers.x[place].zero_()
        self._moves[place].zero_()
        return seat

    def sample(self, place: int) -> Tensor:
        """[1, …] the sample of a place, which the next step overwrites."""
        return self._buffers.sample[place : place + 1]

    def advance(self, noises: Mapping[int, Tensor]) -> None:
        """Run one step of every picture. noises: by place, [1, …] as the network packs latents."""
        entered(STEP, partial(self._advance, noises))
        for seat in self._seats.values():
            seat.at += 1

    def _advance(self, noises: Mapping[int, Tensor]) -> None:
        buffers = self._buffers
        to: list[Tensor] = []
        given: list[Tensor] = []
        for place, seat in self._seats.items():
            for own, rows in zip(self._rows, tree_leaves(seat.hoisted.rows), strict=True):
                to.append(own[place])
                given.append(rows[seat.at])
        assert buffers.noise is not None
        for place, noise in noises.items():
            to.append(buffers.noise[place])
            given.append(noise[0])
        with graphs.in_turn(buffers.x.device):
            for own, value in zip(to, given, strict=True):
                own.copy_(value)
            if self._recording is None or observed():
                self._plans.run(buffers)
            else:
                self._recording.run()
            buffers.step.add_(self._moves)
