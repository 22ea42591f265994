"""What every denoising network gives a loop before its first step.

A tree is a tensor, or a (named) tuple of trees; None stands for what is absent. Other values in it
are part of what a step is recorded for.
"""

from typing import Any, NamedTuple


class Hoisted(NamedTuple):
    """What does not depend on the latents, computed once for an image."""

    rows: Any
    """A tree of tensors [steps, n, …]: what depends on the timestep, n = 1 where all pictures
    share it."""
    constants: Any
    """A tree: what stays the same in all steps. A tensor without elements is switched off for now:
    where one of another shape was recorded, zeros stand for it."""
