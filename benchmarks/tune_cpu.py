"""Measures what computes each op fastest on a CPU: one of our kernels, or torch's library.

Every call in a picture of the models in `benchmarks.cpu_calls` is timed in turn with each
implementation, and as diffusers' own modules compute it ("eager": weights and pictures in torch's
own layouts). Ours are timed as a tape runs them, without Python. The fastest of ours is chosen,
unless it takes `FLOOR` more than the library and the difference is not noise. A tape can hold only
our kernels: in a call that may be on a tape, the library has to save enough to be worth ending it.

    python -m benchmarks.tune --cpu [--isa avx2] [--ops conv2d,…] [--models "sd15 1,…"] [--out FILE]
    python -m benchmarks.tune --cpu --add --calls "conv2d float32.*, 3\\]$"
    python -m benchmarks.tune --cpu --check

FILE is reviewed and moved to fastdiff/kernels/tables/, where `fastdiff.kernels.choices` finds it;
the samples are beside it. `--check` measures nothing: it compares the committed tables with the
models' calls, and exits with 1 if one was never measured, or if a kernel of ours was chosen that is
slower than torch's fastest by `SLOWER` and by `NOISE_MS`.
"""

import argparse
import json
import os
import random
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from itertools import groupby
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.clock import Budget
from benchmarks.cpu_calls import Call, calls
from fastdiff.bench.machine import commit, machine, versions
from fastdiff.kernels.choices import FOLDER, LIBRARY, OWN, SCHEMA, Row, Work, read, theirs
from fastdiff.kernels.conv2d.cpu import ALGORITHMS, convolved, exact
from fastdiff.kernels.dispatch import KERNELS, NATIVE
from fastdiff.kernels.observe import recording
from fastdiff.written import check_writable, write_text

FLOOR, SLOWER = 0.05, 0.05
WORTH_MS = 0.5
"""A step without a tape takes a few milliseconds more."""
NOISE_MS = 0.005
"""Below 0.1 ms, medians of two halves of the same samples differ by less (4.1 µs) in 19 of 20."""
LEAST_S = 1e-3
ROUNDS, SECONDS = (3, 9), 0.7
"""The fewest and most rounds of a call; more than the fewest only within this many SECONDS."""
LONG_S, LOST = 0.5, 5
"""An implementation that takes this many seconds, and this many times the fastest's, has lost."""
DTYPES = (torch.float32, torch.bfloat16)
SAMPLES = Path("benchmarks/results/cpu-zen5-2core/choices")
"""The folder with the samples of the committed tables."""
LIBRARIES = {"avx512": "AVX512_CORE", "avx2": "AVX2", "baseline": "SSE41"}
"""The limit for oneDNN, so that it computes as on a processor without newer instructions."""

Run = Callable[[], object]


