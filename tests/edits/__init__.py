"""A table of edits that users make to a pipeline, and eager and compiled twins to apply them to."""

from edits import calls, functions, loops, networks, savers, weights  # each adds rows to TABLE
from edits.table import KINDS, TABLE, Edit

__all__ = [
    "KINDS",
    "TABLE",
    "Edit",
    "calls",
    "functions",
    "loops",
    "networks",
    "savers",
    "weights",
]
