"""inspect: what the kernels compile to."""

import json as json_module
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli.engines import inspect_engines
from fastdiff.cli.options import Json, app
from fastdiff.errors import UserError

SCHEMA = "fastdiff.static/1"
WHICH = ("op", "kernel", "case", "dtype")
COLUMNS = {
    "num_warps": "warps",
    "num_stages": "stages",
    "registers": "regs",
    "spills": "spill",
    "shared": "shared",
    "occupancy": "occupancy",
    "limited_by": "limited by",
    "load": "load B",
    "store": "store B",
    "wants_load": "could load B",
    "narrow": "narrow loads",
    "mma": "multiplies by",
    "bound": "waits for",
}
"""The columns of the table of kernels: a row's field, and the column's heading."""
LEGEND = (
    "stages: loop iterations whose loads are in flight at once; regs: registers per thread, at most"
    " 255; spill: bytes per thread that do not fit into registers",
    "shared: bytes of shared memory per block; occupancy: warps on a multiprocessor, as a share of"
    " the most that it holds; limited by: what keeps occupancy below 100%",
    "load B, store B: bytes of a thread's widest load and store; could load B: the widest load that"
    " the data's layout allows; narrow loads: number of loads and stores narrower than that",
    "multiplies by: the matrix instruction, empty if there is none; waits for: memory or compute,"
    " whichever takes longer at the GPU's specified rates",
)


@app.command()
def inspect(
    context: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="KERNEL|ENGINES",
            help="One of our GPU kernels, or a folder that export --trt made. Default: all our"
            " kernels.",
            show_default=False,
        ),
    ] = None,
    arch: Annotated[
        list[int] | None,
        typer.Option(
            help="A GPU's architecture, such as 80, 90 or 120. Repeat it for more. Default: all"
            " that fastdiff knows."
        ),
    ] = None,
    models: Annotated[
        bool, typer.Option("--models", help="Only the sizes that occur in models.")
    ] = False,
    count: Annotated[
        bool,
        typer.Option(
            "--count", help="Only count the kernels that each pipeline needs; compile none."
        ),
    ] = False,
    json_file: Json = None,
) -> None:
    """Show what GPU kernels compile to, or describe engines and check that they are undamaged.

    Needs no GPU. Exits with 1 if a kernel spills registers, does not fit the GPU, loads less at
    once than it could, or uses no matrix instruction where one exists; with --count, if a pipeline
    needs more kernels than its limit.
    """
    from fastdiff.kernels.dispatch import all_kernels
    from fastdiff.written import check_writable

    if json_file:
        check_writable(json_file, "--json")
    kernels = [name for name, one in all_kernels().items() if "triton" in one.implementations]
    if what is not None and what not in kernels:
        if not Path(what).exists():
            raise UserError(
                f"{what!r} is neither a folder of engines nor one of our Triton kernels, which are"
                f" {', '.join(sorted(kernels))}"
            )
        if arch:
            raise UserError("leave out --arch: an engine has the GPU it was built for")
        if models:
            raise UserError("leave out --models, which chooses kernels, not engines")
        return inspect_engines(Path(what), json_file)
    if count:
        if what or models:
            raise UserError("--count takes neither a kernel nor --models; leave them out")
        return count_kernels(arch, json_file)
    command = shlex.join(["fastdiff", *context.obj])
    inspect_kernels(None if what is None else [what], arch, models, json_file, command)


def count_kernels(archs: list[int] | None, json_file: Path | None) -> None:
    """Show how many kernels each pipeline has compiled, and exit with 1 if one has too many."""
    import torch

    from fastdiff import tables
    from fastdiff.bench.specialisations import MOST, PIPELINES, counted
    from fastdiff.kernels.inspect import SHARED_LIMIT
    from fastdiff.written import afterwards

    archs = archs or list(SHARED_LIMIT)
    known_archs(archs)
    found = {
        arch: {name: counted(name, arch, torch.float16) for name in PIPELINES} for arch in archs
    }
    rows = []
    for arch, counts in found.items():
        for kernel in sorted({kernel for one in counts.values() for kernel in one}):
            cells = [str(one.get(kernel, 0)) for one in counts.values()]
            rows.append(tables.Row((f"{kernel} · sm_{arch}", *cells)))
        totals = [str(sum(one.values())) for one in counts.values()]
        rows.append(tables.Row((f"all · sm_{arch}", *totals), apart=True))
    title = f"kernels to compile for a float16 pipeline, {MOST} at most"
    with afterwards(json_file, lambda: json_module.dumps(found, indent=1) + "\n"):
        tables.show(tables.printer(), title, ("kernel", *PIPELINES), rows)
    wrong = [
        f"{name} needs {total} kernels on sm_{arch}, more than {MOST}"
        for arch, counts in found.items()
        for name, one in counts.items()
        if (total := sum(one.values())) > MOST
    ]
    if wrong:
        print(*wrong, sep="\n", file=sys.stderr)
        raise typer.Exit(1)


def known_archs(archs: Iterable[int]) -> None:
    """UserError for an architecture whose limits we do not know."""
    from fastdiff.kernels.inspect import SHARED_LIMIT

    if unknown := set(archs) - set(SHARED_LIMIT):
        known = ", ".join(map(str, SHARED_LIMIT))
        raise UserError(f"--arch is {min(unknown)}; choose from {known}")


def inspect_kernels(
    ops: list[str] | None,
    arch: list[int] | None,
    models: bool,
    json_file: Path | None,
    command: str,
) -> None:
    """Compile the kernels and show the table; print each fault and exit with 1 if there is one."""
    from dataclasses import asdict

    from fastdiff.bench.kernels import cases
    from fastdiff.bench.machine import commit, versions
    from fastdiff.bench.progress import status
    from fastdiff.kernels.inspect import table
    from fastdiff.written import afterwards

    known_archs(arch or ())
    named = {case.name for _, case in cases("cuda")} if models else None
    with status() as log:
        found = table(arch or None, cases=named, ops=ops, log=log)
    rows = [asdict(row) for row in found]
    document = {
        "schema": SCHEMA,
        "versions": {"triton": versions()["triton"]},  # its wheel brings compiler and assembler
        "commit": commit(),
        "command": command,
        "rows": rows,
    }
    with afterwards(json_file, lambda: json_module.dumps(document, indent=1) + "\n"):
        show_kernels(rows)
    if faults := [fault for row in found for fault in row.faults]:
        print(*faults, sep="\n", file=sys.stderr)
        raise typer.Exit(1)


def show_kernels(rows: list[dict[str, Any]]) -> None:
    """Print a row for each kernel, named as in a report, and what the columns mean."""
    from fastdiff import tables

    shown = []
    for row in rows:
        cells = {**row, "occupancy": f"{row['occupancy']:.0%}"}
        name = " · ".join((*(row[key] for key in WHICH), f"sm_{row['arch']}"))
        shown.append(tables.Row((name, *(str(cells[key]) for key in COLUMNS))))
    head = ("kernel", *COLUMNS.values())
    left = [COLUMNS[key] for key in ("limited_by", "mma", "bound")]
    console = tables.printer()
    tables.show(console, "what the kernels compile to", head, shown, left)
    tables.below(console, LEGEND)
