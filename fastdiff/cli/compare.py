"""compare: what is here, and another state of it, in turn."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli.options import (
    DEMO,
    Device,
    Dtype,
    Preset,
    Scale,
    Side,
    app,
    at_least,
    one_of,
    was_given,
)
from fastdiff.errors import UserError

OF_PIPELINES = ("preset", "scale", "steps", "height", "width", "backends")


@app.command()
def compare(
    context: typer.Context,
    folder: Annotated[
        Path | None,
        typer.Argument(help="A diffusers pipeline, or kernels; the demo if absent."),
    ] = None,
    against: Annotated[
        str, typer.Option(help="The other state: a revision, a folder or a wheel.")
    ] = "HEAD",
    pairs: Annotated[int | None, typer.Option(help="Process pairs.")] = None,
    until_precise: Annotated[
        str | None, typer.Option(help="How narrow each interval is to be; 1% if absent.")
    ] = None,
    limit: Annotated[
        int, typer.Option(help="With --until-precise: seconds that it takes at most.")
    ] = 60,
    gate: Annotated[
        str, typer.Option(help="both, times or counters, which need no quiet.")
    ] = "both",
    preset: Preset = None,
    scale: Scale = 1.0,
    backends: Annotated[str, typer.Option(help="Comma-separated.")] = "fastdiff",
    filter_: Annotated[
        str, typer.Option("--filter", help="Of kernels: part of a kernel's or case's name.")
    ] = "",
    dtype: Dtype = None,
    device: Device = None,
    threads: Annotated[int, typer.Option(help="Of each state on a CPU.")] = 1,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 10,
    height: Side = None,
    width: Side = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write fastdiff.paired/1 here.")
    ] = None,
) -> None:
    """Has this state become slower than another? A verdict, and exit 1 where it has."""
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
        raise UserError("--gate counters goes with pipelines on the backend fastdiff")
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
    document = paired.document(done, places, _case(folder, settings), settings.threads, command)
    comparison = judge(pair_of(document), command)
    with afterwards(json_file, lambda: paired.to_json(document)):
        show(comparison)
    if comparison.exit_code:
        raise typer.Exit(comparison.exit_code)


def _settings(context: typer.Context) -> Any:
    """What both states are asked to run."""
    from fastdiff.bench.backends import ON_ENGINES, choose
    from fastdiff.bench.pipelines import check_device, check_dtype
    from fastdiff.regression.pairs import Settings

    given = context.params
    suite, folder = suite_of(given["folder"])
    device = check_device(given["device"])
    dtype = str(check_dtype(given["dtype"], device)).removeprefix("torch.")
    at_least("--threads", given["threads"], 1)
    shared = {"suite": suite, "device": device, "dtype": dtype, "threads": given["threads"]}
    if suite == "kernels":
        if lost := [name for name in OF_PIPELINES if was_given(context, name)]:
            raise UserError(f"--{lost[0]} goes with pipelines; kernels have cases of their own")
        return Settings(**shared, filter=given["filter_"])
    if given["filter_"]:
        raise UserError("--filter goes with kernels; pipelines are chosen by --preset or a folder")
    one_of(folder, given["preset"])
    wanted = [name.strip() for name in given["backends"].split(",")]
    backends = tuple(name for name in choose(given["backends"]) if name in wanted)
    if engines := set(backends) & set(ON_ENGINES):
        raise UserError(
            f"--backends {min(engines)} goes with bench: its engines are made of one state alone"
        )
    return Settings(
        **shared,
        steps=given["steps"],
        height=given["height"],
        width=given["width"],
        backends=backends,
        folder=folder,
        preset=given["preset"],
        scale=given["scale"],
    )


def suite_of(folder: Path | None) -> tuple[str, str | None]:
    """The suite that an argument names, or that of the folder which it is."""
    if folder is None or (folder in (DEMO, Path("pipelines")) and not folder.exists()):
        return "pipelines", None
    if folder == Path("kernels") and not folder.exists():
        return "kernels", None
    return "pipelines", str(folder)


def _until(pairs: int | None, precise: str | None, limit: int, limited: bool) -> Any:
    from fastdiff.regression.pairs import Until

    at_least("--limit", limit, 1)
    if pairs is not None:
        if precise is not None:
            raise UserError("got --pairs and --until-precise; give one of them")
        if limited:
            raise UserError("got --pairs and --limit; pairs are drawn to their number")
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
        raise UserError(f"{option} is {text}; give a share between 0% and 100%, as 3% or 0.03")
    return value


def _folder(folder: str, base: Any, new: Any) -> str:
    """Relative where each state has its own, else the one that is here."""
    from fastdiff.bench.saved import check_folder

    top = new.root.resolve()
    if Path(folder).is_absolute() and Path(folder).resolve().is_relative_to(top):
        folder = str(Path(folder).resolve().relative_to(top))
    if not (base.root / folder / "model_index.json").is_file():
        return str((new.root / folder).resolve())
    check_folder(base.root / folder)
    return folder


def _case(folder: Path | None, settings: Any) -> str:
    """What was timed, as every row begins."""
    parts = [settings.dtype, settings.device]
    if settings.suite == "kernels":
        return ", ".join(["kernels", *parts])
    preset = settings.preset and f"{settings.preset} scale {settings.scale:g}"
    name = preset or (folder.name if folder and settings.folder else "demo")
    if settings.height or settings.width:
        parts.append(f"{settings.width or 'own'}×{settings.height or 'own'}")
    return ", ".join([name, *parts, f"{settings.steps} steps"])


def _nothing(settings: Any, rows: dict[str, list[str]]) -> str:
    if settings.filter and not any(rows.values()):
        return f"--filter {settings.filter} fits no kernel's case; give part of a name"
    return "the two states have nothing in common that could be timed"
