"""Figures in the colours of the page, each for a wide and for a narrow screen."""

import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fastdiff.regression.reports import svg
from fastdiff.regression.reports.plots import fitted

WIDTHS = {"wide": 680, "narrow": 330}
"""Pixels: the text of a figure must not shrink with the screen."""
ROW, FOOT, LINE = 40, 42, 15
"""Pixels of a row, of the axis below the rows, and of each further line of its label."""
LETTER = 8.2
"""Pixels of a digit."""


@dataclass(frozen=True)
class Row:
    """A row of a figure: a name, a mark drawn from `values`, and a number."""

    name: str
    values: Sequence[float]
    label: str
    strong: bool = False
    """Whether it is one of our kernels."""
    ratio: float | None = None


def bars(title: str, unit: str, rows: Sequence[Row]) -> str:
    """A bar from zero for the first value of each row."""

    def paint(axes: Axes, at: float, row: Row) -> None:
        axes.barh(at, row.values[0], 0.26, color=_color(row), lw=0)

    return _figures(title, unit, rows, paint, from_zero=True)


def stacked(title: str, unit: str, rows: Sequence[Row], colors: Sequence[str]) -> str:
    """The values of each row, one after another."""

    def paint(axes: Axes, at: float, row: Row) -> None:
        left = 0.0
        for value, color in zip(row.values, colors, strict=True):
            axes.barh(at, value, 0.26, left=left, color=color, lw=0)
            left += value

    return _figures(title, unit, rows, paint, from_zero=True, total=True)


def dots(title: str, unit: str, rows: Sequence[Row], log: bool = False, mark: float = 0) -> str:
    """A dot for each value, and a line at their median; `mark`: where a line crosses all rows."""

    def paint(axes: Axes, at: float, row: Row) -> None:
        shifts = [at + 0.09 * (index % 3 - 1) for index in range(len(row.values))]
        axes.plot(row.values, shifts, "o", ms=3.2, mew=0, color=_color(row), alpha=0.45)
        middle = statistics.median(row.values)
        axes.plot([middle, middle], [at - 0.19, at + 0.19], color=svg.INK, lw=1.5)

    return _figures(title, unit, rows, paint, from_zero=not log, log=log, mark=mark)


def _color(row: Row) -> str:
    return svg.NEW if row.strong else svg.BASE


def _figures(
    title: str,
    unit: str,
    rows: Sequence[Row],
    paint_row: Callable[[Axes, float, Row], object],
    from_zero: bool,
    log: bool = False,
    mark: float = 0,
    total: bool = False,
) -> str:
    ends = [sum(row.values) for row in rows] if total else [x for row in rows for x in row.values]

    def paint(width: int) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            across = {"transform": axes.get_yaxis_transform(), "va": "center"}
            for at, row in enumerate(rows):
                room = width - 12 - LETTER * len(row.label)
                weight = "bold" if row.strong else "normal"
                axes.text(0, at - 0.22, fitted(row.name, room), weight=weight, **across)
                axes.text(1, at - 0.22, row.label, ha="right", color=svg.MUTED, **across)
                paint_row(axes, at + 0.18, row)
                if mark:
                    axes.plot([mark, mark], [at, at + 0.4], color=svg.MUTED, lw=0.75)
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.yaxis.set_major_locator(NullLocator())
            if log:
                axes.set_xscale("log")
                axes.set_xlim(min([*ends, mark or ends[0]]) / 1.2, max([*ends, mark]) * 1.2)
                axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=width // 60))
                axes.xaxis.set_minor_locator(NullLocator())
            else:
                axes.set_xlim(0 if from_zero else min(ends), max([*ends, mark]) * 1.02 or 1)
                axes.xaxis.set_major_locator(MaxNLocator(width // 90))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.6g}"))
            axes.set_xlabel("\n".join(_lines(unit, width)))

        return draw

    drawn = []
    for kind, width in WIDTHS.items():
        foot = FOOT + LINE * (len(_lines(unit, width)) - 1)
        height = ROW * len(rows) + foot
        text = svg.draw(width, height, title, paint(width), (2, 10, 0, foot))
        drawn.append(f'<div class="{kind}">{_flat(text)}</div>')
    return f'<figure class="plot">{"".join(drawn)}</figure>'


def _lines(unit: str, width: int) -> list[str]:
    return textwrap.wrap(unit, int(width / LETTER))


def _flat(text: str) -> str:
    """The SVG on lines without indentation or gaps, which Markdown would interpret."""
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())
