"""What of a network's work stays the same while an image is drawn, computed before its steps."""

from typing import Any, NamedTuple


class Hoisted(NamedTuple):
    rows: Any
    """A tree (NamedTuple, tuple or dict) of tensors [steps, n, ...]: what a step reads is its row.
    None stands for what is absent."""
    constants: Any
    """A tree of tensors that every step reads; leaves that are no tensors belong to the recording's
    key."""
