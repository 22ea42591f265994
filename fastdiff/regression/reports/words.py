"""Words and numbers that all reports share."""

import math
from collections.abc import Mapping
from typing import Any

from fastdiff.bench.stats import Ratio
from fastdiff.regression.comparison import UNDECIDED, Comparison, Line, State, Verdict
from fastdiff.tables import plural

NONE = "–"
LONGEST = 160
BOUNDLESS = 1e12
SEPARATOR = " · "
MARKS = {"slower": "❌", "faster": "✅", "same": "➖", "inconclusive": "❔", "incomparable": "⚠️"}
COUNTED = {"slower": "more", "faster": "less"}
"""The verdicts on a counter."""
OTHERS: tuple[Verdict, ...] = ("faster", "same", "inconclusive", "incomparable")
OUTCOMES = {
    0: "nothing got slower or larger",
    1: "something got slower or larger",
    3: "nothing got slower or larger, but something is undecided",
}


def plain(text: object, limit: int | None = LONGEST) -> str:
    """One printable line: names from other people's files may hold newlines, terminal escape
    sequences, halves of surrogate pairs, or a megabyte."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "�" for c in line)
    return line if limit is None or len(line) <= limit else line[: limit - 1] + "…"


def amount(value: float | None, unit: str) -> str:
    """12.34 ms, 1,234 launches: a time with four digits, a count with all."""
    if value is None or not math.isfinite(value):
        return NONE
    if unit != "ms" and value == int(value):
        return f"{value:,.0f} {plain(unit, 20)}"
    digits = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(digits, 0), 9)}f} {plain(unit, 20)}"


def times(value: float) -> str:
    """A ratio: 1.104, 12.3, or ∞ for an unbounded end."""
    if abs(value) >= BOUNDLESS:
        return "∞"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def change(ratio: float | None, lo: float | None, hi: float | None) -> str:
    """1.104 [1.081, 1.129]; for a counter without interval."""
    if ratio is None:
        return NONE
    if lo is None or hi is None:
        return times(ratio)
    return f"{times(ratio)} [{times(lo)}, {times(hi)}]"


def geomean(ratio: Ratio) -> str:
    return change(ratio.median, ratio.lo, ratio.hi)


def verdict(line: Line) -> str:
    return COUNTED.get(line.verdict, line.verdict) if line.kind == "count" else line.verdict


def rounds(line: Line) -> str:
    """Processes × rounds of both sides, 3×21; once if they are equal."""
    base, new = _rounds(line.base_samples), _rounds(line.new_samples)
    return base if base == new else f"{base} / {new}"


def finding(comparison: Comparison) -> str:
    """2 of 14 rows got slower."""
    lines = comparison.lines
    if not lines:
        return "Nothing was compared"
    worse = [line for line in lines if line.verdict == "slower"]
    if worse:
        word = "larger" if all(line.kind == "count" for line in worse) else "slower"
        return f"{len(worse)} of {plural(len(lines), 'row')} got {word}"
    undecided = sum(line.verdict in UNDECIDED for line in lines)
    if undecided:
        are = "is" if undecided == 1 else "are"
        return f"Nothing got slower, but {undecided} of {plural(len(lines), 'row')} {are} undecided"
    return "Nothing got slower"


def headline(comparison: Comparison) -> str:
    """The finding, and the number of rows with each other verdict."""
    rest = [f"{count} {name}" for name in OTHERS if (count := comparison.count(name))]
    return SEPARATOR.join([finding(comparison), *rest])


def outcome(comparison: Comparison) -> str:
    code = comparison.exit_code
    words = OUTCOMES[code] if comparison.lines else "nothing was compared"
    return f"exit code {code}: {words}"


def rule(comparison: Comparison) -> str:
    """How verdicts are reached."""
    how = "in turns in one run" if comparison.paired else "in separate runs"
    return (
        "ratio is new over base, lower is better;"
        f" changes under {comparison.floor:.1%} are ignored;"
        f" at most {1 - comparison.confidence:.0%} of the reported changes are due to chance;"
        f" measured {how}"
    )


def case(comparison: Comparison) -> str:
    """What was measured, as the start of a sentence; may be empty."""
    return f"{plain(comparison.case, 120)}: " if comparison.case else ""


def state(side: State) -> str:
    """Its name (its commit, its time)."""
    facts = [plain(fact, 40) for fact in (side.commit, side.created) if fact]
    return plain(side.name) + (f" ({', '.join(facts)})" if facts else "")


def where(machine: Mapping[str, Any]) -> str:
    """One line for a machine of ours or of pytest-benchmark."""
    cpu, gpu = machine.get("cpu"), machine.get("gpu")
    if isinstance(cpu, Mapping):  # pytest-benchmark's
        cores = cpu.get("count")
        name = cpu.get("brand_raw") or cpu.get("brand")
    else:
        cores, name = machine.get("cores"), cpu
    facts = [name or machine.get("processor") or machine.get("machine")]
    facts += [plural(cores, "core")] if cores else []
    facts += [plural(machine["threads"], "thread")] if machine.get("threads") else []
    if isinstance(gpu, Mapping):
        facts = [f"{gpu.get('name')} (driver {gpu.get('driver')}, CUDA {gpu.get('cuda')})", *facts]
    facts.append(machine.get("os") or machine.get("system"))
    return plain(", ".join(str(fact) for fact in facts if fact)) or NONE


def machines(comparison: Comparison) -> str:
    base, new = where(comparison.base.machine), where(comparison.new.machine)
    return base if base == new else f"base {base}; new {new}"


def versions(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Package, base's version, new's version, for all packages in either."""
    base, new = comparison.base.versions, comparison.new.versions
    return [
        (plain(name, 60), plain(base.get(name) or NONE, 60), plain(new.get(name) or NONE, 60))
        for name in dict.fromkeys([*base, *new])
        if base.get(name) or new.get(name)
    ]


def _rounds(samples: tuple[tuple[float, ...], ...]) -> str:
    if not samples:
        return NONE
    sizes = sorted({len(process) for process in samples})
    each = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]}"
    return f"{len(samples)}×{each}"
