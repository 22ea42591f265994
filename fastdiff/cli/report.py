"""report: two states compared, as a table, a page, and an exit code for CI."""

import os
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.compare import share
from fastdiff.cli.options import Json, app
from fastdiff.errors import UserError


@app.command()
def report(
    context: typer.Context,
    base: Annotated[
        Path | None,
        typer.Argument(
            help="JSON document of the old state, or of both states as compare --json writes it."
        ),
    ] = None,
    new: Annotated[Path | None, typer.Argument(help="JSON document of the new state.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write a comment for a pull request here.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots here.")] = None,
    junit: Annotated[
        Path | None, typer.Option(help="Write JUnit XML here, a test case for each row.")
    ] = None,
    json_file: Json = None,
    pytest_benchmark: Annotated[
        Path | None,
        typer.Option(help="Write the times of NEW here, in pytest-benchmark's format."),
    ] = None,
    floor: Annotated[
        str | None,
        typer.Option(
            help="Ignore changes below this share. Default: 3% for states that ran in turn, 10% for"
            " separate runs."
        ),
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(help="With --html: also plot the results in this folder, commit by commit."),
    ] = None,
    roofline: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --html: also plot a file that roofline --json wrote. Repeat it for more."
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also show rows without a change.")
    ] = False,
) -> None:
    """Compare the measurements of two states: is the new one slower?

    Exit codes: 0 no, 1 yes, 2 bad input, 3 undecided.
    """
    from fastdiff.regression.history import read as read_history
    from fastdiff.written import afterwards, check_writable, told, write_text

    places = {
        "--markdown": markdown,
        "--html": html,
        "--junit": junit,
        "--json": json_file,
        "--pytest-benchmark": pytest_benchmark,
    }
    for option, path in places.items():
        if path is not None:
            check_writable(path, option)

    if roofline and html is None:
        raise UserError("--roofline needs --html")
    if base is None:
        if history is None or html is None:
            raise UserError(
                "give BASE.json and NEW.json, one file with both, or --history and --html"
            )
        if lost := [option for option, path in places.items() if path and option != "--html"]:
            raise UserError(f"{lost[0]} needs two states; give BASE.json and NEW.json")
        from fastdiff.regression.reports.page import history_page

        write_text(html, history_page(read_history(history)))
        print(html)
        return
    from fastdiff.regression.compare import compare
    from fastdiff.regression.documents import read_pair
    from fastdiff.regression.reports import as_json
    from fastdiff.regression.reports import pytest_benchmark as foreign
    from fastdiff.regression.reports.junit import junit as to_junit
    from fastdiff.regression.reports.markdown import markdown as to_markdown
    from fastdiff.regression.reports.page import page
    from fastdiff.regression.reports.terminal import show
    from fastdiff.regression.rooflines import read as read_roofline

    wanted = None if floor is None else share("--floor", floor)
    found = compare(read_pair(base, new), shlex.join(["fastdiff", *context.obj]), wanted)
    past = None if history is None else read_history(history)
    blocks = [read_roofline(path) for path in roofline or ()]
    kinds: dict[str, Callable[[], str]] = {
        "--markdown": lambda: to_markdown(found),
        "--html": lambda: page(found, past, blocks),
        "--junit": lambda: to_junit(found),
        "--json": lambda: as_json.to_json(found),
        "--pytest-benchmark": lambda: foreign.to_pytest_benchmark(found),
    }
    texts = {path: kinds[option]() for option, path in places.items() if path is not None}
    with ExitStack() as written:
        for path, text in texts.items():
            written.enter_context(afterwards(path, lambda text=text: text))  # type: ignore[misc]
        show(found, everything)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with told(Path(summary)), Path(summary).open("a", encoding="utf-8") as file:
            file.write(to_markdown(found) + "\n")
    if found.exit_code:
        raise typer.Exit(found.exit_code)
