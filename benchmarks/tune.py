"""Measures whether another launch configuration beats the default of a kernel's `pick` on this GPU.

For every size in a full model (`benchmarks.shapes`), all configurations that the kernel's
`candidates` offers are compiled. Those that spill or do not fit are dropped; the others must
compute the right result before they are timed in turn with the default. The fastest is then timed
again, so that it is not chosen by luck. It becomes a row of FILE only if its interval clears the
noise floor on every size with the same `pick` arguments. FILE is reviewed and moved to
fastdiff/kernels/tables/, where `fastdiff.kernels.tuned` finds it.

    python -m benchmarks.tune [--ops attention,…] [--out FILE] [--minutes N] [--dry-run]
    python -m benchmarks.tune --static --arch 90 [--out SIEVED]
    python -m benchmarks.tune --sieved SIEVED
    python -m benchmarks.tune --cpu …

The second form needs no GPU, and leaves its compiled kernels in Triton's cache. With these and
SIEVED, the third form uses a GPU's minutes only for measuring. The last form is
`benchmarks.tune_cpu`, which chooses implementations on a CPU.
"""

import argparse
import json
import os
import random
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import tune_cpu
from benchmarks.clock import Budget
from benchmarks.shapes import full, tiny, triton_kernels
from fastdiff.bench.kernels import inputs_of, sampler
from fastdiff.bench.machine import commit, machine, versions
from fastdiff.bench.stats import Ratio, speedup
from fastdiff.errors import UserError
from fastdiff.kernels.contract import Case, architecture, verify
from fastdiff.kernels.dispatch import Kernel
from fastdiff.kernels.inspect import compiled, planned
from fastdiff.kernels.tuned import SCHEMA, forced, key, recorded
from fastdiff.written import check_writable, write_text

FLOOR = 0.03
"""The share by which times may differ and still count as the same, as in a report."""
SCREEN, CONFIRM = 7, 21
"""Rounds for all candidates, and for the fastest one; then for a dry run: candidates and rounds."""
DRY_CANDIDATES, DRY_ROUNDS = 2, 2

Log = Callable[[str], object]
Sieved = dict[tuple[str, str], list[dict[str, int]]]
"""By op and key: the candidates that compile and fit, as dictionaries."""


@dataclass(frozen=True)
class Question:
    """A size, and the arguments of its `pick`."""

    kernel: Kernel
    case: Case
    dtype: torch.dtype
    arguments: dict[str, int]
    rule: Any

    @property
    def op(self) -> str:
        return self.kernel.spec.name

    @property
    def at(self) -> tuple[str, str]:
        return self.op, key(self.arguments)

    @property
    def candidates(self) -> list[Any]:
        """The kernel's candidates, without the default."""
        with forced(self.op, None):  # candidates may call pick
            offered = _module(self.kernel).candidates(**self.arguments)
        return [config for config in offered if config != self.rule]

    def __str__(self) -> str:
        return f"{self.op} {self.case.name} {str(self.dtype).removeprefix('torch.')}"


def tunable_kernels(ops: Sequence[str] | None) -> list[Kernel]:
    """The kernels that offer candidates; UserError if a requested one does not."""
    found = {k.spec.name: k for k in triton_kernels() if hasattr(_module(k), "candidates")}
    if unknown := set(ops or ()) - set(found):
        names = ", ".join(sorted(found)) or "none"
        raise UserError(f"--ops names {min(unknown)}; those with candidates are {names}")
    return [kernel for name, kernel in found.items() if ops is None or name in ops]


def _module(kernel: Kernel) -> Any:
    return sys.modules[kernel.implementations["triton"]().planner.__module__]


def questions(kernels: Sequence[Kernel], arch: int, dry_run: bool) -> Iterator[Question]:
    """The questions for each kernel's full sizes in half precision; a dry run has the smallest."""
    dtype = torch.float32 if dry_run else torch.float16
    for kernel in kernels:
        for case in tiny(kernel) if dry_run else full(kernel):
            with forced(kernel.spec.name, None), recorded() as picks:
                planned(kernel, case, dtype, arch)
            for pick in picks:
                if pick.op == kernel.spec.name:
                    yield Question(kernel, case, dtype, dict(pick.arguments), pick.config)


def static_rows(question: Question, config: Any, arch: int) -> list[Any]:
    """The compiled launches of a size with a configuration; raises if they do not compile."""
    with forced(question.op, config):
        launches = planned(question.kernel, question.case, question.dtype, arch)
    plans = [(question.kernel.spec, question.case, question.dtype, one) for one in launches]
    return compiled(arch, plans)


