"""Everything worth measuring while a GPU is at hand, in one run: `make gpu`.

First whether each Triton kernel computes the right thing on real silicon at the sizes of full
models; then its time against a copy, plain torch, torch.compile, and what each must beat; then the
VAE and whole pipelines through `fastdiff bench`; then, as far as the minutes go, the launches of a
step, what a new picture size and another LoRA cost, a TensorRT engine beside them, and all of the
specs' nasty cases. What there was no time for is said. Raw samples go to OUT/*.json, a line for
each goal to the terminal.

    python -m benchmarks.gpu --out OUT [--minutes 8] [--only PART,…] [--mode MODE] [--dry-run]
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import goals
from benchmarks.changes import time_changes, time_vae
from benchmarks.clock import Budget
from benchmarks.race import medians, race
from benchmarks.shapes import full, tiny, triton_kernels
from fastdiff.bench.machine import commit, machine, versions
from fastdiff.kernels.contract import Case, verify
from fastdiff.kernels.dispatch import Kernel
from fastdiff.written import write_file

Rows = list[dict[str, Any]]
FASTDIFF = [sys.executable, "-m", "fastdiff"]
PIPELINES = {
    "sd15": ["--preset", "sd15", "--steps", "20", "--rounds", "9"],
    "sdxl": ["--preset", "sdxl", "--steps", "20", "--rounds", "7"],
}
BACKENDS = "eager,channels_last,inductor,networks,fastdiff"
TRIES = {
    "sd15": ["--steps", "1", "--rounds", "2", "--backends", "eager,fastdiff"],
    "sdxl": ["--help"],
}
"""Of a dry run, on the demo pipeline."""


@dataclass(frozen=True)
class Session:
    """What all parts of a run share."""

    out: Path
    dry_run: bool
    budget: Budget
    mode: str | None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry_run else "cuda")

    @property
    def which(self) -> str:
        """The implementation that is measured; a dry run tries the script, not the kernels."""
        return "cpu" if self.dry_run else "triton"

    def sizes(self, kernel: Kernel) -> tuple[Case, ...]:
        return tiny(kernel) if self.dry_run else full(kernel)


def verified(
    session: Session, cases: Iterable[tuple[Kernel, Case]], dtypes: tuple[torch.dtype, ...]
) -> Rows:
    """Each case within the error budget or not, and by how much."""
    rows = []
    for kernel, case in cases:
        for dtype in set(dtypes) & set(kernel.spec.dtypes):
            if not session.budget.allows(f"check of {kernel.spec.name} {case.name}"):
                continue
            row = {"kernel": kernel.spec.name, "case": case.name, "dtype": str(dtype)}
            try:
                run = kernel.implementations[session.which]()
                verdicts = verify(kernel.spec, run, case, dtype, session.device)
                row["errors"] = [(v.output, v.error, v.allowed) for v in verdicts]
                row["passed"] = all(v.passed for v in verdicts)
            except Exception as error:  # one kernel that does not launch must not end the run
                row |= {"passed": False, "exception": repr(error)}
            rows.append(row)
            if not row["passed"]:
                print("FAILED", row)
    print(f"verify: {sum(r['passed'] for r in rows)} of {len(rows)} inside the budget")
    return rows


def check_sizes(session: Session) -> Rows:
    cases = [(kernel, case) for kernel in triton_kernels() for case in session.sizes(kernel)]
    return verified(session, cases, (torch.float32 if session.dry_run else torch.float16,))


def check_cases(session: Session) -> Rows:
    """The specs' own cases, nasty ones among them, in every dtype; a few of them in a dry run."""
    cases = [(k, case) for k in triton_kernels() for case in k.spec.cases[-2:]]
    if not session.dry_run:
        cases = [(k, case) for k in triton_kernels() for case in k.spec.cases]
    return verified(session, cases, (torch.float16, torch.bfloat16, torch.float32))


