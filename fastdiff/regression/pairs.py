"""Times both states in process pairs, in random order, until the result is precise enough."""

import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from typing import Any

from fastdiff.bench.machine import PACKAGES
from fastdiff.bench.stats import CONFIDENCE, LEAST, Estimate, across_processes, ratio_of
from fastdiff.errors import UserError
from fastdiff.regression.comparison import within
from fastdiff.regression.states import Place

PAIR_S = 1.2
"""Seconds of timing per process pair, besides the second or so to start it. Processes differ in
speed at random, so timing one for longer does not help."""
GATES = ("times", "counters")
LEAST_ROUNDS, MOST_ROUNDS = 3, 60

Samples = dict[str, tuple[list[list[float]], list[list[float]]]]
"""By row: milliseconds of base and new, [process pair][round]."""


@dataclass(frozen=True)
class Settings:
    """What both states run."""

    suite: str
    device: str
    dtype: str
    threads: int
    steps: int = 10
    """Per picture, so that encoding the prompt is a tenth of the time."""
    height: int | None = None
    width: int | None = None
    backends: tuple[str, ...] = ()
    folder: str | None = None
    preset: str | None = None
    scale: float = 1.0
    filter: str = ""

    def of(self, place: Place) -> dict[str, Any]:
        """The settings for a state's worker; a relative folder is the state's own."""
        folder = self.folder and str(place.root / self.folder)
        return vars(self) | {"folder": folder, "packages": ("fastdiff", *PACKAGES)}


@dataclass(frozen=True)
class Until:
    """When to stop: after `pairs`, or once every interval is narrow enough; at most after
    `limit_s`.

    Whether a change has shown never counts: stopping at the first significant result gives false
    positives.
    """

    pairs: int | None = None
    half_width: float = 0.01
    limit_s: float = 60.0

    def share(self, pairs: int, seconds: float) -> float:
        """The share of the longest possible run that is done, 0 to 1."""
        return min(1.0, pairs / self.pairs if self.pairs else seconds / self.limit_s)

    def reached(self, estimates: Sequence[Estimate], pairs: int) -> bool:
        if self.pairs is not None:
            return pairs >= self.pairs
        return pairs > LEAST and max(map(half_width, estimates)) <= log(1 + self.half_width)


def half_width(estimate: Estimate) -> float:
    """Half the width of a single row's interval, as a logarithm."""
    lo, hi = estimate.interval(1 - CONFIDENCE)
    return (hi - lo) / 2


@dataclass
class Race:
    """The results of the pairs so far."""

    times: Samples = field(default_factory=dict)
    counts: dict[str, dict[str, tuple[float, str]]] = field(default_factory=dict)
    """By side, "base" or "new": name -> value, unit."""
    once: Samples = field(default_factory=dict)
    """The same for rows that are timed once per process."""
    wrong: dict[str, dict[str, str]] = field(default_factory=dict)
    """By side: rows with wrong results, and why. They are not timed."""
    rows: dict[str, list[str]] = field(default_factory=dict)
    """By side: the rows that it can time."""
    versions: dict[str, dict[str, str | None]] = field(default_factory=dict)
    pairs: int = 0
    seconds: float = 0.0

    def estimates(self) -> list[Estimate]:
        return [across_processes(base, new) for base, new in self.times.values()]


