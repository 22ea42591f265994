"""The page of the command line: what each command's --help says."""

from typing import Any

import typer

from fastdiff.cli import app
from tools.site_kernels import table


def page() -> str:
    group: Any = typer.main.get_command(app)
    parts = ["# Command line"]
    parts.append(
        "Data goes to stdout, progress to stderr. Exit codes: 0 success, 1 something failed or got"
        " worse, 2 bad input, 3 undecided."
    )
    context = group.make_context("fastdiff", [], resilient_parsing=True)
    for name in sorted(group.list_commands(context)):
        parts.append(_command(name, group.get_command(context, name)))
    return "\n\n".join(parts) + "\n"


def _command(name: str, command: Any) -> str:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    usage = " ".join([f"fastdiff {name}", *map(_written, arguments)])
    parts = [f"## {name}", _plain(command.help or ""), f"```\n{usage} [OPTIONS]\n```"]
    rows = [(f"`{_written(one)}`", _plain(one.help or ""), "") for one in arguments]
    rows += [(_names(one), _plain(one.help or ""), _default(one)) for one in options]
    parts.append(table(("option", "meaning", "if absent"), rows, words=3))
    return "\n\n".join(parts)


def _written(argument: Any) -> str:
    name = argument.name.upper()
    name += "..." if argument.nargs == -1 else ""
    return name if argument.required else f"[{name}]"


def _names(option: Any) -> str:
    return ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))


def _default(option: Any) -> str:
    value = option.default
    if value is None or value is False or callable(value) or value in ((), [], ""):
        return ""
    return f"`{value}`"


def _plain(text: str) -> str:
    """Help on one line, as Markdown: a bar would end a cell, a bracket begin a link or a tag."""
    one = " ".join(text.split())
    for mark in "\\|<[*_":
        one = one.replace(mark, "\\" + mark)
    return one
