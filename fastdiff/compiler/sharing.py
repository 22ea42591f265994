"""Loops that several ranks run together: what each of them computes."""

import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

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
        return Share(self.ranks, self.parallel == GUIDANCE, len(call.latents), predictions)

    def _obstacle(self, call: Call, predictions: int) -> str | None:
        if call.callback is not None:
            return "a callback on one rank may change what the others do not see"
        if self.parallel == GUIDANCE:
            known = {1: "there is no guidance", 3: "a step predicts three times"}
            return "a step may predict three times" if call.skips else known.get(predictions)
        if call.skips is not None:
            return "skip-layer guidance predicts three times in some steps"
        return "there is one picture" if len(call.latents) == 1 else None


@dataclass(frozen=True)
class Share:
    """What a rank computes of a loop."""

    ranks: Ranks
    halves: bool
    """Whether it predicts one half of guidance, instead of drawing some of the pictures."""
    pictures: int
    predictions: int

    @property
    def mine(self) -> list[int]:
        """The pictures that this rank draws, as many as each other rank: the last one may be drawn
        several times."""
        each = -(-self.pictures // self.ranks.count)
        at = range(each * self.ranks.rank, each * (self.ranks.rank + 1))
        return [min(i, self.pictures - 1) for i in at]

    def call(self, call: Call) -> Call:
        """The loop with this rank's pictures alone."""
        if self.halves:
            return call
        inpainting = call.inpainting and call.inpainting._replace(
            **{name: self._of_pictures(value) for name, value in call.inpainting._asdict().items()}
        )
        return replace(
            call,
            latents=call.latents[self.mine],
            conditions=self._of_pictures(call.conditions),
            inpainting=inpainting,
        )

    def told(self, conditions: T) -> T:
        """What this rank's predictions are told, of the conditions of all of a step's."""
        if not self.halves:
            return conditions
        whole, rank = self.predictions * self.pictures, self.ranks.rank

        def half(value: Any) -> Any:
            both = isinstance(value, Tensor) and value.ndim and len(value) == whole
            return value.chunk(2)[rank] if both else value

        made: T = tree_map(half, conditions)
        return made

    def noise(self, noise: Tensor) -> Tensor:
        """This rank's part of a step's noise, which is the first rank's."""
        self.ranks.first(noise)
        return noise if self.halves else noise[self.mine]

    def latents(self, latents: Tensor) -> Tensor:
        """The latents of all pictures, on every rank."""
        return latents if self.halves else self.ranks.gathered(latents)[: self.pictures]

    def _of_pictures(self, tree: T) -> T:
        """This rank's part of values that are given for every picture, or every prediction."""
        mine, count = torch.tensor(self.mine), self.pictures

        def part(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.ndim:
                return value
            times = len(value) / count
            if times not in (1, self.predictions):
                return value
            return torch.cat([some[mine] for some in value.split(count)])

        made: T = tree_map(part, tree)
        return made
