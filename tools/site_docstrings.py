"""Docstrings for mkdocstrings: shapes and formulas are text, which Markdown would read as links."""

import re
from typing import Any

import griffe

MARKS = "[*<"
KEPT = re.compile(rf"`[^`]*`|[{re.escape(MARKS)}]")


class Plain(griffe.Extension):
    """Escapes what Markdown takes for a link, emphasis or a tag, except in code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = escaped(obj.docstring.value)


def escaped(text: str) -> str:
    """A docstring's text with a backslash before such marks, except in `code` and in paragraphs of
    formulas, which are indented."""
    parts = re.split(r"(\n\n {4,}\S.*?(?=\n\n|\Z))", text, flags=re.S)
    return "".join(part if at % 2 else KEPT.sub(_mark, part) for at, part in enumerate(parts))


def _mark(found: re.Match[str]) -> str:
    return "\\" * (found[0] in MARKS) + found[0]
