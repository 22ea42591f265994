"""Figures that take their colours from the page around them, light or dark."""

import io
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, RULE, BAND = "#010101", "#020202", "#030303", "#040404"
SLOWER, FASTER, SAME, UNDECIDED = "#050505", "#060606", "#070707", "#080808"
BASE, NEW, PAPER = "#090909", "#0a0a0a", "#0b0b0b"
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    BAND: "band",
    SLOWER: "slower",
    FASTER: "faster",
    SAME: "same",
    UNDECIDED: "undecided",
    BASE: "base",
    NEW: "new",
    PAPER: "paper",
}
"""Placeholder colours for the variables of the page's style sheet."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, in the page's font
    "text.parse_math": False,  # a name with two dollar signs is not mathematics
    "font.family": "DejaVu Sans",  # wider than a page's fonts, so text that fits here fits there
    "font.size": 9.0,  # points: 12 pixels
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.0,
    "axes.linewidth": 0.75,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "axes.unicode_minus": True,
    "path.simplify": True,
}


def draw(
    width: int, height: int, title: str, paint: Callable[[Axes], object], margins: tuple[int, ...]
) -> str:
    """An <svg> of this size. margins: left, right, top, bottom; all in pixels.

    title: the text for readers who cannot see the figure.
    """
    left, right, top, bottom = margins
    salt: dict[Any, Any] = {
        "svg.hashsalt": f"{title} {width}"
    }  # otherwise two figures on a page would share ids
    with warnings.catch_warnings(), matplotlib.rc_context(STYLE | salt):
        # the browser has fonts for glyphs that are missing in this one
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width / 96, height / 96))
        box = (left / width, bottom / height)
        size = (1 - (left + right) / width, 1 - (top + bottom) / height)
        axes = figure.add_axes((*box, *size))
        axes.patch.set_visible(False)
        paint(axes)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), title)


def _inline(document: str, title: str) -> str:
    """The <svg> element alone, without parts that would affect the page around it."""
    element = document[document.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r"<style[^>]*>.*?</style>", "", element, flags=re.DOTALL)
    element = re.sub(r"<!--.*?-->\s*", "", element, flags=re.DOTALL)
    element = re.sub(r"<[a-z][^<>]*>", _tag, element)  # tags only: a name may look like a style
    label = f'role="img" aria-label="{escape(title, quote=True)}"'
    return element.replace("<svg", f"<svg {label}", 1).strip()


def _tag(found: re.Match[str]) -> str:
    """Turn placeholders into variables, leave the font to the page, keep only ids in use."""
    tag = re.sub(r'^<g id="[^"]*"', "<g", found[0])
    tag = re.sub(r"\s*font-family: [^;\"]*;?", "", tag)
    return re.sub(r"(?<=: )#0[0-9a-f]{5}", lambda color: _variable(color[0]), tag)


def _variable(color: str) -> str:
    return f"var(--{VARIABLES[color]})" if color in VARIABLES else color
