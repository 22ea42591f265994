"""env and inspect: what is installed, and what the kernels compile to."""

import json as json_module
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli.engines import inspect_engines
from fastdiff.cli.options import app
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
    "wants_load": "wants",
    "narrow": "narrow",
    "mma": "mma",
    "bound": "bound",
}
"""Of the table of kernels: a row's field beside its name, and what stands above it."""


@app.command()
def env(
    json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Versions and machine, to paste into an issue."""
    from fastdiff.bench.machine import commit, machine, native, versions

    facts = {"commit": commit()} | versions() | machine()
    gpu = facts.pop("gpu")
    facts |= {f"gpu {key}": value for key, value in gpu.items()} if gpu else {"gpu": None}
    compiled = native()
    facts |= {"fastdiff._C": compiled["isa"] or compiled["note"]}
    if json:
        print(json_module.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        print(f"- {name}: {'none' if value is None else value}")


@app.command()
def inspect(
    context: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="KERNEL|ENGINES",
            help="One of our GPU kernels, or what export --trt wrote; all our kernels if absent.",
        ),
    ] = None,
    arch: Annotated[
        list[int] | None, typer.Option(help="80, 90, 120, …; every one we know if absent.")
    ] = None,
    models: Annotated[bool, typer.Option(help="Only sizes that models have.")] = False,
    count: Annotated[
        bool, typer.Option(help="How many each pipeline needs compiled; compiles none.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write fastdiff.static/1 here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What each GPU kernel compiles to: registers, …; or what engines are, if they are whole.

    Exits with 1 where a kernel spills, does not fit, or moves or multiplies less than it could, and
    with --count where a pipeline needs more kernels than it may.
    """
    from fastdiff.kernels.dispatch import all_kernels

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
        if out:
            raise UserError("--out is for our kernels; an engine's manifest lies beside it")
        return inspect_engines(Path(what), json)
    if count:
        if what or models or out:
            raise UserError("--count takes no kernel, --models or --out; give --arch and --json")
        return count_kernels(arch, json)
    command = shlex.join(["fastdiff", *context.obj])
    inspect_kernels(None if what is None else [what], arch, models, out, json, command)


def count_kernels(archs: list[int] | None, json: bool) -> None:
    """How often each kernel is compiled for each pipeline; says which need too many."""
    import torch

    from fastdiff import tables
    from fastdiff.bench.specialisations import MOST, PIPELINES, counted
    from fastdiff.kernels.inspect import SHARED_LIMIT

    archs = archs or list(SHARED_LIMIT)
    known_archs(archs)
    found = {
        arch: {name: counted(name, arch, torch.float16) for name in PIPELINES} for arch in archs
    }
    if json:
        print(json_module.dumps(found, indent=1))
    else:
        rows = []
        for arch, counts in found.items():
            for kernel in sorted({kernel for one in counts.values() for kernel in one}):
                cells = [str(one.get(kernel, 0)) for one in counts.values()]
                rows.append(tables.Row((f"{kernel} · sm_{arch}", *cells)))
            totals = [str(sum(one.values())) for one in counts.values()]
            rows.append(tables.Row((f"all · sm_{arch}", *totals), apart=True))
        title = f"kernels compiled for a float16 pipeline, at most {MOST}"
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
    out: Path | None,
    json: bool,
    command: str,
) -> None:
    """Compile them, write the table to `out`, print it and say what may not be."""
    from dataclasses import asdict

    from fastdiff.bench.kernels import cases
    from fastdiff.bench.machine import commit, versions
    from fastdiff.bench.progress import status
    from fastdiff.kernels.inspect import table
    from fastdiff.written import afterwards, check_writable

    known_archs(arch or ())
    if out:
        check_writable(out, "--out")
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
    text = json_module.dumps(document, indent=1) + "\n"
    with afterwards(out, lambda: text):
        if json:
            print(text, end="")
        else:
            show_kernels(rows)
    if faults := [fault for row in found for fault in row.faults]:
        print(*faults, sep="\n", file=sys.stderr)
        raise typer.Exit(1)


def show_kernels(rows: list[dict[str, Any]]) -> None:
    """A row for each, named as in a report."""
    from fastdiff import tables

    shown = []
    for row in rows:
        cells = {**row, "occupancy": f"{row['occupancy']:.0%}"}
        name = " · ".join((*(row[key] for key in WHICH), f"sm_{row['arch']}"))
        shown.append(tables.Row((name, *(str(cells[key]) for key in COLUMNS))))
    head = ("kernel", *COLUMNS.values())
    left = [COLUMNS[key] for key in ("limited_by", "mma", "bound")]
    tables.show(tables.printer(), "what the kernels compile to", head, shown, left)
