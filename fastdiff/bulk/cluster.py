"""Draws rows with Ray Data: actors that each hold a compiled pipeline, on a machine or a cluster.

Pictures come back to the process that asked, which alone writes: no shared folder is needed.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastdiff import installed
from fastdiff.bulk.painter import ON_A_GPU, Drawn, Painter, Setup, attempts
from fastdiff.bulk.prompts import Row
from fastdiff.errors import UserError, first_line
from fastdiff.workers import LOCAL, join, workers_of

BLOCKS = 10_000
"""The most pieces that the rows are cut into. A piece's pictures come back when it ends; after a
kill before that they are drawn again."""


@dataclass(frozen=True)
class Cluster:
    """Where to draw, and with how many actors."""

    address: str = LOCAL
    """"local", "auto" for the cluster of this machine, or "ray://HOST:PORT"."""
    capacity: int | None = None
    """Rows that an actor draws at the same time; None: the default of its device."""
    workers: int | None = None
    """Actors; None: as many as the GPUs hold, or without GPUs one for each CPU."""
    gpus: float | None = None
    """GPUs per actor, 0.5 for half of one; None: 1 if there are any."""


class _Actor:
    """A compiled pipeline; Ray calls it with as many rows as it draws at the same time."""

    def __init__(self, setup: Setup, capacity: int | None) -> None:
        self._painter, self._capacity = Painter(setup), capacity
        self._painter.compile()
        self._painter.pipe.set_progress_bar_config(disable=True)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = [Row(**json.loads(row)) for row in batch["row"]]
        drawn = list(attempts(self._painter, rows, None, self._capacity))
        return {
            "number": [one.row.number for one in drawn],
            "picture": [one.picture or b"" for one in drawn],
            "error": [one.error or "" for one in drawn],
        }


@contextmanager
def joined(cluster: Cluster, setup: Setup) -> Iterator["Joined"]:
    """Start or join the cluster, and leave it after the block.

    Raises UserError if ray is missing, as `join` does, or if the cluster has too few GPUs.
    """
    # Ray reads these when it is imported
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(f"--ray needs ray ({first_line(error)}); {installed.pip('ray')}") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    join(ray, cluster.address)
    try:
        yield Joined(ray, cluster, setup)
    finally:
        ray.shutdown()


class Joined:
    """A cluster in use."""

    def __init__(self, ray: Any, cluster: Cluster, setup: Setup) -> None:
        self._ray, self._capacity = ray, cluster.capacity
        has, told = ray.cluster_resources(), (cluster.workers, cluster.gpus)
        self._workers = workers_of(has, cluster.address, setup.device, *told)
        self.setup = replace(setup, device=self._workers.device)

    def completed(self, rows: Sequence[Row], path: Path) -> list[Row]:
        """`Painter.completed`, in the cluster: this process may have no room for the pipeline."""

        def check(setup: Setup) -> tuple[list[Row], str | None]:
            try:
                return Painter(replace(setup, device="cpu")).completed(rows, path), None
            except UserError as error:
                return [], str(error)

        with self._told():
            made, error = self._ray.get(self._ray.remote(num_cpus=1)(check).remote(self.setup))
        if error is not None:
            raise UserError(error)
        done: list[Row] = made
        return done

    def attempts(self, rows: Sequence[Row]) -> Iterator[Drawn]:
        """Draw the rows, in any order."""
        if not rows:
            return
        by_number = {row.number: row for row in rows}
        data = self._ray.data
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        given = data.from_items(
            [{"row": json.dumps(asdict(row))} for row in rows],
            override_num_blocks=min(len(rows), BLOCKS),
        )
        made = given.map_batches(
            _Actor,
            fn_constructor_args=(self.setup, self._capacity),
            batch_size=self._capacity or (ON_A_GPU if self._workers.gpus else 1),
            compute=data.ActorPoolStrategy(size=self._workers.count),
            **self._workers.needs,
        )
        with self._told():
            for one in made.iter_rows():
                row = by_number[one["number"]]
                yield Drawn(row, one["picture"] or None, one["error"] or None)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn an error with which Ray gives up into a UserError: a worker that cannot open the
        pipeline, or a cluster that is gone."""
        try:
            yield
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            raise UserError(
                f"Ray gave up: {first_line(cause)}; run the command again to draw what is missing"
            ) from error
