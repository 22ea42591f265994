"""Loops that several ranks run together: what each of them computes."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastdiff.compiler.guidance import predictions_of
from fastdiff.compiler.loop_call import Call
from fastdiff.compiler.options import GUIDANCE
from fastdiff.runtime.ranks import Ranks
from fastdiff.tables import plural

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Sharing:
    """How the ranks share a pipeline's loops."""

    parallel: str
    """`Options.parallel`."""
    ranks: Ranks
    shared: int = 0
    """Loops that were shared."""
    whole: Counter[str] = field(default_factory=Counter)
    """Loops that every rank ran for itself, by reason."""

    def __str__(self) -> str:
        of = "guidance" if self.parallel == GUIDANCE else "batch"
        said = [f"{of} of {plural(self.shared, 'loop')} shared by {self.ranks.count} ranks"]
        said += [f"{n} drawn whole by each rank: {why}" for why, n in self.whole.items()]
        return "; ".join(said)

    def share(self, pipe: Any, call: Call) -> "Share | None":
        """What this rank computes of a loop of `pipe`; None for all of it. Ranks that share it
        start from the first one's latents."""
        predictions = predictions_of(partial(call.setting, pipe)).count
        reason = self._obstacle(call, predictions)
        if reason is not None:
            if reason not in self.whole:
                logger.warning("fastdiff: each rank draws whole pictures: %s", reason)
            self.whole[reason] += 1
            return None
        self.ranks.begin()
        scale = call.setting(pipe, "guidance_scale", None)
        self.ranks.agree(
            {
                "latents of": f"{tuple(call.held.shape)} {call.held.dtype}",
                "timesteps": call.timesteps.tolist(),
                "predictions": predictions,
                "parallel": self.parallel,
                "guidance_scale": None if scale is None else float(scale),
            }
        )
        self.ranks.first(call.held)
        pictures, others = len(call.latents), call.plan.unbatched
        return Share(self.ranks, self.parallel == GUIDANCE, pictures, predictions, others)

    def _obstacle(self, call: Call, predictions: int) -> str | None:
        if call.callback is not None:
            return "a callback may change one rank's latents, which the other ranks do not see"
        pictures, told = len(call.latents), call.conditions
        whole = predictions * pictures
        listed = [len(value) for value in told if isinstance(value, list | tuple)]
        if any(count == whole or 1 < count == pictures for count in listed):
            return "a condition of the network may be a list with an entry for each picture"
        if self.parallel == GUIDANCE:
            if call.skips is not None:
                return "a step may predict three times"
            if predictions != 2:
                few = predictions < 2
                return "there is no guidance" if few else "a step predicts three times"
            batched = [v for v in tree_leaves(told) if isinstance(v, Tensor) and v.ndim]
            halves = any(len(value) == whole for value in batched)
            return None if halves else "both halves of guidance have the same conditions"
        if call.skips is not None:
            return "skip-layer guidance predicts three times in some steps"
        return "there is one picture" if pictures == 1 else None


@dataclass(frozen=True)
class Share:
    """What a rank computes of a loop."""

    ranks: Ranks
    halves: bool
    """Whether it predicts one half of guidance, instead of drawing some of the pictures."""
    pictures: int
    predictions: int
    unbatched: tuple[str, ...] = ()
    """`Plan.unbatched`."""

    @property
    def mine(self) -> list[int]:
        """The pictures that this rank draws, as many as each other rank: the last one may be drawn
        several times."""
        each = -(-self.pictures // self.ranks.count)
        at = range(each * self.ranks.rank, each * (self.ranks.rank + 1))
        return [min(i, self.pictures - 1) for i in at]

    def call(self, call: Call) -> Call:
        """The loop with only this rank's pictures."""
        if self.halves:
            return call
        kept = call.inpainting
        inpainting = None if kept is None else self._batched(self._part, kept)
        return replace(
            call,
            latents=call.latents[self.mine],
            conditions=self._batched(self._part, call.conditions),
            inpainting=inpainting,
        )

    def told(self, conditions: T) -> T:
        """This rank's share of the conditions of all predictions of a step."""
        if not self.halves:
            return conditions
        whole, rank = self.predictions * self.pictures, self.ranks.rank

        def half(value: Any) -> Any:
            both = isinstance(value, Tensor) and value.ndim and len(value) == whole
            return value.chunk(2)[rank] if both else value

        return self._batched(half, conditions)

    def noise(self, noise: Tensor) -> Tensor:
        """This rank's part of a step's noise, which is the first rank's."""
        self.ranks.first(noise)
        return noise if self.halves else noise[self.mine]

    def latents(self, latents: Tensor) -> Tensor:
        """The latents of all pictures, on every rank."""
        return latents if self.halves else self.ranks.gathered(latents)[: self.pictures]

    def _part(self, value: Any) -> Any:
        """This rank's part of what is given for every picture, or every prediction."""
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if len(value) not in (self.pictures, self.predictions * self.pictures):
            return value
        return torch.cat([some[self.mine] for some in value.split(self.pictures)])

    def _batched(self, change: Callable[[Any], Any], given: T) -> T:
        """A named tuple with every value changed but those that have no batch."""
        fields: Any = given
        told = fields._asdict().items()
        made = {n: tree_map(change, v) for n, v in told if n not in self.unbatched}
        changed: T = fields._replace(**made)
        return changed
