"""The page's figures: ratios, samples, history, rooflines."""

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from fastdiff.regression.comparison import Comparison, Line
from fastdiff.regression.history import Point
from fastdiff.regression.reports import svg, words
from fastdiff.regression.reports.roofline import Roofline

COLORS = {
    "slower": svg.SLOWER,
    "faster": svg.FASTER,
    "same": svg.SAME,
    "inconclusive": svg.UNDECIDED,
    "incomparable": svg.UNDECIDED,
}
ROWS = 40
"""Rows in the figure of ratios; the table has them all."""
LEFT, RIGHT = 330, 160
"""Pixels for a name of 40 letters in the widest font, and for a ratio with its interval."""
DOTS = 240
"""Dots per side in a figure of samples, which keeps a page small."""
STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def ratios(comparison: Comparison, width: int) -> str:
    """Each line's ratio with its interval, worst first, over the band of the noise floor."""
    lines = drawn(comparison)
    ends = [x for line in lines for x in (line.ratio, line.lo, line.hi) if x and x > 0]
    far = 1.15 * max([abs(math.log(x)) for x in ends] + [2 * comparison.floor])
    far = min(far, math.log(16))

    beside = width > 500  # the name is beside its interval, else above it
    left, right, each = (LEFT, RIGHT, 28) if beside else (1, 8, 44)

    inside = width - left - right
    band = (1 - comparison.floor, 1 + comparison.floor)
    rule = (-left / inside, 1 + right / inside)

    def paint(axes: Axes) -> None:
        place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
        across: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "clip_on": False}
        for row, line in enumerate(lines):
            top = row - 0.5 if beside else row  # neither band nor line crosses a name
            axes.fill_between(band, top, row + 0.5, color=svg.BAND, lw=0)
            axes.plot([1, 1], [top, row + 0.5], color=svg.MUTED, lw=0.75, solid_capstyle="butt")
            axes.plot(rule, [row + 0.5] * 2, **across, color=svg.RULE, lw=0.75)
            _interval(axes, row + (0 if beside else 0.24), line)
            name = fitted(line.name, left - 6 if beside else inside - 52)
            value = words.change(line.ratio, line.lo, line.hi)
            bold = "bold" if line.verdict == "slower" else "normal"
            if beside:
                axes.text(rule[0], row, name, weight=bold, **place)
                axes.text(rule[1], row, value, ha="right", color=svg.MUTED, **place)
            else:
                value = words.times(line.ratio or 0)
                axes.text(0, row - 0.2, name, weight=bold, **place)
                axes.text(1, row - 0.2, value, ha="right", color=svg.MUTED, **place)
        axes.set_xscale("log")
        axes.set_xlim(math.exp(-far), math.exp(far))
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.yaxis.set_major_locator(NullLocator())
        _ratio_ticks(axes, far, inside // 110)
        axes.set_xlabel("× base, lower is better")

    title = f"Ratios of new to base with their intervals, {len(lines)} rows"
    return svg.draw(width, 50 + each * len(lines), title, paint, (left, right, 4, 46))


def drawn(comparison: Comparison) -> list[Line]:
    """The lines that `ratios` draws."""
    return [x for x in comparison.lines if x.ratio is not None and x.ratio > 0][:ROWS]


def fitted(text: str, pixels: float) -> str:
    """The start of a name that fits `pixels` in the widest font, bold, at 12 pixels."""
    line = words.plain(text)
    for i, c in enumerate(line):
        pixels -= _width(c)
        if pixels < 0:
            return line[: max(i - 1, 0)] + "…"
    return line


def _width(c: str) -> float:
    if c in " .,:;·|'!ijltfI()[]/":
        return 5.5
    if c in "mwMW@%…" or unicodedata.east_asian_width(c) in "WF":
        return 13
    return 9.6 if c.isupper() else 8.4


def _interval(axes: Axes, y: float, line: Line) -> None:
    color = COLORS[line.verdict]
    ratio = line.ratio or math.nan
    if line.lo is None or line.hi is None:
        axes.plot([ratio], [y], marker="D", ms=5, color=color, mew=0)
        return
    ends = [max(line.lo, 1e-6), line.hi]  # a logarithmic axis has no zero
    axes.plot(ends, [y, y], color=color, lw=3, solid_capstyle="round", alpha=0.45)
    axes.plot([ratio], [y], marker="o", ms=6, color=color, mew=0)


def _ratio_ticks(axes: Axes, far: float, most: int) -> None:
    """1 in the middle and round numbers on both sides; a log axis would only have powers of 10."""
    if far > math.log(1.9):
        ticks = [2.0**power for power in range(-4, 5) if abs(power) * math.log(2) <= far]
    else:
        step = next(step for step in STEPS if math.expm1(far) / step < most)
        ticks = [1 + step * i for i in range(-4, 5) if 1 + step * i > 0]
        ticks = [tick for tick in ticks if abs(math.log(tick)) <= far]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:.4g}"))


