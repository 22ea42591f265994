"""The parts of `make gpu` that no `fastdiff` command measures: `python -m benchmarks.parts NAME`.

Each runs in its own process and writes rows as it goes, so that one that hangs or fails does not
affect the others.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import profiled
from benchmarks.changes import time_changes, time_vae
from benchmarks.race import copying, medians, race
from benchmarks.shapes import full, tiny, triton_kernels
from benchmarks.sheet import Sheet
from fastdiff.bench.kernels import sampler
from fastdiff.kernels.contract import Case, verify
from fastdiff.kernels.dispatch import Kernel
from fastdiff.recipes import denoiser
from fastdiff.written import write_text

DRY_SCALE = 0.1
"""The scale of presets in a dry run."""


@dataclass(frozen=True)
class Session:
    """A part's settings. `dry_run` tests the script at small sizes on a CPU, not the kernels."""

    path: Path
    dry_run: bool
    warm: Path | None = None
    """A folder that `fastdiff warm` wrote for SD1.5."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry_run else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry_run else torch.float16

    @property
    def which(self) -> str:
        return "cpu" if self.dry_run else "triton"

    def sizes(self, kernel: Kernel) -> tuple[Case, ...]:
        return tiny(kernel) if self.dry_run else full(kernel)

    def pipeline(self, preset: str) -> Any:
        from fastdiff.bench.presets import build

        pipe = build(preset, DRY_SCALE if self.dry_run else 1.0, self.dtype, str(self.device))
        pipe.set_progress_bar_config(disable=True)
        return pipe


def ceilings(session: Session, sheet: Sheet) -> None:
    """This GPU's actual rates: bytes per second of a copy, FLOP/s of a product."""
    device, dtype = session.device, session.dtype
    elements, side = (1 << 16, 256) if session.dry_run else (1 << 30, 8192)
    source = torch.randn(elements, device=device, dtype=dtype)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    copy = sampler([copying(source)], device)
    product = sampler([partial(torch.mm, a, b)], device)
    moved, flops = 2 * elements * dtype.itemsize, 2 * side**3
    for name, sample, work in (("copy", copy, moved), ("product", product, flops)):
        times = [sample() for _ in range(11)]
        sheet.add({"ceiling": name, "work": work, "samples_ms": times})
        print(f"{name}: {work / sorted(times)[5] / 1e9:.3f} T/s")