def with_memory(a: Any) -> Any:
    """An op's arguments, with random tensors in place of those without memory."""

    def filled(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        reach = sum(s * (n - 1) for n, s in zip(value.shape, value.stride(), strict=True))
        memory = torch.zeros(reach + 1, dtype=value.dtype)
        if memory.is_floating_point():
            memory.normal_()
        return memory.as_strided(value.shape, value.stride())

    return type(a)(*map(filled, values(a)))


def values(a: Any) -> list[Any]:
    """The arguments of an op, in its order."""
    return [getattr(a, field.name) for field in fields(a)]


def ours(call: Call, a: Any) -> dict[str, Run]:
    """Our kernels that support a call, as a tape runs them."""
    kernel = KERNELS[call.work.op]
    named: dict[str, Run] = {OWN: partial(kernel.own, *values(a))}
    if call.work.op == "conv2d":
        numbers = {name: number for name, number in ALGORITHMS.items() if exact(a, name)}
        named = {name: partial(convolved, a, number) for name, number in numbers.items()}
    taped = {}
    for name, run in named.items():
        try:
            with recording() as tape:
                kept = run()
        except ValueError:  # the kernel does not take these arguments
            continue
        taped[name] = partial(_replayed, tape, kept)
    return taped


def _replayed(tape: Any, kept: object) -> None:
    tape.run()


def torchs(call: Call, a: Any) -> dict[str, Run]:
    """torch's own ops, on the tensors as we store them and as diffusers' modules do."""
    kernel = KERNELS[call.work.op]
    named: dict[str, Run] = {LIBRARY: partial(kernel.plain, *values(a))}
    if call.work.op == "conv2d":
        for name, layout in (
            ("eager", torch.contiguous_format),
            ("eager channels_last", torch.channels_last),
        ):
            named[name] = _convolution(a, layout)
    elif call.work.op in ("linear", "geglu"):
        own = type(a)(*values(a))
        own.weight = a.weight.contiguous()
        named["eager"] = partial(kernel.plain, *values(own))
    return named


def _convolution(a: Any, layout: torch.memory_format) -> Run:
    x, residual = (
        None if t is None else t.permute(0, 3, 1, 2).contiguous(memory_format=layout)
        for t in (a.x, a.residual)
    )
    weight, (before, after) = a.weight.contiguous(memory_format=layout), a.padding

    def run() -> Tensor:
        y, pad = x, before
        if a.size is not None:
            y = F.interpolate(y, size=list(a.size), mode="nearest")
        if before != after:
            y, pad = F.pad(y, (before, after, before, after)), 0
        y = F.conv2d(y, weight, a.bias, a.stride, pad)
        return y if residual is None else y + residual

    return run


def race(runs: Mapping[str, Run], rounds: int | None = None) -> dict[str, list[float]]:
    """Milliseconds of each, all in turn, in a new order each round; `rounds`: None for ROUNDS. A
    call of seconds that has lost already is timed once: torch has no bfloat16 to speak of for some
    instruction sets, and takes a hundred times as long."""
    repeats: dict[str, int] = {}
    took: dict[str, float] = {}
    lost: dict[str, list[float]] = {}
    for name, run in runs.items():
        first = _spent(run, 1)  # the first call allocates
        fastest = min((took[other] / repeats[other] for other in took), default=inf)
        if first > max(LONG_S, LOST * fastest):
            lost[name] = [1e3 * first]
            continue
        repeats[name] = 1
        while (spent := _spent(run, repeats[name])) < LEAST_S:
            repeats[name] *= 2
        took[name] = spent
    least, most = ROUNDS
    rounds = rounds or max(least, min(most, int(SECONDS / sum(took.values()))))
    samples: dict[str, list[float]] = {name: [] for name in repeats}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(repeats), len(repeats)):
            samples[name].append(1e3 * _spent(runs[name], repeats[name]) / repeats[name])
    return samples | lost


