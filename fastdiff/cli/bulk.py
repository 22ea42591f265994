"""generate --prompts: a job of many pictures."""

import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fastdiff.errors import UserError
from fastdiff.tables import plural

if TYPE_CHECKING:
    from fastdiff.bulk.job import Job
    from fastdiff.bulk.painter import Drawn, Setup
    from fastdiff.bulk.prompts import Row


def draw_file(
    prompts: Path,
    out: Path,
    setup: "Setup",
    own: "Row",
    parallel: str | None,
    capacity: int | None,
    workers: int | None,
) -> None:
    """Draw the rows of a file that are missing in a folder, here or as one of torchrun's ranks.

    own: the values for columns that a row leaves out. Exits with 1 if a row failed.
    """
    from fastdiff.bench.pipelines import check_device
    from fastdiff.bulk import job as jobs
    from fastdiff.bulk.painter import Painter, attempts
    from fastdiff.bulk.prompts import read
    from fastdiff.bulk.together import joined
    from fastdiff.compiler.options import DATA, GUIDANCE

    given = read(prompts, own.seed)
    asked = _asked(setup, own, check_device(setup.device))
    jobs.check(out, given, asked)
    setup, ranks, shared = joined(setup, parallel, DATA)
    for name, value in (("--capacity", capacity), ("--workers", workers)):
        if value is not None and (setup.eager or ranks is not None):
            what = "--eager" if setup.eager else "torchrun"
            raise UserError(f"leave out {name}: {what} draws one picture at a time")
    painter = Painter(setup)
    rows = painter.completed(_filled(given, own), prompts)
    painter.compile(GUIDANCE if ranks is not None and shared == GUIDANCE else None)
    painter.pipe.set_progress_bar_config(disable=True)
    divided = ranks if shared == DATA else None
    if ranks is not None and ranks.rank:
        numbers: set[int] = set(ranks.told(None)[0] or ())
        for _ in attempts(painter, [row for row in rows if row.number in numbers], divided, 1):
            pass  # only the first rank writes files
        return
    with jobs.opened(out, given, rows, asked) as job:
        missing = job.missing
        if ranks is None:
            drawn = attempts(painter, missing, None, capacity, workers or 1)
        else:
            ranks.told([row.number for row in missing])
            drawn = attempts(painter, missing, divided, 1)
        _fill(job, drawn)
    _end(job)


def draw_file_by_ray(
    prompts: Path,
    out: Path,
    setup: "Setup",
    own: "Row",
    address: str,
    capacity: int | None,
    workers: int | None,
    gpus: float | None,
) -> None:
    """`draw_file`, drawn by the actors of a Ray cluster."""
    from fastdiff.bulk import job as jobs
    from fastdiff.bulk.cluster import Cluster, joined
    from fastdiff.bulk.prompts import read

    given = read(prompts, own.seed)
    with joined(Cluster(address, capacity, workers, gpus), setup) as cluster:
        asked = _asked(cluster.setup, own, str(cluster.setup.device))
        jobs.check(out, given, asked)
        rows = cluster.completed(_filled(given, own), prompts)
        with jobs.opened(out, given, rows, asked) as job:
            _fill(job, cluster.attempts(job.missing))
    _end(job)


def _asked(setup: "Setup", own: "Row", device: str) -> dict[str, Any]:
    """Everything besides the rows that decides what is drawn."""
    source, device = setup.source, device.partition(":")[0]
    return {
        "pipeline": source.pipeline or source.name,
        "variant": source.variant,
        "config": source.config,
        "lora": list(source.lora),
        "scheduler": source.scheduler,
        "dtype": setup.dtype or ("fp16" if device == "cuda" else "fp32"),
        "device": device,
        "eager": setup.eager,
        **{name: value for name, value in asdict(own).items() if name in OPTIONS},
    }


OPTIONS = ("seed", "steps", "guidance", "negative", "width", "height")
"""The values that the command line gives for columns that a row leaves out."""


def _filled(rows: Iterable["Row"], own: "Row") -> list["Row"]:
    """The rows, with the values of `own` where a row has none."""
    given = {name: getattr(own, name) for name in OPTIONS if name != "seed"}
    return [
        replace(row, **{n: v for n, v in given.items() if getattr(row, n) is None}) for row in rows
    ]


def _fill(job: "Job", drawn: Iterable["Drawn"]) -> None:
    """Write each picture as it is drawn, and show the progress."""
    from fastdiff.bench.progress import pictures

    with pictures(len(job.rows), len(job.rows) - len(job.missing)) as advance:
        for one in drawn:
            if one.picture is None:
                job.fail(one.row, str(one.error))
            else:
                job.keep(one.row, one.picture)
            advance()


def _end(job: "Job") -> None:
    """Print where the manifest is; exit with 1 if a row failed."""
    from fastdiff.bulk.job import MANIFEST

    print(job.folder / MANIFEST)
    failed = [line for line in job.lines.values() if "error" in line]
    if failed:
        first = min(failed, key=lambda line: int(line["row"]))
        print(
            f"{len(failed)} of {plural(len(job.rows), 'row')} failed, the first of them row"
            f" {first['row']}: {first['error']}; run the command again to retry them",
            file=sys.stderr,
        )
        raise typer.Exit(1)
