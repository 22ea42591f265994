"""What every denoising network computes before a loop's first step.

A tree is a tensor, a (named) tuple of trees, or None for an absent part. Other values in a tree are
fixed in the recording of a step.
"""

from typing import Any, NamedTuple


class Hoisted(NamedTuple):
    """Values that do not depend on the latents, computed once per picture."""

    rows: Any
    """A tree of tensors [steps, n, …]: values that depend on the timestep; n = 1 if all pictures
    share them."""
    constants: Any
    """A tree of values that all steps share. An empty tensor is switched off for now: if a
    recording has one of another shape in its place, it reads zeros."""
