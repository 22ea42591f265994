"""compare: run this state of a project and another one in turn."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli.options import (
    Device,
    Dtype,
    Json,
    Preset,
    Scale,
    Side,
    app,
    at_least,
    was_given,
)
from fastdiff.errors import UserError

SUITES = ("pipelines", "kernels")
OF_PIPELINES = ("preset", "scale", "steps", "height", "width", "backends")


@app.command()
def compare(
    context: typer.Context,
    pipeline: Annotated[
        str | None,
        typer.Argument(
            metavar="PIPELINE|kernels",
            help="A folder that save_pretrained wrote, a hub id (owner/name), or the word kernels"
            " to compare our kernels one by one. Default: the demo that comes with fastdiff.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str,
        typer.Option(help="The other state: a revision of this repository, a folder or a wheel."),
    ] = "HEAD",
    pairs: Annotated[
        int | None,
        typer.Option(help="Stop after this many pairs of processes, one process for each state."),
    ] = None,
    until_precise: Annotated[
        str | None,
        typer.Option(help="Stop once every ratio is known to within this share. Default: 1%."),
    ] = None,
    limit: Annotated[
        int, typer.Option(help="With --until-precise: stop after this many seconds in any case.")
    ] = 60,
    gate: Annotated[
        str,
        typer.Option(
            help="What decides the exit code: times, counters (which a busy machine does not"
            " disturb) or both."
        ),
    ] = "both",
    preset: Preset = None,
    scale: Scale = 1.0,
    backends: Annotated[
        str, typer.Option(help="The backends to compare, separated by commas.")
    ] = "fastdiff",
    filter_: Annotated[
        str,
        typer.Option(
            "--filter", help="With kernels: only those whose name, or a case's name, contains this."
        ),
    ] = "",
    dtype: Dtype = None,
    device: Device = None,
    threads: Annotated[int, typer.Option(help="Threads of each state on a CPU.")] = 1,
    steps: Annotated[int, typer.Option(help="Number of denoising steps.")] = 10,
    height: Side = None,
    width: Side = None,
    json_file: Json = None,
) -> None:
    """Run two states of a project in turn: has this one become slower?

    Exit codes: 0 no, 1 yes, 2 bad input, 3 undecided. fastdiff report turns the document that
    --json writes into reports.
    """
    from fastdiff.bench.progress import shares
    from fastdiff.bench.saved import check_folder
    from fastdiff.regression import paired, states
    from fastdiff.regression.compare import compare as judge
    from fastdiff.regression.documents import pair_of
    from fastdiff.regression.pairs import race
    from fastdiff.regression.reports.terminal import show
    from fastdiff.written import afterwards, check_writable

    at_least("--steps", steps, 1)
    if json_file:
        check_writable(json_file, "--json")
    settings = _settings(context)
    until = _until(pairs, until_precise, limit, was_given(context, "limit"))
    gates = _gates(gate)
    if gates == ("counters",) and "fastdiff" not in settings.backends:
        raise UserError("--gate counters needs a pipeline and the backend fastdiff")
    root = Path.cwd()
    if settings.folder:
        check_folder(root / settings.folder)  # before an environment is built
    with shares() as log:
        base, new = states.other(against, root, log), states.here(root)
        places = {"base": base, "new": new}
        if settings.folder:
            settings = replace(settings, folder=_folder(settings.folder, base, new))
        done = race(base, new, settings, until, log, gates)
    if "times" in gates and not done.times and not any(done.wrong.values()):
        raise UserError(_nothing(settings, done.rows))
    command = shlex.join(["fastdiff", *context.obj])
    document = paired.document(done, places, _case(pipeline, settings), settings.threads, command)
    comparison = judge(pair_of(document), command)
    with afterwards(json_file, lambda: paired.to_json(document)):
        show(comparison)
    if comparison.exit_code:
        raise typer.Exit(comparison.exit_code)


def _settings(context: typer.Context) -> Any:
    """What both states are asked to run."""
    from fastdiff.bench.backends import ON_ENGINES, choose
    from fastdiff.bench.pipelines import check_device, check_dtype
    from fastdiff.bench.source import Source, folder_of
    from fastdiff.regression.pairs import Settings

    given = context.params
    suite, pipeline = suite_of(given["pipeline"])
    device = check_device(given["device"])
    dtype = str(check_dtype(given["dtype"], device)).removeprefix("torch.")
    at_least("--threads", given["threads"], 1)
    shared = {"suite": suite, "device": device, "dtype": dtype, "threads": given["threads"]}
    if suite == "kernels":
        if lost := [name for name in OF_PIPELINES if was_given(context, name)]:
            raise UserError(f"leave out --{lost[0]}: kernels have cases of their own")
        return Settings(**shared, filter=given["filter_"])
    if given["filter_"]:
        raise UserError("--filter needs kernels; choose a pipeline by --preset or a folder")
    Source(pipeline, given["preset"], given["scale"]).check()
    wanted = [name.strip() for name in given["backends"].split(",")]
    backends = tuple(name for name in choose(given["backends"]) if name in wanted)
    if engines := set(backends) & set(ON_ENGINES):
        raise UserError(
            f"compare cannot run --backends {min(engines)}, whose engines belong to one state; use"
            " fastdiff bench"
        )
    folder = folder_of(pipeline, "compare")
    return Settings(
        **shared,
        steps=given["steps"],
        height=given["height"],
        width=given["width"],
        backends=backends,
        folder=None if folder is None else str(folder),
        preset=given["preset"],
        scale=given["scale"],
    )


def suite_of(pipeline: str | None) -> tuple[str, str | None]:
    """The suite that an argument names, and the pipeline that it names, None for the demo."""
    if pipeline in SUITES and not Path(pipeline).exists():
        return pipeline, None
    return "pipelines", pipeline


def _until(pairs: int | None, precise: str | None, limit: int, limited: bool) -> Any:
    from fastdiff.regression.pairs import Until

    at_least("--limit", limit, 1)
    if pairs is not None:
        if precise is not None:
            raise UserError("got --pairs and --until-precise; give one of them")
        if limited:
            raise UserError(
                "got --pairs and --limit; leave out --limit, which needs --until-precise"
            )
        at_least("--pairs", pairs, 1)
        return Until(pairs=pairs)
    return Until(half_width=share("--until-precise", precise or "1%"), limit_s=limit)


def _gates(asked: str) -> tuple[str, ...]:
    from fastdiff.regression.pairs import GATES

    if asked not in (*GATES, "both"):
        raise UserError(f"--gate is {asked!r}; choose from both, {', '.join(GATES)}")
    return GATES if asked == "both" else (asked,)


def share(option: str, text: str) -> float:
    """A share of one from "3%" or "0.03"."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(%?)", text.strip())
    value = float(found[1]) / (100 if found[2] else 1) if found else 0.0
    if not 0 < value < 1:
        raise UserError(f"{option} is {text}; give a share between 0% and 100%, such as 3% or 0.03")
    return value


