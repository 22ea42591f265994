"""env and inspect: what is installed, and what the kernels compile to."""

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.engines import inspect_engines
from fastdiff.cli.options import app
from fastdiff.errors import UserError


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
    engines: Annotated[
        Path | None, typer.Argument(help="What export --trt wrote; our GPU kernels if absent.")
    ] = None,
    arch: Annotated[
        list[int] | None, typer.Option(help="80, 90, 120, …; every one we know if absent.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What engines are, if they are whole; or what each GPU kernel compiles to: registers, …"""
    if engines is not None:
        if arch:
            raise UserError("--arch is for our kernels; an engine has the GPU it was built for")
        return inspect_engines(engines, json)
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    try:
        from fastdiff.kernels.inspect import SHARED_LIMIT, table
    except ImportError as error:
        raise UserError(f"inspect needs triton ({error}); pip install fastdiff[gpu]") from error
    if unknown := set(arch or ()) - set(SHARED_LIMIT):
        known = ", ".join(map(str, SHARED_LIMIT))
        raise UserError(f"--arch is {min(unknown)}; choose from {known}")
    rows = [asdict(row) for row in table(arch or None)]
    if json:
        print(json_module.dumps(rows, indent=1))
        return
    shown = Table(*(rows[0] if rows else ()), pad_edge=False)
    for row in rows:
        shown.add_row(*(str(value) for value in row.values()))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    console.print(shown)