def time_kernels(session: Session) -> Rows:
    rows = []
    for kernel in triton_kernels():
        for case in session.sizes(kernel):
            if not session.budget.allows(f"time of {kernel.spec.name} {case.name}"):
                continue
            try:
                with torch.no_grad():
                    row = race(
                        *(kernel, case, session.device, session.which),
                        *(session.dry_run, session.mode),
                    )
            except Exception as error:  # wrong, or out of memory: kept, without a time
                row = {"kernel": kernel.spec.name, "case": case.name, "sizes": case.sizes}
                row |= {"samples_ms": {}, "exception": repr(error)}
            rows.append(row)
            shown = "  ".join(f"{name} {1e3 * ms:.1f} us" for name, ms in medians(row).items())
            why = row.get("exception", "nothing ran: see the file")
            print(f"{kernel.spec.name:16} {case.name:15} {shown or why}")
    return rows


def command(session: Session, name: str, *arguments: str) -> Rows:
    """A `fastdiff` command that writes its own file, ended where the minutes are over."""
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if session.dry_run else {})
    left = max(1.0, session.budget.left_s)
    try:
        done = subprocess.run([*FASTDIFF, *arguments], env=env, timeout=left)
    except subprocess.TimeoutExpired:
        session.budget.left_out.append(f"the end of {name}")
        return [{"part": name, "command": arguments, "rc": None}]
    return [{"part": name, "command": arguments, "rc": done.returncode}]


def bench(preset: str, session: Session) -> Rows:
    file = ["--json", str(session.out / f"bench-{preset}.json")]
    if session.dry_run:
        return command(session, preset, "bench", *TRIES[preset], *file)
    return command(session, preset, "bench", *PIPELINES[preset], "--backends", BACKENDS, *file)


def count(session: Session) -> Rows:
    preset = [] if session.dry_run else ["--preset", "sd15"]
    file = str(session.out / "counts.json")
    return command(session, "count", "count", *preset, "--steps", "3", "--json", file)


def engines(session: Session) -> Rows:
    """Build SD1.5's engines for this GPU and race them; what a builder refuses is kept, too."""
    if session.dry_run:
        return command(session, "engines", "export", "--help")
    folder, preset = str(session.out / "engines"), ["--preset", "sd15"]
    rows = command(session, "building engines", "export", *preset, "--trt", folder)
    if rows[0]["rc"] == 0:
        backends = ["--backends", "eager,fastdiff,tensorrt", "--engines", folder]
        file = str(session.out / "bench-engines.json")
        rows += command(session, "engines", "bench", *preset, *backends, "--json", file)
    return rows


PARTS: dict[str, tuple[float, Callable[[Session], Rows]]] = {
    "verify": (0, check_sizes),
    "kernels": (0, time_kernels),
    "vae": (20, lambda session: time_vae(session.device, session.dry_run)),
    "sd15": (60, partial(bench, "sd15")),
    "sdxl": (120, partial(bench, "sdxl")),
    "count": (20, count),
    "changes": (60, lambda session: time_changes(session.device, session.dry_run)),
    "engines": (180, engines),
    "cases": (0, check_cases),
}
"""In order of what matters most, with the seconds that a part should have left to be begun."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--minutes", type=float, default=8, help="leave out what is later (8)")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    parser.add_argument("--mode", help="of torch.compile: max-autotune-no-cudagraphs, …")
    parser.add_argument("--dry-run", action="store_true", help="the CPU kernels, small pipelines")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only names {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU here; --dry-run tries the script on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    session = Session(options.out, options.dry_run, Budget(options.minutes), options.mode)
    facts = {"machine": machine(), "versions": versions(), "commit": commit()}
    facts |= {"dry_run": True} if options.dry_run else {}
    found: dict[str, Rows] = {}
    for part, (seconds, collect) in PARTS.items():
        if part not in parts or not session.budget.allows(part, 0 if session.dry_run else seconds):
            continue
        found[part] = collect(session)
        text = json.dumps(facts | {"rows": found[part]}, indent=1)
        write_file(options.out / f"{part}.json", lambda path, text=text: path.write_text(text))
    print(*goals.table([*found.get("kernels", []), *found.get("vae", [])]), sep="\n")
    session.budget.say()
    wrong = [row for row in found.get("verify", []) if not row["passed"]]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