def _folder(folder: str, base: Any, new: Any) -> str:
    """A relative path if each state has this folder, else the absolute path of the one here."""
    from fastdiff.bench.saved import check_folder

    top = new.root.resolve()
    if Path(folder).is_absolute() and Path(folder).resolve().is_relative_to(top):
        folder = str(Path(folder).resolve().relative_to(top))
    if not (base.root / folder / "model_index.json").is_file():
        return str((new.root / folder).resolve())
    check_folder(base.root / folder)
    return folder


def _case(pipeline: str | None, settings: Any) -> str:
    """What was timed: the text that every row's name starts with."""
    from fastdiff.bench.source import Source

    parts = [settings.dtype, settings.device]
    if settings.suite == "kernels":
        return ", ".join(["kernels", *parts])
    source = Source(pipeline if settings.folder else None, settings.preset, settings.scale)
    if settings.height or settings.width:
        parts.append(f"{settings.width or 'own'}×{settings.height or 'own'}")
    return ", ".join([source.name, *parts, f"{settings.steps} steps"])


def _nothing(settings: Any, rows: dict[str, list[str]]) -> str:
    if settings.filter and not any(rows.values()):
        return f"--filter {settings.filter} matches no kernel or case; give part of a name"
    return "the two states have no kernel or backend in common that could be timed"
