"""Compares two sides: each row and counter becomes a line with a verdict."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastdiff.bench.gates import DRAWN, PEAK, Number
from fastdiff.bench.stats import (
    CONFIDENCE,
    Estimate,
    Judged,
    Ratio,
    across_processes,
    between_runs,
    judge,
    mean,
    ratio_of,
)
from fastdiff.regression.comparison import Comparison, Line, Verdict, within
from fastdiff.regression.documents import Pair, Side, Timed
from fastdiff.tables import plural

FLOOR, APART_FLOOR = 0.03, 0.10
"""The share by which states may differ and still count as the same: if they took turns, and if
they ran separately, because a machine's speed varies more between runs
(`bench.stats.between_runs`)."""

MORE_IS_BETTER = ("occupancy", "load", "store", "generation")
WRONG = "wrong results"
FIRST, FIRST_FLOOR = " · first picture", 0.25
"""The suffix of rows timed once per process, including preparation; and the noise floor for
them."""
TOLERANCE = {PEAK: 0.01}
"""Tolerances by unit; all other counters are compared exactly."""
OF_THE_GPU = (PEAK, "kernels")
"""Units of counters that also depend on the machine."""
MATTERS = (
    *("fastdiff._C", "python", "torch", "diffusers", "transformers", "triton", "numpy"),
    *("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13"),
)
"""Packages whose versions change times or counts of unchanged code."""

ORDER: tuple[Verdict, ...] = ("slower", "incomparable", "inconclusive", "faster", "same")


def compare(pair: Pair, command: str, floor: float | None = None) -> Comparison:
    """Compare every row and counter; `floor`: as a share, None for the default of its kind."""
    if floor is None:
        floor = FLOOR if pair.taken_in_turn else APART_FLOOR
    machines = _different(pair.base.state.machine, pair.new.state.machine, _is_hardware)
    updates = _different(pair.base.state.versions, pair.new.state.versions, MATTERS.__contains__)
    cases = sorted({pair.base.case, pair.new.case})
    other = [f"BASE is {pair.base.case} and NEW is {pair.new.case}"] if len(cases) == 2 else []
    apart = [] if pair.taken_in_turn else [*other, *machines, *updates]
    times, overall = _times(pair, floor, apart)
    counts = _counts(pair, [] if pair.taken_in_turn else [*other, *updates], machines, bool(other))
    lines = [*_wrong(pair), *times, *counts]
    rank = {verdict: at for at, verdict in enumerate(ORDER)}
    lines.sort(key=lambda line: (rank[line.verdict], line.unit != WRONG, -(line.ratio or 0.0)))
    return Comparison(
        base=pair.base.state,
        new=pair.new.state,
        lines=tuple(lines),
        geomean=overall,
        floor=floor,
        confidence=CONFIDENCE,
        paired=pair.taken_in_turn,
        command=command,
        case=" / ".join(cases),
        differences=(
            *other,
            *machines,
            *updates,
            *_without_counters(pair),
            *_without_drawing(pair),
        ),
    )


def _times(pair: Pair, floor: float, apart: list[str]) -> tuple[list[Line], Ratio | None]:
    """Lines for the times, and the geometric mean of those that can be compared."""
    base, new = pair.base.times, pair.new.times
    both = [name for name in base if name in new and base[name].times and new[name].times]
    lines = [
        replace(_timed(name, base.get(name), new.get(name)), note=why)
        for name, why in _one_sided(pair.base, pair.new, both)
    ]
    if apart:
        note = f"{apart[0]}; measure both on one machine, in turn (fastdiff compare)"
        return [*lines, *(replace(_timed(n, base[n], new[n]), note=note) for n in both)], None
    estimates = [_estimate(base[name], new[name], pair.taken_in_turn) for name in both]
    unit = "more process pair" if pair.taken_in_turn else "more round"
    floors = [max(floor, FIRST_FLOOR) if name.endswith(FIRST) else floor for name in both]
    for name, found in zip(both, judge(estimates, floors), strict=True):
        line = _timed(name, base[name], new[name])
        lines.append(
            replace(
                line,
                verdict=found.verdict,
                note=_advice(found, unit),
                ratio=found.ratio.median,
                lo=found.ratio.lo,
                hi=found.ratio.hi,
            )
        )
    steady = {
        name: estimate
        for name, estimate in zip(both, estimates, strict=True)
        if not name.endswith(FIRST)
    }
    return lines, _geomean(pair, steady)


def _estimate(base: Timed, new: Timed, in_turn: bool) -> Estimate:
    if in_turn:
        return across_processes(base.times, new.times)
    both = base.yardstick is not None and new.yardstick is not None
    yardsticks = (base.yardstick, new.yardstick) if both else (None, None)
    return between_runs(base.times[0], new.times[0], *yardsticks)


def _geomean(pair: Pair, estimates: Mapping[str, Estimate]) -> Ratio | None:
    """The geometric mean of rows by name; pair by pair if they share process pairs, which vary
    together."""
    if not estimates:
        return None
    sides = (pair.base.times, pair.new.times)
    if pair.taken_in_turn:
        pairs = min(len(pair.base.times[name].times) for name in estimates)
        before, after = (
            [[_middle_of_rows(side[name].times[at] for name in estimates)] for at in range(pairs)]
            for side in sides
        )
        overall = across_processes(before, after)
    else:
        overall = mean(list(estimates.values()))
    lo, hi = overall.interval(1 - CONFIDENCE)
    return Ratio(ratio_of(overall.log), ratio_of(lo), ratio_of(hi))


def _middle_of_rows(rows: Iterable[Sequence[float]]) -> float:
    """The geometric mean of the rows' medians."""
    return float(np.exp(np.mean([np.log(np.median(row)) for row in rows])))


