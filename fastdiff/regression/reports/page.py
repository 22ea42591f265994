"""A comparison, or a history, as one HTML page that needs no network."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fastdiff import installed
from fastdiff.errors import UserError
from fastdiff.regression.comparison import Comparison, Line, Verdict
from fastdiff.regression.history import Point
from fastdiff.regression.reports import words
from fastdiff.regression.reports.roofline import Roofline

WIDE, NARROW, PANEL = 860, 360, 320
"""Pixels. Text in a figure must not shrink with the screen, so each figure is drawn twice."""
PANELS = 12
VERDICTS: tuple[Verdict, ...] = ("slower", *words.OTHERS)


@dataclass(frozen=True)
class Figure:
    """One figure for two screen widths; a `panel` has only one."""

    title: str
    wide: str
    narrow: str = ""


def page(
    comparison: Comparison,
    history: Sequence[Point] | None = None,
    rooflines: Sequence[Roofline] = (),
) -> str:
    """Summary, ratios, samples, history, rooflines, all rows and the environment."""
    plots = _plots()
    ratios = None
    if shown := plots.drawn(comparison):
        ratios = Figure(
            f"Ratios, the first {len(shown)}" if len(shown) == plots.ROWS else "Ratios",
            plots.ratios(comparison, WIDE),
            plots.ratios(comparison, NARROW),
        )
    sampled = [line for line in comparison.lines if _has_samples(line)][:PANELS]
    return _render(
        title=words.finding(comparison),
        comparison=comparison,
        counts={name: comparison.count(name) for name in VERDICTS},
        ratios=ratios,
        samples=[(line, plots.samples(line, PANEL)) for line in sampled],
        history=_history(history or ()),
        rooflines=_rooflines(rooflines),
    )


def history_page(points: Sequence[Point]) -> str:
    """The points from `history.read`, in one figure per case and machine."""
    machines = len({point.machine for point in points})
    commits = len({point.commit for point in points})
    title = f"{commits} commit{'s' * (commits != 1)} on {machines} machine{'s' * (machines != 1)}"
    return _render(
        title=title if points else "Nothing was measured yet",
        comparison=None,
        history=_history(points),
        rooflines=[],
    )


def _history(points: Sequence[Point]) -> list[Figure]:
    plots = _plots()
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        case = point.name.rpartition(words.SEPARATOR)[0]
        groups.setdefault((point.machine, case), []).append(point)
    return [
        Figure(
            f"{words.plain(case)}, on {words.plain(machine)}",
            plots.history(own, WIDE),
            plots.history(own, NARROW),
        )
        for (machine, case), own in groups.items()
    ]


def _rooflines(rooflines: Sequence[Roofline]) -> list[tuple[Roofline, Figure]]:
    plots = _plots()
    return [
        (
            roof,
            Figure(words.plain(roof.gpu), plots.roofline(roof, WIDE), plots.roofline(roof, NARROW)),
        )
        for roof in rooflines
        if roof.drawable
    ]


def _has_samples(line: Line) -> bool:
    return any(line.base_samples) and any(line.new_samples)


def _plots() -> Any:
    try:
        from fastdiff.regression.reports import plots
    except ImportError as error:
        raise _missing(error) from error
    return plots


def _render(**facts: Any) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise _missing(error) from error
    here = files("fastdiff.regression.reports")
    house = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = house.from_string(here.joinpath("page.html.jinja").read_text("utf-8"))
    style = here.joinpath("page.css").read_text("utf-8")
    return template.render(words=words, style=style, **facts)


def _missing(error: ImportError) -> UserError:
    return UserError(f"an HTML report needs {error.name} ({error}); {installed.pip('report')}")