def refused(question: Question, config: Any, arch: int) -> str | None:
    """Why a configuration is unsuitable, found without running it; None if it is not."""
    try:
        rows = static_rows(question, config, arch)
    except Exception as error:  # compilers raise errors of many kinds
        return f"does not compile: {str(error).splitlines()[0] if str(error) else error!r}"
    bad = [row for row in rows if row.spills or not row.fits]
    return bad[0].faults[0].split(": ", 1)[1] if bad else None


def race(
    question: Question, configs: Sequence[Any], rounds: int, device: torch.device
) -> list[list[float]]:
    """Milliseconds of each configuration, all in turn, in a new order each round."""
    run = question.kernel.implementations["triton"]()
    sets = inputs_of(question.kernel, question.case, question.dtype, device)

    def forced_run(config: Any, inputs: dict[str, Any]) -> None:
        with forced(question.op, config):
            run(**inputs)

    samples = [
        sampler([partial(forced_run, config, inputs) for inputs in sets], device)
        for config in configs
    ]
    times: list[list[float]] = [[] for _ in configs]
    order = random.Random(0)
    for _ in range(rounds):
        for i in order.sample(range(len(configs)), len(configs)):
            times[i].append(samples[i]())
    return times


def wrong(question: Question, config: Any, device: torch.device) -> str | None:
    """The fault of a configuration: it does not start, or exceeds the error budget; else None."""
    spec, run = question.kernel.spec, question.kernel.implementations["triton"]()
    try:
        with forced(question.op, config):
            verdicts = verify(spec, run, question.case, question.dtype, device)
    except Exception as error:  # GPUs refuse launches in many ways
        return f"does not start: {error!r}"
    return next((f"is wrong: {verdict}" for verdict in verdicts if not verdict.passed), None)


def survivors(
    asked: Sequence[Question],
    arch: int,
    device: torch.device,
    dry_run: bool,
    log: Log,
    sieved: Sieved | None,
) -> list[Any]:
    """Candidates that compile, fit and are right in all questions of one key."""
    candidates = asked[0].candidates[: DRY_CANDIDATES if dry_run else None]
    if sieved is not None:
        fit = sieved.get(asked[0].at, [])
        candidates = [config for config in candidates if asdict(config) in fit]
    kept, tried = [], dry_run or sieved is not None
    for config in candidates:
        why = None if tried else refused(asked[0], config, arch)
        errors = (wrong(question, config, device) for question in asked)
        why = why or next((error for error in errors if error), None)
        if why is None:
            kept.append(config)
        else:
            log(f"  {config} {why}")
    return kept


def answer(
    asked: Sequence[Question],
    arch: int,
    device: torch.device,
    dry_run: bool,
    log: Log,
    sieved: Sieved | None,
) -> dict[str, Any] | None:
    """The row for one key; None if nothing beats the default."""
    rule = asked[0].rule
    configs = survivors(asked, arch, device, dry_run, log, sieved)
    if not configs:
        return None
    screen, confirm = (DRY_ROUNDS, DRY_ROUNDS) if dry_run else (SCREEN, CONFIRM)
    screened = [race(question, [rule, *configs], screen, device) for question in asked]
    slowest = [
        min(speedup(times[0], times[1 + i]).median for times in screened)
        for i in range(len(configs))
    ]
    for config, ratio in zip(configs, slowest, strict=True):
        log(f"  {config}: {ratio:.3f} x the default's speed")
    best = configs[max(range(len(configs)), key=slowest.__getitem__)]
    measured = []
    for question in asked:
        own, other = race(question, [rule, best], confirm, device)
        ratio = speedup(own, other)
        log(f"  {question}: {best} {ratio.median:.3f} [{ratio.lo:.3f}, {ratio.hi:.3f}]")
        measured.append(_measured(question, own, other, ratio))
        if not dry_run and ratio.lo <= 1 + FLOOR:
            return None
    return {
        "op": asked[0].op,
        "key": {name: value for name, value in asked[0].arguments.items() if name != "arch"},
        "config": asdict(best),
        "rule": asdict(rule),
        "measured": measured,
    }


def _measured(
    question: Question, own: list[float], other: list[float], ratio: Ratio
) -> dict[str, Any]:
    return {
        "case": question.case.name,
        "dtype": str(question.dtype).removeprefix("torch."),
        "samples_ms": other,
        "rule_samples_ms": own,
        "ratio": asdict(ratio),
    }


