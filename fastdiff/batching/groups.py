"""Pictures that share a recorded step."""

from collections.abc import Callable, Hashable

import torch

from fastdiff.batching.drawing import Drawing
from fastdiff.runtime import graphs
from fastdiff.runtime.loop import Plans
from fastdiff.runtime.places import Places, Seat
from fastdiff.runtime.recordings import Kept

FindPlaces = Callable[[Plans, Seat, int], Places]


def finder() -> FindPlaces:
    """A function that finds unused places for pictures of a kind, or makes them; the least recently
    used are dropped first."""
    kept: Kept[Places] = Kept(lambda places: places.nbytes)

    def find(plans: Plans, like: Seat, count: int) -> Places:
        """Places of `plans` for `count` pictures like this one."""
        places = kept.get((plans, like.kind, count), lambda: Places(plans, like, count))
        if places.seats:  # of another group, whose common constants are others
            return Places(plans, like, count)
        places.share(like)
        return places

    return find


class Group:
    """The drawings of one kind. They run in a recording with as many places as there are drawings,
    or with a few more: a new number of places costs a recorded step, and places are kept."""

    def __init__(
        self,
        find: FindPlaces,
        plans: Plans,
        kind: Hashable,
        capacity: int,
        fixed: bool = False,
    ) -> None:
        """fixed: always run with `capacity` places, so that every picture has the same bits."""
        self.plans, self.kind, self.capacity = plans, kind, capacity
        self._find, self._fixed = find, fixed
        self.drawings: dict[Drawing, Seat] = {}
        """With the picture with which each joined."""
        self._places: Places | None = None

    def takes(self, drawing: Drawing) -> bool:
        """Whether the drawing can join: there is room, and all have the rest in common."""
        if len(self.drawings) == self.capacity or drawing.plans is not self.plans:
            return False
        seat = drawing.seat
        assert seat is not None
        others = self.drawings.values()
        return seat.kind == self.kind and all(other.shares(seat) for other in others)

    def join(self, drawing: Drawing) -> None:
        """Take a drawing that `takes` accepts."""
        assert drawing.seat is not None
        self.drawings[drawing] = drawing.seat

    def leave(self, drawing: Drawing) -> None:
        """Let a drawing go that has ended, or whose steps have."""
        del self.drawings[drawing]
        if drawing.places is not None:
            drawing.places.leave(drawing.place)
            drawing.places = None

    def advance(self) -> None:
        """Run a step of every drawing."""
        places = self._settled()
        noises = {d.place: d.noise for d in self.drawings if d.noise is not None}
        places.advance(noises)

    def _settled(self) -> Places:
        """The places, with every drawing in one."""
        first = next(iter(self.drawings.values()))
        count = self._count(first.x.device)
        places = self._places
        if places is None or places.count != count:
            for drawing in self.drawings:
                if drawing.places is not None:
                    drawing.places.leave(drawing.place)
                    drawing.places = None
            places = self._places = self._find(self.plans, first, count)
        for drawing, seat in self.drawings.items():
            if drawing.places is None:
                drawing.places, drawing.place = places, places.seat(seat)
        return places

    def _count(self, device: torch.device) -> int:
        """How many places the next step has. A GPU hardly takes longer for an empty one, and long
        to record another number of them; a CPU computes an empty one as any other."""
        if self._fixed:
            return self.capacity
        count = len(self.drawings)
        if device.type == graphs.DEVICE:
            count = 1 << (count - 1).bit_length()
        return min(count, self.capacity)