def _counts(pair: Pair, updates: list[str], machines: list[str], other_case: bool) -> list[Line]:
    base, new = pair.base.counts, pair.new.counts
    lines = []
    if undrawn := _without_drawing(pair):
        base, new = ({k: n for k, n in side.items() if n[1] not in DRAWN} for side in (base, new))
        if pair.base.drawn:  # a former gate must not disappear silently
            lines.append(
                Line("drawn pictures", "count", "", None, None, "incomparable", undrawn[0])
            )
    both = [name for name in base if name in new]
    for name in both:
        apart = [*updates, *(machines if base[name][1] in OF_THE_GPU else [])]
        line = _counted(name, base[name], new[name], apart)
        lines.append(replace(line, verdict="incomparable", note=apart[0]) if other_case else line)
    if base and not new:
        note = "NEW has no counters, but BASE does"
        return [Line("counters", "count", "", None, None, "incomparable", note)]
    if _without_counters(pair):
        return lines
    for name in [*base, *new]:
        if name not in both:
            before, after = base.get(name), new.get(name)
            where = "NEW" if before is None else "BASE"
            line = Line(
                name=name,
                kind="count",
                unit=(before or after or (0, ""))[1],
                base=_value(before),
                new=_value(after),
                verdict="incomparable",
                note=f"only in {where}",
            )
            if (
                not pair.taken_in_turn and not updates and not other_case
            ):  # a counter of the baseline is gone
                note = f"only in {where}: if this is intended, count BASE again and commit it"
                line = replace(line, verdict="slower", note=note)
            lines.append(line)
    return lines


def _without_counters(pair: Pair) -> list[str]:
    """Whether one of the two states has no counters, because it is older than them."""
    silent = [name for name, side in (("BASE", pair.base), ("NEW", pair.new)) if not side.counts]
    return [f"{silent[0]} has no counters, so none are compared"] if len(silent) == 1 else []


def _without_drawing(pair: Pair) -> list[str]:
    """Whether only one of two counts drew pictures, so that rows are missing in the other."""
    if None in (pair.base.drawn, pair.new.drawn) or pair.base.drawn == pair.new.drawn:
        return []
    has, lacks = ("BASE", "NEW") if pair.base.drawn else ("NEW", "BASE")
    return [
        f"only {has} was counted with --draw, so recordings, compilations and peak memory are not"
        f" compared; count {lacks} with --draw, too"
    ]


def _counted(name: str, base: Number, new: Number, updates: list[str]) -> Line:
    (before, unit), (after, _) = base, new
    worse = before - after if unit in MORE_IS_BETTER else after - before
    allowed = TOLERANCE.get(unit, 0.0) * abs(before)
    verdict: Verdict = "slower" if worse > allowed else "faster" if worse < -allowed else "same"
    note = ""
    if updates and verdict == "slower":
        verdict, note = "incomparable", f"{updates[0]}: count BASE again with what is installed now"
    return Line(
        name=name,
        kind="count",
        unit=unit,
        base=before,
        new=after,
        verdict=verdict,
        note=note,
        ratio=after / before if before else None,
    )


def _wrong(pair: Pair) -> list[Line]:
    """A state with wrong results is a regression, however fast it is."""
    lines = []
    for name in {**pair.base.wrong, **pair.new.wrong}:
        before, after = pair.base.wrong.get(name), pair.new.wrong.get(name)
        lines.append(
            Line(
                name=f"{name} · result",
                kind="count",
                unit=WRONG,
                base=int(before is not None),
                new=int(after is not None),
                verdict="slower" if after and not before else "incomparable",
                note=after or f"BASE: {before}",
            )
        )
    return lines


def _one_sided(base: Side, new: Side, both: list[str]) -> list[tuple[str, str]]:
    """Rows for which one state has no times, and why."""
    known = set(both)
    found = []
    for name in {**base.times, **new.times}:
        wrong = any(within(name, part) for part in (*base.wrong, *new.wrong))
        if name not in known and not wrong:
            where = "NEW" if name in new.times else "BASE"
            found.append((name, f"only in {where}"))
    return found


def _timed(name: str, base: Timed | None, new: Timed | None) -> Line:
    """A line of times, not compared yet."""
    before, after = (() if side is None else side.times for side in (base, new))
    return Line(
        name=name,
        kind="time",
        unit="ms",
        base=_middle(before),
        new=_middle(after),
        verdict="incomparable",
        base_samples=before,
        new_samples=after,
    )


def _middle(times: tuple[tuple[float, ...], ...]) -> float | None:
    samples = [sample for process in times for sample in process]
    return float(np.median(samples)) if samples else None


def _advice(found: Judged, unit: str) -> str:
    if found.verdict != "inconclusive":
        return ""
    return f"about {plural(found.missing, unit)} would settle it"


def _value(number: Number | None) -> float | None:
    return None if number is None else number[0]


def _is_hardware(key: str) -> bool:
    return key != "memory_bytes"  # a virtual machine's memory differs after each start


def _different(
    base: Mapping[str, Any], new: Mapping[str, Any], matters: Callable[[str], bool]
) -> list[str]:
    return [
        f"{key} is {base.get(key)} in BASE and {new.get(key)} in NEW"
        for key in dict.fromkeys((*base, *new))
        if matters(key) and base.get(key) != new.get(key)
    ]
