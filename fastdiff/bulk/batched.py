"""Draws rows several at a time, in a batch that is kept full."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import Any

from fastdiff.batching import Batch, Request, Ticket
from fastdiff.bench.room import limited, wants_memory
from fastdiff.bulk.painter import Drawn, Painter, tried
from fastdiff.bulk.prompts import Row

Done = SimpleQueue[tuple[Row, Ticket]]


def attempts(
    painter: Painter,
    rows: Iterable[Row],
    capacity: int,
    workers: int = 1,
    if_joined: bool = False,
) -> Iterator[Drawn]:
    """Draw the rows, each as soon as there is a place for it, and yield them as they are done.
    If memory runs out for rows beside others, they are drawn alone at the end.

    Args:
        capacity, workers: as of `Batch`.
        if_joined: continue with one row at a time if a picture could not share its steps.

    Raises UserError if `Batch` cannot draw with the pipeline.
    """
    waiting, drawing = iter(rows), 0
    alone: list[Row] = []
    done: Done = SimpleQueue()
    with limited(painter.device), Batch(painter.pipe, capacity, workers) as batch:
        while True:
            # one more than there are places, so that none is empty while a picture is written
            for row in islice(waiting, capacity * workers + 1 - drawing):
                batch.submit(_request(row)).add_done_callback(partial(_tell, done, row))
                drawing += 1
            if not drawing:
                break
            row, ticket = done.get()
            drawing -= 1
            if if_joined and ticket.alone is not None:
                alone.extend(waiting)
            if _short_of_memory(ticket):
                alone.append(row)
            else:
                yield tried(row, partial(_shown, painter, row, ticket))
    yield from map(painter.attempt, alone)


def _tell(done: Done, row: Row, ticket: Ticket) -> None:
    done.put((row, ticket))


def _request(row: Row) -> Request:
    assert row.steps is not None
    return Request(
        row.prompt,
        negative_prompt=row.negative,
        num_inference_steps=row.steps,
        guidance_scale=row.guidance,
        seed=row.seed,
        height=row.height,
        width=row.width,
        output_type="np",
    )


def _short_of_memory(ticket: Ticket) -> bool:
    try:
        ticket.result()
    except Exception as error:
        return wants_memory(error)
    return False


def _shown(painter: Painter, row: Row, ticket: Ticket) -> Any:
    return painter.shown(row, ticket.result())