def tune(
    kernels: Sequence[Kernel], arch: int, device: torch.device, dry_run: bool, budget: Budget,
    log: Log, sieved: Sieved | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows for a table; keys without a time keep the default."""
    groups: dict[tuple[str, str], list[Question]] = defaultdict(list)
    for question in questions(kernels, arch, dry_run):
        groups[question.at].append(question)
    rows = []
    for at, asked in groups.items():
        if not budget.allows(" ".join(at)):
            continue
        log(f"{at[0]} ({at[1]}): {', '.join(question.case.name for question in asked)}")
        with torch.no_grad():
            row = answer(asked, arch, device, dry_run, log, sieved)
        rows += [] if row is None else [row]
    return rows


def sieve(kernels: Sequence[Kernel], arch: int, log: Log) -> Sieved:
    """For each distinct pick: the candidates that compile, do not spill and fit, found without a
    GPU. The log shows the machine code's figures for them and for the default."""
    sieved: Sieved = {}
    for question in questions(kernels, arch, dry_run=False):
        if question.at in sieved:
            continue
        fit = sieved[question.at] = []
        log(f"{question.op} ({question.at[1]}), {question.case.name}, sm_{arch}")
        for config in (question.rule, *question.candidates):
            numbers = ", ".join(f"{name} {value}" for name, value in asdict(config).items())
            start = f" {'*' if config == question.rule else ' '} {numbers}: "
            try:
                rows = static_rows(question, config, arch)
            except Exception as error:  # compilers raise errors of many kinds
                log(f"{start}does not compile ({type(error).__name__})")
                continue
            if config != question.rule and not any(row.spills or not row.fits for row in rows):
                fit.append(asdict(config))
            for row in rows:
                log(
                    f"{start}{row.kernel} {row.registers} registers, {row.spills} B spilt,"
                    f" {row.shared} B shared, {row.occupancy:.0%} of the warps ({row.limited_by}),"
                    f" {row.mma or 'no mma'}{'' if row.fits else ', does not fit'}"
                )
    return sieved


def write_sieved(sieved: Sieved, path: Path) -> None:
    rows = [{"op": op, "key": key, "configs": fit} for (op, key), fit in sieved.items()]
    write_text(path, json.dumps(rows, indent=1) + "\n")


def read_sieved(path: Path) -> Sieved:
    """UserError unless `--static --out` wrote the file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {(row["op"], row["key"]): row["configs"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--sieved {path} cannot be used ({error}); write it again") from error


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if "--cpu" in given:
        return tune_cpu.main([word for word in given if word != "--cpu"])
    parser = argparse.ArgumentParser(prog="benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--ops", help="comma-separated; all with candidates if absent")
    parser.add_argument("--out", type=Path, help="build/sm_<arch>.json if absent")
    parser.add_argument("--minutes", type=float, default=10, help="stop asking after (10)")
    parser.add_argument("--dry-run", action="store_true", help="the interpreter, tiny sizes")
    parser.add_argument("--static", action="store_true", help="list candidates as compiled")
    parser.add_argument("--sieved", type=Path, help="what --static --out wrote elsewhere")
    parser.add_argument("--arch", type=int, default=90, help="of --static (90)")
    options = parser.parse_args(given)
    if not (options.dry_run or options.static or torch.cuda.is_available()):
        parser.error("there is no NVIDIA GPU here; --static and --dry-run need none")
    if options.dry_run and not os.environ.get("TRITON_INTERPRET"):  # read when triton is imported
        again = [sys.executable, "-m", "benchmarks.tune", *given]
        os.execve(sys.executable, again, os.environ | {"TRITON_INTERPRET": "1"})
    try:
        kernels = tunable_kernels(options.ops.split(",") if options.ops else None)
        if options.static:
            found = sieve(kernels, options.arch, print)
            if options.out:
                write_sieved(found, options.out)
            return 0
        device = torch.device("cpu" if options.dry_run else "cuda")
        arch = architecture(torch.empty(1, device=device))
        out = options.out or Path("build", f"sm_{arch}.json")
        check_writable(out, "--out")
        budget = Budget(options.minutes)
        sieved = read_sieved(options.sieved) if options.sieved else None
        rows = tune(kernels, arch, device, options.dry_run, budget, print, sieved)
    except UserError as error:
        parser.error(str(error))
    document = {"schema": SCHEMA, "arch": arch, "machine": machine(), "versions": versions()}
    document |= {"commit": commit(), "command": shlex.join(["python -m benchmarks.tune", *given])}
    document |= {"dry_run": True} if options.dry_run else {}
    write_text(out, json.dumps(document | {"rows": rows}, indent=1) + "\n")
    budget.say()
    print(f"{len(rows)} rows: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