class Worker:
    """A state's process, which forks a new one for every pair."""

    def __init__(self, place: Place, settings: Settings, log: Path) -> None:
        self.place, self._log = place, log
        if not place.root.is_dir():
            raise UserError(f"{place.name} has no folder {place.root.name} to run in")
        variables = place.environment() | {
            "PYTHONUNBUFFERED": "1",
            "PYTHONHASHSEED": "0",  # the same order of sets for both
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # detects a GPU without starting CUDA
            "TRANSFORMERS_VERBOSITY": "error",
            "DIFFUSERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "KINETO_LOG_LEVEL": "99",
        }
        script = Path(__file__).with_name("worker.py")
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [place.python, "-P", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=place.root,
                env=variables,
                text=True,
                start_new_session=True,  # its forks end with it
            )
        self._send(settings.of(place))

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        self._send({"do": do} | more)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise UserError(f"{self.place.name} cannot be measured: {answer['error']}")
        return answer

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def _send(self, value: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the missing answer says why
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "its process ended without a message"


def race(
    base: Place,
    new: Place,
    settings: Settings,
    until: Until,
    show: Callable[..., object],
    gates: Collection[str] = GATES,
) -> Race:
    """Check both states, count what does not vary, and time them in turn; `gates` selects these.

    `show(line, share)` receives progress.

    Raises UserError if a state cannot run the settings.
    """
    done, order = Race(), random.Random(0)
    with _workers(base, new, settings) as workers:
        start = time.perf_counter()
        for side, worker in workers.items():
            done.versions[side] = worker.answer()["versions"]
        for side, worker in workers.items():
            counting = ", counting" if "counters" in gates else ""
            show(f"{worker.place.name}: checking what it computes{counting}")
            done.rows[side] = [row for group in worker.ask("start")["groups"] for row in group]
            done.wrong[side] = worker.ask("check")["wrong"]
            done.counts[side] = worker.ask("count")["counts"] if "counters" in gates else {}
            worker.ask("stop")
        begun = time.perf_counter()
        while "times" in gates:
            _pair(done, workers, order)
            done.pairs += 1
            now = time.perf_counter()
            estimates = done.estimates()
            show(_progress(done, estimates), until.share(done.pairs, now - start))
            each = (now - begun) / done.pairs
            late = now - start + each > until.limit_s
            if not estimates or until.reached(estimates, done.pairs):
                break
            if until.pairs is None and late:
                break
        done.seconds = time.perf_counter() - start
    return done


def _pair(done: Race, workers: dict[str, Worker], order: random.Random) -> None:
    """Time a new process of each state, in turn, for some rounds."""
    names, groups, started = list(workers), {}, {}
    for side in order.sample(names, 2):
        started[side] = workers[side].ask("start")
        groups[side] = started[side]["groups"]
    shared = [
        tuple(groups[side].index(rows) for side in names)
        for rows in groups[names[0]]
        if all(rows in groups[side] for side in names)
    ]
    found: dict[str, dict[str, list[float]]] = {side: {} for side in names}
    start, rounds = time.perf_counter(), 0
    while rounds < MOST_ROUNDS:
        for group in order.sample(shared, len(shared)):
            for at in order.sample(range(2), 2):
                times = workers[names[at]].ask("run", group=group[at])["ms"]
                for row, ms in times.items():
                    found[names[at]].setdefault(row, []).append(ms)
        rounds += 1
        spent = time.perf_counter() - start
        if rounds >= LEAST_ROUNDS and spent + spent / rounds > PAIR_S:
            break
    for side in names:
        workers[side].ask("stop")
    wrong = {row for rows in done.wrong.values() for row in rows}
    once = {side: {r: [ms] for r, ms in started[side]["once"].items()} for side in names}
    for samples, sides in ((done.times, found), (done.once, once)):
        for row in sides["base"]:
            if row in sides["new"] and not any(within(row, part) for part in wrong):
                base, new = samples.setdefault(row, ([], []))
                base.append(sides["base"][row])
                new.append(sides["new"][row])


def _progress(done: Race, estimates: Sequence[Estimate]) -> str:
    """The progress, with the widest interval so far."""
    line = f"pair {done.pairs}"
    if done.pairs > 1 and estimates:
        row, widest = max(
            zip(done.times, estimates, strict=True), key=lambda pair: half_width(pair[1])
        )
        middle, lo, hi = (ratio_of(at) for at in (widest.log, *widest.interval(1 - CONFIDENCE)))
        line += f": {row} {middle:.3f} [{lo:.3f}, {hi:.3f}], the widest of {len(estimates)}"
    return line


@contextmanager
def _workers(base: Place, new: Place, settings: Settings) -> Iterator[dict[str, Worker]]:
    made: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for side, place in (("base", base), ("new", new)):
                made[side] = Worker(place, settings, Path(folder, f"{side}.log"))
            yield made
        finally:
            for worker in made.values():
                worker.close()
