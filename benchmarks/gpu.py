"""Runs all measurements that need a GPU: `make gpu`.

Each part runs in its own process, the most important first, and writes JSON as it goes. After each
part, and while it runs, everything is packed into one archive, so the results survive however the
run ends. At the end it prints what was left out for lack of time, and a line for each goal.

    python -m benchmarks.gpu --out FOLDER [--minutes 8] [--only PART,…] [--warm W] [--dry-run]
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import goals
from benchmarks.clock import Budget
from benchmarks.parts import DRY_SCALE
from benchmarks.sheet import Sheet
from fastdiff.written import write_file

ARCHIVE, FOLDER = "results.tar.gz", Path("build/gpu")
FASTDIFF = (sys.executable, "-P", "-m", "fastdiff")
EAGER, PACK_S = "eager,channels_last", 5.0


@dataclass
class Run:
    """Shared by all parts: results go to `folder`, the archive to `out`."""

    out: Path
    folder: Path
    dry_run: bool
    budget: Budget
    warm: Path | None = None
    """A folder that `fastdiff warm` wrote for SD1.5."""
    process: subprocess.Popen[bytes] | None = field(default=None)

    def do(self, name: str, command: list[str], limit_s: float) -> int | None:
        """Run a part, with its output in a file; return its exit code, None at the time limit."""
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if self.dry_run else {})
        # a killed compiler leaves half a file in its cache, which makes the next one fail
        environment["TORCHINDUCTOR_CACHE_DIR"] = str((self.folder / "inductor").resolve())
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            end = time.monotonic() + min(limit_s, max(1.0, self.budget.left_s))
            while self.process.poll() is None and time.monotonic() < end:
                try:
                    self.process.wait(min(PACK_S, max(0.1, end - time.monotonic())))
                except subprocess.TimeoutExpired:
                    self.pack()
            code = self.process.poll()
            self.end()
        sys.stdout.write(log.read_text(errors="replace")[-6000:])
        sys.stdout.flush()
        return code

    def end(self) -> None:
        """End the part, if it is still running."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def pack(self) -> None:
        """Pack all results into one archive, which is complete at every moment."""

        def write(path: Path) -> None:
            with tarfile.open(path, "w:gz", compresslevel=1) as archive:
                for file in sorted(self.folder.iterdir()):
                    if file.is_file() and not file.name.startswith("."):
                        archive.add(file, f"results/{file.name}")

        write_file(self.out / ARCHIVE, write)


@dataclass(frozen=True)
class Part:
    """A name, a command, the seconds that must be left to start it, and its time limit."""

    name: str
    command: Callable[[str, Run], list[str]]
    least_s: float
    most_s: float
    needs: str = "torch"
    """A module that the part needs; without it the part is left out."""


def own(name: str, run: Run) -> list[str]:
    dry = ["--dry-run"] if run.dry_run else []
    path = run.folder / f"{name}.json"
    return [sys.executable, "-P", "-m", "benchmarks.parts", name, "--out", str(path), *dry]


def first_pictures(name: str, run: Run) -> list[str]:
    return own(name, run) + (["--warm", str(run.warm)] if run.warm else [])


def tune(name: str, run: Run) -> list[str]:
    """Tune the most expensive kernels of U-Nets; the table has no effect until it is reviewed."""
    command = [sys.executable, "-P", "-m", "benchmarks.tune", "--minutes", "2"]
    command += ["--ops", "group_norm_silu,attention", "--out", str(run.folder / f"{name}.json")]
    return [*command, "--dry-run"] if run.dry_run else command


def bench(preset: str, steps: int, rounds: int, backends: str, name: str, run: Run) -> list[str]:
    size = ["--steps", str(steps), "--rounds", str(rounds)]
    if run.dry_run:
        size = ["--steps", "1", "--rounds", "2", "--scale", str(DRY_SCALE)]
    path = ["--json", str(run.folder / f"{name}.json")]
    return [*FASTDIFF, "bench", "--preset", preset, *size, "--backends", backends, *path]


def count(name: str, run: Run) -> list[str]:
    size = ["--scale", str(DRY_SCALE)] if run.dry_run else []
    path = ["--json", str(run.folder / f"{name}.json")]
    return [*FASTDIFF, "count", "--preset", "sd15", *size, "--steps", "3", *path]


def build_engines(name: str, run: Run) -> list[str]:
    return [*FASTDIFF, "export", "--preset", "sd15", "--trt", "--out", str(run.folder / "engines")]


