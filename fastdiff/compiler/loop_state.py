"""What a pipeline keeps of its loops that run as plans: counters, a lock, other ranks."""

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastdiff.compiler.denoise import Denoising
from fastdiff.compiler.options import FASTDIFF, GUIDANCE, LOOP, Options
from fastdiff.compiler.sharing import Sharing
from fastdiff.errors import UserError
from fastdiff.runtime.ranks import Ranks, present
from fastdiff.tables import plural

PLACE = "_fastdiff_loop"
"""The attribute of a pipeline that holds it."""


class Driver(Protocol):
    """Runs the steps of a pipeline's loops among those of others."""

    def run(self, denoising: Denoising) -> int:
        """Does what `Denoising.run` does."""
        ...

    def refuse(self, reason: str) -> None:
        """Told why a loop cannot run as a plan; what it raises ends the call."""
        ...


@dataclass
class Loop:
    """Counters and the lock of a pipeline whose loops run as plans."""

    ran: Counter[str] = field(default_factory=Counter)
    """Loops that ran as a plan since compile, by the network that they repeat."""
    own: Counter[str] = field(default_factory=Counter)
    """Loops that diffusers ran, whole or in part, by reason."""
    running: int = 0
    """Calls in progress."""
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    sharing: Sharing | None = None
    """How other ranks share them."""
    invariant: bool = False
    """`Options.batch_invariant`."""
    driver: Driver | None = None
    """What runs the steps in place of `Denoising.run`, if anything does."""

    @property
    def planned(self) -> int:
        """Loops that ran as a plan since compile."""
        return sum(self.ran.values())

    def finished(self, ran: bool) -> None:
        """A loop ended, or turned out to be diffusers' before it began; without this, the ranks
        share no other."""
        if self.sharing is not None:
            self.sharing.shared += self.sharing.ranks.end() and ran

    def __str__(self) -> str:
        count = plural(self.planned, "loop")
        several = ", ".join(f"{times} of the {name}" for name, times in self.ran.items())
        count = f"{count} ({several})" if len(self.ran) > 1 else count
        return count if self.sharing is None else f"{count}; {self.sharing}"


def loop_of(pipe: Any) -> Loop | None:
    """The loop state of `pipe`; None if diffusers runs its loops."""
    loop: Loop | None = vars(pipe).get(PLACE)
    return loop


def check_invariant(target: Any, options: Options) -> None:
    """Raise UserError unless the loop of a compiled target is as invariant as `options` say."""
    loop = loop_of(target)
    if loop is None and options.batch_invariant:
        raise UserError(
            f"Options.batch_invariant needs a loop that runs as a plan; this"
            f" {type(target).__name__} has none"
        )
    if loop is not None and loop.invariant != options.batch_invariant:
        raise UserError("this is compiled with another batch_invariant already; restore it first")


def sharing(target: Any, options: Options, plans: bool) -> Sharing | None:
    """How `options` have other ranks share the loops of a target; None for not at all.

    plans: whether the target has loops that can run as plans.
    """
    loop = loop_of(target)
    if loop is not None:
        now = None if loop.sharing is None else loop.sharing.parallel
        if now != options.parallel:
            raise UserError("the loop is compiled with another parallel already; restore it first")
        return loop.sharing
    if options.parallel is None:
        return None
    said = f"Options.parallel is {options.parallel!r}"
    if not plans or LOOP in options.ignore:
        raise UserError(
            f"{said}, but no loop of this {type(target).__name__} would run as a plan; give a"
            " pipeline, and ignore neither its network nor its loop"
        )
    if options.backend != FASTDIFF:
        raise UserError(f"{said}, which needs the backend {FASTDIFF!r}; got {options.backend!r}")
    if not present():
        raise UserError(
            f"{said}, but torch.distributed has no process group; start the program with torchrun"
            " and call torch.distributed.init_process_group first"
        )
    ranks = Ranks()
    if options.parallel == GUIDANCE and ranks.count != 2:
        raise UserError(f"{said}, which takes two ranks; got {ranks.count}")
    return Sharing(options.parallel, ranks)
