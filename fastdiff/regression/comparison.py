"""The result of comparing two states: the data that every kind of report prints."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastdiff.bench.stats import Ratio

Verdict = Literal["slower", "faster", "same", "inconclusive", "incomparable"]
"""slower, faster: beyond the noise floor, by the interval; for a counter: more, less.
same: within the floor, by the interval; for a counter: equal.
inconclusive: too few samples; `Line.note` says how many more are needed.
incomparable: another machine, dtype or version, or only in one state; the note says which."""

FAILING = ("slower",)
UNDECIDED = ("inconclusive", "incomparable")


def within(row: str, part: str) -> bool:
    """Whether a row's name is `part` or starts with it."""
    return row == part or row.startswith(f"{part} · ")


@dataclass(frozen=True)
class State:
    """One side of a comparison."""

    name: str
    """The user's name for it: a revision, a folder, a wheel, a file."""
    commit: str | None
    created: str | None
    """UTC, ISO 8601."""
    machine: Mapping[str, Any]
    """From `bench.machine.machine`; for pytest-benchmark its machine_info."""
    versions: Mapping[str, str | None]


@dataclass(frozen=True)
class Line:
    """One compared quantity; less is always better."""

    name: str
    """Parts from coarse to fine, joined by " · ": "fastdiff · step"."""
    kind: Literal["time", "count"]
    unit: str
    """`ms` for times; "launches", "bytes", "registers", … for counters."""
    base: float | None
    """Median in `unit`, or the count; None if that state does not have it."""
    new: float | None
    verdict: Verdict
    note: str = ""
    """Why it is inconclusive or incomparable, and what to do; else empty."""
    ratio: float | None = None
    """new over base: 1.10 is a tenth slower. None if either is missing, or base is zero."""
    lo: float | None = None
    """Ends of the ratio's interval; None for counters."""
    hi: float | None = None
    base_samples: tuple[tuple[float, ...], ...] = ()
    """[process][round] in `unit`; one process if all rounds were in one."""
    new_samples: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The two states and all lines, worst first."""

    base: State
    new: State
    lines: tuple[Line, ...]
    geomean: Ratio | None
    """Geometric mean of the time ratios; None if there are none."""
    floor: float
    """Changes below this share are ignored: 0.03."""
    confidence: float
    """1 - the largest share of reported changes that are due to chance."""
    paired: bool
    """Whether base and new took turns in one run."""
    command: str
    case: str = ""
    """What was measured: "demo, float32, cpu, 10 steps"; empty if the rows' names say it."""
    differences: tuple[str, ...] = ()
    """Differences between the states' machines and versions: one sentence each."""

    @property
    def exit_code(self) -> int:
        """0 fine; 1 something got slower or larger; 3 nothing did, but something is undecided."""
        verdicts = {line.verdict for line in self.lines}
        if verdicts & set(FAILING):
            return 1
        return 3 if verdicts & set(UNDECIDED) or not verdicts else 0

    def count(self, verdict: Verdict) -> int:
        return sum(line.verdict == verdict for line in self.lines)