def samples(line: Line, width: int) -> str:
    """All rounds of both sides, a lane per process; a tall stroke is the median."""
    sides = (
        ("base", line.base_samples, line.base, svg.BASE),
        ("new", line.new_samples, line.new, svg.NEW),
    )
    values = np.array([x for _, side, _, _ in sides for process in side for x in process])
    # draw outliers at the edge, or they would squeeze all others into a line
    low, high = np.quantile(values, [0.01, 0.98])
    margin = 0.08 * (high - low) or 0.02 * abs(high) or 1.0
    low, high = low - margin, high + margin

    def paint(axes: Axes) -> None:
        for top, (name, processes, median, color) in enumerate(sides):
            for lane, process in enumerate(processes):
                every = math.ceil(len(process) * len(processes) / DOTS)
                dots = np.clip(np.array(process[::every]), low, high)
                y = np.full(len(dots), top - 0.26 + 0.52 * (lane + 0.5) / len(processes))
                axes.scatter(dots, y, s=13, color=color, alpha=0.5, lw=0)
            if median is not None:
                axes.plot([median] * 2, [top - 0.34, top + 0.34], color=color, lw=2)
            place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
            axes.text(-0.02, top, name, ha="right", color=svg.MUTED, **place)
        axes.set_xlim(low, high)
        axes.set_ylim(1.5, -0.5)
        axes.yaxis.set_major_locator(NullLocator())
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(words.plain(line.unit, 20))

    title = f"Samples of {words.plain(line.name)}"
    return svg.draw(width, 132, title, paint, (40, 14, 4, 40))


def history(points: Sequence[Point], width: int) -> str:
    """The backends of one case on one machine over the commits, which are evenly spaced."""
    when = {key: x for x, key in enumerate(dict.fromkeys((p.created, p.commit) for p in points))}
    series: dict[str, list[Point]] = {}
    for point in points:
        series.setdefault(backend(point), []).append(point)
    last = {name: own[-1].value for name, own in series.items()}
    top = max(point.hi for point in points)
    heights = spread([last[name] for name in series], 0.075 * max(top, 1.0))

    def paint(axes: Axes) -> None:
        axes.axhline(1, color=svg.MUTED, lw=0.75)
        for (name, own), height in zip(series.items(), heights, strict=True):
            ours = name == "fastdiff"
            color = svg.NEW if ours else svg.BASE
            x = [when[point.created, point.commit] for point in own]
            y = [point.value for point in own]
            for a, point in zip(x, own, strict=True):
                axes.plot([a, a], [point.lo, point.hi], color=color, lw=2, alpha=0.45)
            axes.plot(x, y, color=color, marker="o", ms=4.5, mew=0, lw=2.2 if ours else 1)
            label = f"{fitted(name, 104)} {last[name]:.2f}"
            place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
            weight = "bold" if ours else "normal"
            axes.text(
                1.02, height, label, color=svg.INK if ours else svg.MUTED, weight=weight, **place
            )
        axes.set_xlim(-0.25, len(when) - 0.75)
        axes.set_ylim(0, 1.08 * max(top, 1.0, *heights))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.grid(axis="y", color=svg.RULE, lw=0.75)
        axes.set_axisbelow(True)
        keep = range(0, len(when), math.ceil(len(when) / ((width - 170) // 90)))
        names = [(commit or "–", created[:10]) for created, commit in when]
        ticks = [f"{words.plain(names[i][0], 8)}\n{names[i][1]}" for i in keep]
        axes.set_xticks(list(keep), ticks)

    where = f"{words.plain(points[0].name)} on {words.plain(points[0].machine)}"
    title = f"{where}: × eager, {len(when)} commits"
    return svg.draw(width, 280, title, paint, (30, 140, 12, 44))


def backend(point: Point) -> str:
    return point.name.rpartition(words.SEPARATOR)[2]


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, moved up until no two are closer than `gap`, so that labels do not overlap."""
    placed = list(heights)
    order = sorted(range(len(placed)), key=placed.__getitem__)
    for below, above in zip(order, order[1:], strict=False):
        placed[above] = max(placed[above], placed[below] + gap)
    return placed


def roofline(roof: Roofline, width: int) -> str:
    """Speed over arithmetic intensity; numbers refer to the rows of the table below the figure."""
    points = roof.drawable
    ridge = roof.tflops / roof.tbytes
    across = [point.intensity for point in points] + [ridge]
    left, right = min(across) / 3, max(across) * 3
    speeds = [point.tflops or roof.roof(point.intensity) for point in points]
    bottom = min([*speeds, roof.roof(left)]) / 2

    def paint(axes: Axes) -> None:
        edge = [left, ridge, right]
        axes.plot(edge, [roof.roof(x) for x in edge], color=svg.INK, lw=1.5)
        axes.axvline(ridge, color=svg.RULE, lw=0.75)
        for number, (point, speed) in enumerate(zip(points, speeds, strict=True), 1):
            fill = svg.NEW if point.tflops else svg.PAPER
            axes.plot(point.intensity, speed, marker="o", ms=6, mfc=fill, mec=svg.NEW, ls="")
            axes.annotate(
                str(number), (point.intensity, speed), (5, -9), textcoords="offset points"
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(left, right)
        axes.set_ylim(bottom, roof.tflops * 1.6)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.6g}"))
            axis.set_minor_locator(NullLocator())
        axes.grid(color=svg.RULE, lw=0.75)
        axes.set_axisbelow(True)
        axes.set_xlabel("FLOP per byte")
        axes.text(0, 1.03, "TFLOP/s", color=svg.MUTED, ha="right", transform=axes.transAxes)

    title = f"Roofline of {words.plain(roof.gpu)}, {len(points)} points"
    return svg.draw(width, 340, title, paint, (52, 14, 24, 44))
