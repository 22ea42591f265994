"""The launches, bytes and FLOPs of a picture by block; its calls can be repeated to time them.

The networks name their blocks (`kernels.observe.scope`), and the loop names its hoisting and its
steps (`kernels.observe.entered`). The text encoders and the autoencoder are wrapped here while a
picture is counted.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fastdiff.bench.tally import Counter, Tally
from fastdiff.compiler.loop_state import loop_of
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError
from fastdiff.kernels.observe import counting, entering, scope, watching
from fastdiff.recipes import autoencoder
from fastdiff.runtime.loop import STEP

REST = "the rest"


@dataclass(frozen=True)
class Block:
    """What a block takes each time it runs."""

    name: str
    per: str
    """"step" for what every step repeats, "image" for what is done once per picture."""
    work: Tally


@dataclass
class _Ledger:
    """The entries of a picture so far."""

    per: str = "image"
    seen: dict[str, str] = field(default_factory=dict)
    """"step" or "image" for each block, ordered by when it was last left; so a block comes after
    the blocks within it."""
    calls: list[Callable[[], object]] = field(default_factory=list)
    stepped: bool = False
    """Whether the first step has run."""

    def told(self, block: str) -> None:
        self.seen.pop(block, None)
        self.seen[block] = self.per


def count_blocks(
    pipe: Any, draw: Callable[[], object]
) -> tuple[list[Block], list[Callable[[], object]]]:
    """Count what `draw` makes a compiled pipeline do, block by block.

    Only the first step runs, since a plan's steps are alike. On a CPU the pictures are not valid.

    Returns:
        The blocks in the order in which a picture leaves them, a step's once; and the calls that
        make up a picture with one step. Each can be called again, and then runs unrecorded.

    Raises:
        UserError: the loop does not run as a plan.
    """
    device = torch.device(pipe.device)
    with _one_step(_Ledger()):
        # a first picture, so that what is kept for the next is not counted
        _count(draw, device, _Ledger())
    ledger = _Ledger()
    with ExitStack() as stack:
        stack.enter_context(_one_step(ledger))
        for owner, name, block in _entrances(pipe):
            stack.enter_context(_entered(owner, name, block, ledger))
        tallies = _count(draw, device, ledger)
    if STEP not in ledger.seen:
        loop = loop_of(pipe)
        reason = "its loop is not compiled" if loop is None else "; ".join(loop.own)
        raise UserError(f"a roofline needs a loop that runs as a plan: {reason}")
    order = [block for block in ledger.seen if block] + [""]
    blocks = [
        Block(name or REST, ledger.seen.get(name, "image"), tallies[name])
        for name in order
        if tallies.get(name, Tally()) != Tally()
    ]
    return blocks, ledger.calls


def _count(draw: Callable[[], object], device: torch.device, ledger: _Ledger) -> dict[str, Tally]:
    with counting() as called, Counter(device, called) as counter:

        def told(block: str) -> None:
            counter.block = block
            ledger.told(block)

        with watching(told):
            draw()
    return dict(counter.blocks)


@contextmanager
def _one_step(ledger: _Ledger) -> Iterator[None]:
    """In this block, a loop runs only its first step. The step and the hoisting are blocks."""

    def enter(block: str, call: Callable[[], Any]) -> Any:
        if block == STEP and ledger.stepped:
            return None
        ledger.stepped = ledger.stepped or block == STEP

        def again() -> Any:
            with scope(block):
                return call()

        ledger.calls.append(again)
        ledger.per = "step" if block == STEP else "image"
        made = again()
        ledger.per = "image"
        return made

    with entering(enter):
        yield


def _entrances(pipe: Any) -> Iterator[tuple[Any, str, str]]:
    """The calls of a picture besides its steps: an owner, the attribute it calls, a name."""
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if (encoder := getattr(pipe, name, None)) is not None:
            yield encoder, "forward", name.replace("_", " ")
    vae = autoencoder(pipe)
    if vae is None:
        return
    slot = slot_of(vae.decoder)
    if slot is not None and slot.network is not None:
        yield slot.network.run, "function", "VAE"
    else:
        yield vae.decoder, "forward", "VAE"


@contextmanager
def _entered(owner: Any, name: str, block: str, ledger: _Ledger) -> Iterator[None]:
    """Make calls of an attribute a block, and keep them."""
    function = getattr(owner, name)

    def enter(*args: Any, **kwargs: Any) -> Any:
        def again() -> Any:
            with scope(block):
                return function(*args, **kwargs)

        ledger.calls.append(again)
        return again()

    with _replaced(owner, name, enter):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of `owner` in this block."""
    inherited, before = name not in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