def _spent(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - start


def choose(times: Mapping[str, float], own: Sequence[str], taped: bool) -> str:
    """The implementation to use, by median milliseconds; `own`: names of our kernels; `taped`:
    whether a tape may hold the call."""
    best = min(own, key=times.__getitem__)
    saved = times[best] - times[LIBRARY]
    worth = saved > max(FLOOR * times[LIBRARY], WORTH_MS if taped else NOISE_MS)
    return LIBRARY if worth else best


def named(work: Work) -> str:
    """'op dtype kind [sizes]'"""
    return f"{work.op} {work.dtype} {work.kind} {list(work.sizes)}"


def measured(call: Call, rounds: int | None = None) -> dict[str, Any]:
    a = with_memory(call.arguments)
    own = ours(call, a)
    samples = race({**own, **torchs(call, a)}, rounds)
    times = {name: float(f"{median(ms):.4g}") for name, ms in samples.items()}
    work = call.work
    row = {"op": work.op, "dtype": work.dtype, "kind": work.kind, "sizes": list(work.sizes)}
    row |= {"runs": choose(times, list(own), call.taped) if own else LIBRARY, "ms": times}
    rounded = {name: [float(f"{value:.4g}") for value in ms] for name, ms in samples.items()}
    return row | {"models": call.models, "samples": rounded}


def slower(row: Row) -> bool:
    """Whether the chosen kernel is ours, and slower than torch's fastest."""
    if row.runs == LIBRARY:
        return False
    fastest = min(ms for name, ms in row.ms.items() if theirs(name))
    return row.ms[row.runs] > max((1 + SLOWER) * fastest, fastest + NOISE_MS)


def check(isas: Sequence[str], log: Callable[[str], object]) -> int:
    """How many of the models' calls are missing in the tables or slower than torch's; logs them."""
    wanted = [call for dtype in DTYPES for call in calls(dtype)]
    wrong = 0
    for isa in isas:
        rows = {row.work: row for row in read(FOLDER / f"cpu_{isa}.json", isa)}
        lacking = [call.work for call in wanted if call.work not in rows]
        slow = [row for row in rows.values() if slower(row)]
        for work in lacking:
            log(f"{isa}: never measured: {named(work)}")
        for row in slow:
            log(f"{isa}: slower than torch: {named(row.work)}: {row.ms}")
        chosen = sorted(row.runs for row in rows.values())
        counts = ", ".join(f"{name} {len(list(group))}" for name, group in groupby(chosen))
        log(
            f"{isa}: {len(rows)} rows ({counts}), {len(lacking)} lacking, {len(slow)} slower than"
            f" torch by {SLOWER:.0%} and {NOISE_MS} ms"
        )
        wrong += len(lacking) + len(slow)
    return wrong


def tune(
    wanted: Sequence[Call],
    budget: Budget,
    log: Callable[[str], object],
    rounds: int | None = None,
) -> list[Any]:
    rows = []
    for call in wanted:
        if not budget.allows(str(call.work)):
            continue
        with torch.no_grad():
            row = measured(call, rounds)
        rows.append(row)
        times = ", ".join(f"{name} {ms:g}" for name, ms in row["ms"].items())
        log(f"{named(call.work)}: {times} ms")
    return rows


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.tune --cpu", description=__doc__)
    parser.add_argument("--isa", choices=NATIVE.isas(), default=NATIVE.isas()[0])
    parser.add_argument("--ops", help="comma-separated; all if absent")
    parser.add_argument("--calls", help="a pattern in 'op dtype kind [sizes]'; all if absent")
    parser.add_argument("--models", help="comma-separated; all of benchmarks.cpu_calls if absent")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated (both)")
    parser.add_argument("--add", action="store_true", help="to the committed table's other rows")
    parser.add_argument("--lacking", action="store_true", help="only what that table lacks")
    parser.add_argument("--out", type=Path, help="build/cpu_<isa>.json if absent")
    parser.add_argument("--rounds", type=int, help="of each call, instead of 3 to 9")
    parser.add_argument("--minutes", type=float, default=60, help="stop asking after (60)")
    parser.add_argument("--check", action="store_true", help="of the committed tables")
    options = parser.parse_args(arguments)
    if options.check:
        isas = [path.stem.removeprefix("cpu_") for path in sorted(FOLDER.glob("cpu_*.json"))]
        return 1 if check(isas, print) else 0
    held = LIBRARIES.get(options.isa)
    if held and os.environ.get("ONEDNN_MAX_CPU_ISA") != held:  # read when torch is imported
        capability = {"avx512": "avx512", "avx2": "avx2"}.get(options.isa, "default")
        limits = {"ONEDNN_MAX_CPU_ISA": held, "ATEN_CPU_CAPABILITY": capability}
        again = [sys.executable, "-m", "benchmarks.tune", "--cpu", *arguments]
        os.execve(sys.executable, again, os.environ | limits)
    NATIVE.set_isa(options.isa)
    out = options.out or Path("build", f"cpu_{options.isa}.json")
    check_writable(out, "--out")
    only = options.models.split(",") if options.models else ()
    ops = options.ops.split(",") if options.ops else list(KERNELS)
    budget = Budget(options.minutes)
    dtypes = [dtype for dtype in DTYPES if str(dtype)[6:] in options.dtypes.split(",")]
    wanted = [call for dtype in dtypes for call in calls(dtype, only) if call.work.op in ops]
    wanted = [call for call in wanted if re.search(options.calls or "", named(call.work))]
    if options.lacking:
        have = {row.work for row in read(FOLDER / out.name, options.isa)}
        wanted = [call for call in wanted if call.work not in have]
    rows = tune(wanted, budget, print, options.rounds)
    about = {"schema": SCHEMA, "isa": options.isa, "machine": machine(), "versions": versions()}
    about |= {"commit": commit(), "threads": torch.get_num_threads()}
    about |= {"command": shlex.join(["python -m benchmarks.tune --cpu", *arguments])}
    kept = [Path(FOLDER, out.name), SAMPLES / out.name] if options.add else []
    for path, left in ((out, "samples"), (out.with_stem(f"{out.stem}-samples"), "ms")):
        before = json.loads(kept.pop(0).read_text())["rows"] if kept else []
        write_text(path, _document(about, _joined(before, rows, left)))
    budget.say()
    print(f"{len(rows)} rows: {out}")
    return 0


def _joined(before: Sequence[Any], rows: Sequence[Any], left: str) -> list[Any]:
    """Rows without the field `left`, after those of `before` that were not measured again."""
    again = [_key(row) for row in rows]
    return [row for row in before if _key(row) not in again] + [
        {name: row[name] for name in row if name != left} for row in rows
    ]


def _key(row: Mapping[str, Any]) -> list[Any]:
    return [row[name] for name in ("op", "dtype", "kind", "sizes")]


def _document(about: Mapping[str, Any], rows: Sequence[Any]) -> str:
    """JSON with one line per row."""
    head = json.dumps(about, indent=1).rstrip("\n}")
    return head + ',\n "rows": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n"
