"""Counts from drawing real pictures that do not vary: recordings, compilations, memory."""

from dataclasses import dataclass
from typing import Any

from fastdiff.bench.memory import Baseline, peak_bytes
from fastdiff.bench.timing import picture
from fastdiff.runtime import recordings

STEPS = 2
LARGER = 64
"""How many pixels higher the other size is: whole latents for every U-Net."""


@dataclass(frozen=True)
class Drawn:
    """Recordings (CUDA graphs, or tapes on a CPU) made by successive pictures of one pipeline."""

    first: int
    """By two pictures of one size, because a decoder is recorded at its second call."""
    again: int
    """By a third picture of that size; should be none."""
    other_size: int
    """By two pictures of another size."""
    back: int
    """By another picture of the first size; should be none."""
    compilations: int
    """Graphs that torch compiled for all of them; none without torch.compile."""
    peak_bytes: int
    """Peak memory of a picture of the first size; see `memory`."""


def drawn(pipe: Any, height: int, width: int, before: Baseline) -> Drawn:
    """Draw with a compiled pipeline that has not drawn yet; sizes in pixels.

    before: the baseline from before it was compiled, since compiling keeps memory, too.
    """

    def draw(height: int = height) -> None:
        picture(pipe, height, width, STEPS, output_type="pt")

    compiled = _compilations()
    made = []
    for pictures, side in ((2, height), (1, height), (2, height + LARGER), (1, height)):
        start = recordings.made()
        for _ in range(pictures):
            draw(side)
        made.append(recordings.made() - start)
    first, again, other_size, back = made
    compilations = _compilations() - compiled
    return Drawn(first, again, other_size, back, compilations, peak_bytes(pipe, before, draw))


def _compilations() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
