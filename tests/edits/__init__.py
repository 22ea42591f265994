"""What users do to a pipeline: a table of edits, and twins to which they are done."""

from edits import calls, functions, loops, networks, savers, weights  # each fills the table
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
