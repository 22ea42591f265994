"""What drawing real pictures takes that does not jitter: recordings, compilations, memory."""

from dataclasses import dataclass
from typing import Any

from fastdiff.bench.memory import Baseline, peak_bytes
from fastdiff.bench.timing import picture
from fastdiff.runtime import recordings

STEPS = 2
LARGER = 64
"""Pixels that the other size is higher: whole latents of every U-Net, whatever it halves."""


@dataclass(frozen=True)
class Drawn:
    """CUDA graphs captured, or tapes recorded on a CPU, by the pictures of one pipeline in turn."""

    first: int
    """By two of one size: a decoder is recorded when it is called again."""
    again: int
    """By a third of it: none."""
    other_size: int
    """By two of another size."""
    back: int
    """By the first size once more: none."""
    compilations: int
    """Graphs that torch compiled for all of them together: none but with torch.compile."""
    peak_bytes: int
    """Of a picture of the first size; see `memory`."""


def drawn(pipe: Any, height: int, width: int, before: Baseline) -> Drawn:
    """Draw with a compiled pipeline that has not drawn yet; sides in pixels.

    before: what there was before it was compiled, for what compiling keeps is its memory, too.
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
