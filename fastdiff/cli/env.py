"""env and --version: what is installed here."""

import json
from typing import Annotated

import typer

from fastdiff.cli.options import Json, app

SCHEMA = "fastdiff.env/1"


def _version(asked: bool) -> None:
    if asked:
        import fastdiff

        print(f"fastdiff {fastdiff.__version__}")
        raise typer.Exit


@app.callback()
def every(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Makes diffusers pipelines fast without changing what they draw."""


@app.command()
def env(json_file: Json = None) -> None:
    """Show versions and machine, to paste into an issue."""
    from fastdiff.bench.machine import commit, machine, native, versions
    from fastdiff.installed import clash
    from fastdiff.written import afterwards, check_writable

    if json_file:
        check_writable(json_file, "--json")
    facts = {"commit": commit()} | versions() | machine()
    gpu = facts.pop("gpu")
    facts |= {f"gpu {key}": value for key, value in gpu.items()} if gpu else {"gpu": None}
    compiled = native()
    facts |= {"fastdiff._C": compiled["isa"] or compiled["note"]}
    if sentence := clash():
        facts |= {"in our place": sentence}
    document = {"schema": SCHEMA} | facts
    with afterwards(json_file, lambda: json.dumps(document, indent=1) + "\n"):
        for name, value in facts.items():
            print(f"- {name}: {'none' if value is None else value}")
