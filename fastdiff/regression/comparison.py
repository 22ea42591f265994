"""What a comparison of two states found: the data that every kind of report prints."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fastdiff.bench.stats import Ratio

Verdict = Literal["slower", "faster", "same", "inconclusive", "incomparable"]
"""slower, faster: beyond the noise floor, by the interval; for a counter: more, less.
same: within the floor, by the interval; for a counter: equal.
inconclusive: too few samples to say; `Line.note` says how many more.
incomparable: measured on another machine, dtype or version, or in one state only; the note says."""

FAILING = ("slower",)
UNDECIDED = ("inconclusive", "incomparable")


def within(row: str, part: str) -> bool:
    """Whether a row's name is `part`, or begins with it."""
    return row == part or row.startswith(f"{part} · ")


@dataclass(frozen=True)
class State:
    """One side of a comparison."""

    name: str
    """What the user called it: a revision, a folder, a wheel, a file."""
    commit: str | None
    created: str | None
    """UTC, ISO 8601."""
    machine: Mapping[str, Any]
    """As of `bench.machine.machine`; of pytest-benchmark its machine_info."""
    versions: Mapping[str, str | None]


@dataclass(frozen=True)
class Line:
    """One compared quantity. Less is better in all of them."""

    name: str
    """Parts from coarse to fine, joined by " · ": "fastdiff · step"."""
    kind: Literal["time", "count"]
    unit: str
    """`ms` for times; "launches", "bytes", "registers", … for counters."""
    base: float | None
    """Median in `unit`, or the count; None where that state lacks it."""
    new: float | None
    verdict: Verdict
    note: str = ""
    """Why it is inconclusive or incomparable, and what to do; else empty."""
    ratio: float | None = None
    """new over base: 1.10 is a tenth slower. None where either is absent, or base is zero."""
    lo: float | None = None
    """Ends of the ratio's interval; None for counters."""
    hi: float | None = None
    base_samples: tuple[tuple[float, ...], ...] = ()
    """[process][round] in `unit`; one process where all were measured in one."""
    new_samples: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Comparison:
    """All lines, worst first, and the two states."""

    base: State
    new: State
    lines: tuple[Line, ...]
    geomean: Ratio | None
    """Geometric mean of the time ratios; None where there are none."""
    floor: float
    """A change of less than this share is none: 0.03."""
    confidence: float
    """1 - the share of changes called by chance, at most, of all that are called."""
    paired: bool
    """Whether base and new took turns within one run."""
    command: str
    case: str = ""
    """What was measured: "demo, float32, cpu, 10 steps"; empty where the rows' names say it all."""
    differences: tuple[str, ...] = ()
    """What differs between the states' machines, versions: one sentence each."""

    @property
    def exit_code(self) -> int:
        """0 fine, 1 something got slower or larger, 3 nothing did, but something is undecided."""
        verdicts = {line.verdict for line in self.lines}
        if verdicts & set(FAILING):
            return 1
        return 3 if verdicts & set(UNDECIDED) or not verdicts else 0

    def count(self, verdict: Verdict) -> int:
        return sum(line.verdict == verdict for line in self.lines)
