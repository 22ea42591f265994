"""env and inspect: what is installed, and what the kernels compile to."""

import json as json_module
import shlex
import sys
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
    out: Annotated[Path | None, typer.Option(help="Write fastdiff.static/1 here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What each GPU kernel compiles to: registers, …; or what engines are, if they are whole.

    Exits with 1 where a kernel spills, does not fit, or moves or multiplies less than it could.
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
    command = shlex.join(["fastdiff", *context.obj])
    inspect_kernels(None if what is None else [what], arch, models, out, json, command)


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
    from fastdiff.kernels.inspect import SHARED_LIMIT, table
    from fastdiff.written import afterwards, check_writable

    if unknown := set(arch or ()) - set(SHARED_LIMIT):
        known = ", ".join(map(str, SHARED_LIMIT))
        raise UserError(f"--arch is {min(unknown)}; choose from {known}")
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
