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
"""Of the table of kernels: a row's field beside its name, and what stands above it."""
LEGEND = (
    "stages: rounds of a loop whose loads are under way at once; regs: registers of a thread, 255"
    " at most; spill: bytes of a thread that do not fit into them",
    "shared: bytes of shared memory of a block; occupancy: warps on a multiprocessor, of those that"
    " it can hold; limited by: why there are no more",
    "load B, store B: bytes of a thread's widest load and store; could load B: what the layout of"
    " the data allows; narrow loads: how many loads and stores are narrower than that",
    "multiplies by: the matrix instruction, empty without one; waits for: memory or compute, which"
    " takes longer at the GPU's specified rates",
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
            help="A GPU's architecture, as 80, 90 or 120. Repeat it for more. Default: all we know."
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
    """Show what GPU kernels compile to, or what engines are and whether they are undamaged.

    Needs no GPU. Exits with 1 where a kernel spills, does not fit, or moves or multiplies less at
    once than it could; with --count where a pipeline needs more kernels than it may.
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
            raise UserError("--arch is for our kernels; an engine has the GPU it was built for")
        if models:
            raise UserError("--models is for our kernels")
        return inspect_engines(Path(what), json_file)
    if count:
        if what or models:
            raise UserError("--count takes no kernel and no --models; give --arch and --json")
        return count_kernels(arch, json_file)
    command = shlex.join(["fastdiff", *context.obj])
    inspect_kernels(None if what is None else [what], arch, models, json_file, command)


def count_kernels(archs: list[int] | None, json_file: Path | None) -> None:
    """Show how often each kernel is compiled for each pipeline; say which need too many."""
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
    """UserError for an architecture that we know no limits of."""
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
    """Compile them, show the table and say what may not be."""
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
        "versions": {"triton": versions()["triton"]},  # its wheel holds compiler and assembler
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
    """Print a row for each, named as in a report, and what the columns mean."""
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