def verified(
    session: Session,
    sheet: Sheet,
    cases: Iterable[tuple[Kernel, Case]],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Compare each case with the error budget."""
    for kernel, case in cases:
        for dtype in (dtype for dtype in dtypes if dtype in kernel.spec.dtypes):
            row = {"kernel": kernel.spec.name, "case": case.name, "dtype": str(dtype)}
            try:
                run = kernel.implementations[session.which]()
                verdicts = verify(kernel.spec, run, case, dtype, session.device)
                row["errors"] = [(v.output, v.error, v.allowed) for v in verdicts]
                row["passed"] = all(v.passed for v in verdicts)
            except Exception as error:  # a kernel that fails to launch must not end the run
                row |= {"passed": False, "exception": repr(error)[:2000]}
            sheet.add(row)
            if not row["passed"]:
                print("FAILED", row)
    passed = sum(row["passed"] for row in sheet.rows)
    print(f"{passed} of {len(sheet.rows)} inside the error budget")


def check_sizes(session: Session, sheet: Sheet) -> None:
    cases = [(kernel, case) for kernel in triton_kernels() for case in session.sizes(kernel)]
    verified(session, sheet, cases, (session.dtype,))


def check_cases(session: Session, sheet: Sheet) -> None:
    """The specs' own cases, including difficult ones, in every dtype; in a dry run only a few."""
    few = slice(-2, None) if session.dry_run else slice(None)
    cases = [(k, case) for k in triton_kernels() for case in k.spec.cases[few]]
    verified(session, sheet, cases, (torch.float16, torch.bfloat16, torch.float32))


def time_kernels(session: Session, sheet: Sheet, inductor: bool = False) -> None:
    """Time each size against its rivals; with `inductor`, only against torch.compile."""
    for kernel in triton_kernels():
        for case in session.sizes(kernel):
            try:
                with torch.no_grad():
                    row = race(
                        *(kernel, case, session.device, session.which, session.dry_run, inductor)
                    )
            except Exception as error:  # wrong, or out of memory: keep the row, without a time
                row = {"kernel": kernel.spec.name, "case": case.name, "sizes": case.sizes}
                row |= {"samples_ms": {}, "exception": repr(error)[:2000]}
            sheet.add(row)
            shown = "  ".join(f"{name} {1e3 * ms:.1f} us" for name, ms in medians(row).items())
            why = row.get("exception", "nothing ran: see the file")
            print(f"{kernel.spec.name:16} {case.name:15} {shown or why}")


def profile_step(preset: str, session: Session, sheet: Sheet) -> None:
    """Profile the kernels of one step, eager and fastdiff; a text file lists the most expensive."""
    import fastdiff
    from fastdiff.bench.timing import picture

    pipe = session.pipeline(preset)
    side = denoiser(pipe).config.sample_size * pipe.vae_scale_factor
    lines: list[str] = []
    for backend in ("eager", "fastdiff"):
        if backend == "fastdiff":
            fastdiff.compile(pipe)
        rows = profiled.kernels_of_a_step(pipe, side)
        wall = profiled.step_ms(pipe, side)
        sheet.add({"backend": backend, "step_ms": wall, "kernels": rows})
        lines += profiled.table(f"{preset} {backend}", rows, wall)
        lines += ["", f"{preset} {backend}, a warm picture of 2 steps on the host:"]
        lines += [profiled.on_the_host(lambda: picture(pipe, side, side, 2)), ""]
        write_text(session.path.with_suffix(".txt"), "\n".join(lines) + "\n")
    lines += [str(fastdiff.report(pipe))]
    write_text(session.path.with_suffix(".txt"), "\n".join(lines) + "\n")
    print("\n".join(lines))


def first_picture(backend: str, session: Session, sheet: Sheet) -> None:
    """Seconds until the first pictures of a process: kernels are compiled, graphs recorded."""
    import fastdiff
    from fastdiff.bench.backends import prepare
    from fastdiff.bench.timing import clock, picture

    pipe = session.pipeline("sd15")
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    start = clock(session.device)
    if session.warm is None:
        prepare(backend, pipe, None)
    else:
        fastdiff.compile(pipe, warm=session.warm)
    prepared = clock(session.device)
    pictures = []
    for _ in range(3):
        begun = clock(session.device)
        picture(pipe, side, side, 4, output_type="np")
        pictures.append(clock(session.device) - begun)
    row = {"backend": backend, "prepare_s": prepared - start, "pictures_s": pictures}
    sheet.add(row)
    print(row)


def first_pictures(session: Session, sheet: Sheet) -> None:
    """In new processes: without any compiled kernel, then with the first process's Triton cache,
    then only with what `fastdiff warm` wrote."""

    def begin(backend: str, kernels: str, cache: str, *more: str) -> None:
        path = session.path.with_name(f"first-{backend}-{kernels}.json")
        command = [sys.executable, "-P", "-m", "benchmarks.parts", f"first-{backend}"]
        command += ["--out", str(path), *(["--dry-run"] if session.dry_run else []), *more]
        done = subprocess.run(command, env=os.environ | {"TRITON_CACHE_DIR": cache})
        sheet.add({"backend": backend, "kernels": kernels, "rc": done.returncode})

    with tempfile.TemporaryDirectory() as cache:
        begin("eager", "cold", cache)
        begin("fastdiff", "cold", cache)
        begin("fastdiff", "cached", cache)
    if session.warm is not None:
        with tempfile.TemporaryDirectory() as cache:
            begin("fastdiff", "shipped", cache, "--warm", str(session.warm))


PARTS: dict[str, Callable[[Session, Sheet], None]] = {
    "ceilings": ceilings,
    "verify": check_sizes,
    "profile-sd15": partial(profile_step, "sd15"),
    "profile-sdxl": partial(profile_step, "sdxl"),
    "profile-sd3": partial(profile_step, "sd3"),
    "kernels": time_kernels,
    "vae": lambda session, sheet: time_vae(session.device, session.dry_run, sheet.add),
    "first-pictures": first_pictures,
    "first-eager": partial(first_picture, "eager"),
    "first-fastdiff": partial(first_picture, "fastdiff"),
    "changes": lambda session, sheet: time_changes(session.device, session.dry_run, sheet.add),
    "cases": check_cases,
    "inductor-kernels": partial(time_kernels, inductor=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.parts", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--warm", type=Path, help="what fastdiff warm wrote for SD1.5")
    parser.add_argument("--dry-run", action="store_true", help="small sizes on a CPU")
    options = parser.parse_args()
    session = Session(options.out, options.dry_run, options.warm)
    with Sheet.open(options.out) as sheet:
        PARTS[options.part](session, sheet)


if __name__ == "__main__":
    main()