def race_engines(name: str, run: Run) -> list[str]:
    command = bench("sd15", 20, 9, "eager,fastdiff,tensorrt", name, run)
    return [*command, "--engines", str(run.folder / "engines")]


PARTS = (
    Part("ceilings", own, 0, 30),
    Part("sd15", partial(bench, "sd15", 20, 9, f"{EAGER},networks,fastdiff"), 30, 150),
    Part("profile-sd15", own, 10, 60),
    Part("verify", own, 0, 120),
    Part("sdxl", partial(bench, "sdxl", 10, 7, f"{EAGER},fastdiff"), 60, 200),
    Part("profile-sdxl", own, 20, 90),
    Part("sd3", partial(bench, "sd3", 10, 7, "eager,fastdiff"), 60, 200),
    Part("profile-sd3", own, 20, 90),
    Part("vae", own, 10, 60),
    Part("kernels", own, 10, 180),
    Part("first-pictures", first_pictures, 30, 180),
    Part("tune", tune, 60, 150),
    Part("changes", own, 20, 90),
    Part("count", count, 20, 60),
    Part("cases", own, 10, 240),
    Part("inductor", partial(bench, "sd15", 20, 9, "eager,inductor,fastdiff"), 90, 240),
    Part("inductor-kernels", own, 60, 240),
    Part(
        "inductor-max-autotune",
        partial(bench, "sd15", 20, 9, "eager,inductor-max-autotune,fastdiff"),
        *(180, 600),
    ),
    Part("engines-build", build_engines, 120, 600, needs="tensorrt"),
    Part("engines", race_engines, 60, 120, needs="tensorrt"),
)
"""In order of importance. torch.compile comes last: it may hang or take minutes."""


def measure(run: Run, names: list[str]) -> bool:
    """Run every part in order; returns whether all of them succeeded."""
    with Sheet.open(run.folder / "run.json") as sheet:
        for part in PARTS:
            if part.name not in names:
                continue
            if find_spec(part.needs) is None:
                run.budget.left_out.append(f"{part.name} (no {part.needs})")
                continue
            if not run.budget.allows(part.name, 0 if run.dry_run else part.least_s):
                continue
            print(f"== {part.name}, {run.budget.left_s:.0f} s left", flush=True)
            start = time.monotonic()
            # a dry run times nothing, and may share its cores with others
            limit_s = 4 * part.most_s if run.dry_run else part.most_s
            code = run.do(part.name, part.command(part.name, run), limit_s)
            if code is None:
                run.budget.left_out.append(f"the end of {part.name}")
            spent = time.monotonic() - start
            sheet.add({"part": part.name, "rc": code, "seconds": spent})
            run.pack()
        sheet.add({"left_out": run.budget.left_out})
    lines = goals.lines(run.folder)
    (run.folder / "goals.txt").write_text("\n".join(lines) + "\n")
    run.pack()
    print(*lines, sep="\n")
    run.budget.say()
    return all(row.get("rc", 0) == 0 for row in sheet.rows)


def main() -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help=f"folder of {ARCHIVE}")
    parser.add_argument("--parts", type=Path, default=FOLDER, help=f"their files ({FOLDER})")
    parser.add_argument("--minutes", type=float, default=8, help="leave out what is later (8)")
    parser.add_argument("--only", default=",".join(names), help="comma-separated parts")
    parser.add_argument("--warm", type=Path, help="what fastdiff warm wrote for SD1.5, here")
    parser.add_argument("--dry-run", action="store_true", help="small sizes on a CPU")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"--only names {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU here; --dry-run tries the script on the CPU")
    if options.out.resolve() == options.parts.resolve():
        parser.error(f"--out and --parts are both {options.out}; give the archive another folder")
    shutil.rmtree(options.parts, ignore_errors=True)
    for folder in (options.out, options.parts):
        folder.mkdir(parents=True, exist_ok=True)
    budget = Budget(options.minutes)
    run = Run(options.out, options.parts, options.dry_run, budget, options.warm)

    def ended(number: int, frame: object) -> None:
        # it only raises: the code that it interrupts may hold the lock that `end` waits for
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ended)
    try:
        return 0 if measure(run, chosen) else 1
    except SystemExit:
        run.end()
        run.pack()
        raise


if __name__ == "__main__":
    sys.exit(main())
