"""A pipeline that draws rows."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff.bench.pipelines import (
    check_device,
    check_dtype,
    check_prompt,
    check_size,
    check_steps,
)
from fastdiff.bench.room import room
from fastdiff.bench.source import Source, opened, placed
from fastdiff.bulk.prompts import Row, bad
from fastdiff.compiler import compile
from fastdiff.compiler.loop_state import loop_of
from fastdiff.errors import UserError, first_line
from fastdiff.recipes import denoiser, guides_with, negates
from fastdiff.runtime.ranks import Lost, Ranks

ON_A_GPU = 4
"""Rows that are drawn at the same time there."""


@dataclass(frozen=True)
class Setup:
    """The settings that open a pipeline, on this machine or another."""

    source: Source
    dtype: str | None = None
    device: str | None = None
    eager: bool = False
    """Whether diffusers draws without fastdiff."""


@dataclass(frozen=True)
class Drawn:
    """A row's picture, or the error that prevented it."""

    row: Row
    picture: bytes | None
    """PNG."""
    error: str | None


class Painter:
    """The pipeline of a setup. UserError if it cannot be opened, or draws from more than a text."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.device = setup, check_device(setup.device)
        dtype = check_dtype(setup.dtype, self.device)
        self.pipe: Any = opened(setup.source, dtype, self.device).to(self.device)
        check_prompt(self.pipe)
        self._known = inspect.signature(self.pipe.__call__).parameters
        self._guides = guides_with(self._known)

    @property
    def capacity(self) -> int:
        """How many rows to draw at the same time by default: several together are faster on a GPU,
        but not on a CPU."""
        batched = loop_of(self.pipe) is not None and find_spec("greenlet") is not None
        return ON_A_GPU if batched and self.device.startswith("cuda") else 1

    def complete(self, row: Row) -> Row:
        """The row with the pipeline's own size and guidance for those that it leaves out; UserError
        for values that the pipeline does not take."""
        pipe = self.pipe
        assert row.steps is not None
        check_steps(pipe, row.steps)
        height, width = check_size(pipe, row.height, row.width)
        if row.negative is not None and not negates(self._known):
            raise UserError(f"--negative-prompt: a {type(pipe).__name__} takes none; leave it out")
        guidance = row.guidance
        if guidance is not None and self._guides is None:
            raise UserError(f"--guidance-scale: a {type(pipe).__name__} takes none; leave it out")
        if guidance is None and self._guides is not None:
            is_demo = placed(self.setup.source.pipeline) is None
            guidance = 4.0 if is_demo else self._known[self._guides].default
        return replace(row, height=height, width=width, guidance=guidance)

    def completed(self, rows: Iterable[Row], path: Path) -> list[Row]:
        """`complete` for the rows of a file."""
        made = []
        for row in rows:
            try:
                made.append(self.complete(row))
            except UserError as error:
                raise bad(path, row.line, str(error).removeprefix("--")) from error
        return made

    def compile(self, parallel: str | None = None) -> None:
        """Make it fast, unless it is to be eager. parallel: see `Options`."""
        if not self.setup.eager:
            compile(self.pipe, parallel=parallel)

    def draw(self, row: Row) -> Any:
        """The picture of a complete row, as Pillow holds it."""
        assert row.height is not None
        assert row.width is not None
        wanted = {
            "negative_prompt": row.negative,
            "num_inference_steps": row.steps,
            **({} if self._guides is None else {self._guides: row.guidance}),
            "height": row.height,
            "width": row.width,
            "output_type": "np",
        }
        with room(self.pipe, row.height, row.width, self.device):
            drawn = self.pipe(
                prompt=row.prompt,
                generator=torch.Generator("cpu").manual_seed(row.seed),
                **{name: value for name, value in wanted.items() if value is not None},
            ).images[0]
            return self.shown(row, drawn)

    def shown(self, row: Row, drawn: Any) -> Any:
        """A row's picture, float32 [H, W, 3], as Pillow holds it."""
        if not np.isfinite(drawn).all():
            raise UserError(
                "the picture holds numbers that are not finite, in"
                f" {denoiser(self.pipe).dtype} with guidance {row.guidance}; give a smaller"
                " --guidance-scale, or --dtype fp32"
            )
        return self.pipe.numpy_to_pil(drawn)[0]

    def attempt(self, row: Row) -> Drawn:
        """Draw a row; an error is returned, and ends nothing else."""
        return tried(row, lambda: self.draw(row))


def tried(row: Row, draw: Callable[[], Any]) -> Drawn:
    """The picture of a row that `draw` returns, or the error that it raised."""
    try:
        file = BytesIO()
        draw().save(file, "PNG")
    except Lost:  # no row can be drawn any more
        raise
    except Exception as error:
        return Drawn(row, None, f"{type(error).__name__}: {first_line(error)}")
    return Drawn(row, file.getvalue(), None)


def attempts(
    painter: Painter,
    rows: Sequence[Row],
    ranks: Ranks | None = None,
    capacity: int | None = None,
    workers: int = 1,
) -> Iterator[Drawn]:
    """Draw the rows, in any order.

    Args:
        ranks: the processes that divide the rows; each of them yields all rows.
        capacity: how many each of the `workers` draws at the same time; see `Batch`. None: the
            device's default.

    Raises UserError if several cannot be drawn at the same time.
    """
    if ranks is not None:
        for at in range(0, len(rows), ranks.count):
            mine = rows[at : at + ranks.count][ranks.rank : ranks.rank + 1]  # empty past the end
            every = ranks.told([painter.attempt(row) for row in mine])
            yield from (drawn for one in every for drawn in one)
        return
    asked, capacity = capacity, capacity or painter.capacity
    if capacity * workers == 1:
        yield from map(painter.attempt, rows)
        return
    try:
        from fastdiff.bulk import batched
    except ImportError as missing:  # it says what to install
        raise UserError(str(missing)) from missing
    if_joined = asked is None and capacity > 1
    yield from batched.attempts(painter, rows, capacity, workers, if_joined)
