"""Sequences of edits applied to both twins, which draw a picture after each edit."""

import random
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from edits.table import KINDS, TABLE, Edit
from edits.twins import LEAST, Fate, Twin, attempt, draw, fault, twins

SEED = 20261128
REFUSED = "a sentence"


@dataclass(frozen=True)
class Sequence:
    """The edits in order, and the index of the edit before which the fast twin is compiled."""

    name: str
    edits: tuple[Edit, ...]
    compiled_before: int

    def __str__(self) -> str:
        done = [edit.id for edit in self.edits]
        done.insert(self.compiled_before, "compile")
        return f"{self.name}: {' | '.join(done)}"


def drawn_at_random(number: int, length: int = 3) -> Sequence:
    """The random sequence with this number; all kinds of edits are equally likely."""
    dice = random.Random(f"{SEED} {number}")
    chosen = [
        dice.choice([edit for edit in TABLE.values() if edit.kind == kind])
        for kind in dice.choices(KINDS, k=length)
    ]
    return Sequence(f"sequence-{number}", tuple(chosen), dice.choice([0, 0, 1]))


def alone(edit: Edit, compiled_before: int) -> Sequence:
    """One edit, after or before compile."""
    return Sequence("alone", (edit,), compiled_before)


def first_fault(sequence: Sequence) -> str | None:
    """The first difference between the compiled twin and the eager one, or None.

    If fastdiff refuses a callback with a UserError, the sequence ends without a fault.
    """
    eager, fast = both = twins()
    with ExitStack() as undo:
        for at, edit in enumerate(sequence.edits):
            if at == sequence.compiled_before:
                fast.compile()
            if at == sequence.compiled_before == 0:
                attempt(lambda: draw(fast))  # so that a recording exists
            for twin in both:
                twin.dice = random.Random(f"{sequence.name} {at}")
            found = _edited(edit, both, undo) or _drawn(both)
            if found:
                return None if found == REFUSED else f"after {edit.id}: {found}"
        if sequence.compiled_before == len(sequence.edits):
            fast.compile()
        for _ in range(2):  # the second picture replays the recording
            found = _drawn(both)
            if found:
                return None if found == REFUSED else f"at last: {found}"
    return None


def _edited(edit: Edit, both: tuple[Twin, Twin], undo: ExitStack) -> str | None:
    if edit.everywhere is not None:
        undo.enter_context(edit.everywhere(both[0].dice))
    apply = edit.apply or (lambda twin: None)
    eager, fast = (attempt(lambda twin=twin: apply(twin)) for twin in both)
    return fault(Fate(error=eager.error), Fate(error=fast.error), 0) or _saved(both)


def _saved(both: tuple[Twin, Twin]) -> str | None:
    eager, fast = ([*twin.saved] for twin in both)
    return fault(Fate(eager), Fate(fast), float("inf"))


def _drawn(both: tuple[Twin, Twin]) -> str | None:
    for twin in both:
        twin.seen.clear()
    eager, fast = (attempt(lambda twin=twin: (draw(twin), twin.seen)) for twin in both)
    asked = "callback_on_step_end" in both[1].call
    if eager.error is None and asked and refused(fast):
        return REFUSED
    return fault(eager, fast, least(both[1]))


def refused(fate: Fate) -> bool:
    """Whether fastdiff refused with a UserError."""
    return type(fate.error).__name__ == "UserError"


def least(twin: Twin) -> float:
    """Minimum PSNR between the twins' pictures in dB; infinite (bit-equal) after a full restore."""
    if twin.exact:
        return float("inf")
    tensors: Iterable[torch.Tensor] = [*twin.pipe.unet.parameters(), *twin.pipe.vae.parameters()]
    dtypes = {tensor.dtype for tensor in tensors} & set(LEAST)
    if twin.around:
        dtypes.add(torch.bfloat16)
    return min(LEAST[dtype] for dtype in dtypes)
