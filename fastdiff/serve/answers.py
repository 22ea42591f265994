"""Answers to a drawing request in the form of OpenAI's images API: JSON or server-sent events."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from fastdiff.serve.asked import Asked
from fastdiff.serve.drawing import Drawing, Picture, Step
from fastdiff.serve.jobs import Happened, Job
from fastdiff.serve.refused import Refused

OUTCOME = "fastdiff.outcome"
"""Key of an ASGI scope: the status to count a request by, if 200 was already sent."""
GONE = 499


async def as_json(job: Job, drawings: list[Drawing], request: Request, head: Any) -> Response:
    """All pictures in one body. Refused if one cannot be drawn; the others are then cancelled."""
    watch = asyncio.create_task(_gone(request.receive, job))
    pngs: dict[int, bytes] = {}
    try:
        async for index, event in job.events():
            if isinstance(event, Picture):
                pngs[index] = event.png
    except Refused as refused:
        if watch.done():
            raise Refused(GONE, refused.sentence) from None
        raise
    finally:
        watch.cancel()
        job.cancel()
    data = [
        {"b64_json": _base64(pngs[index]), "seed": drawing.seed}
        for index, drawing in enumerate(drawings)
    ]
    body = {"created": int(time.time()), "data": data, "output_format": "png"}
    return JSONResponse(body, headers=head)


class Stream(Response):
    """The events of one picture, sent as they happen, once its request is accepted."""

    media_type = "text/event-stream"

    def __init__(
        self, job: Job, events: AsyncIterator[Happened], asked: Asked, drawing: Drawing, head: Any
    ) -> None:
        super().__init__(headers=head | {"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._job, self._events, self._asked, self._drawing = job, events, asked, drawing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(_gone(receive, self._job))
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            try:
                async for written in self._written():
                    body = {"type": "http.response.body", "body": written, "more_body": True}
                    await send(body)
            except Refused as refused:
                scope[OUTCOME] = GONE if watch.done() else refused.status
                failed = _event("error", {"type": "error"} | refused.body())
                await send({"type": "http.response.body", "body": failed, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            watch.cancel()
            self._job.cancel()

    async def _written(self) -> AsyncIterator[bytes]:
        shown = 0
        async for _, event in self._events:
            if isinstance(event, Step):
                if event.preview is not None:
                    more = {"partial_image_index": shown}
                    yield self._picture("partial_image", event.preview, more)
                    shown += 1
                if self._asked.progress:
                    told = {"type": "fastdiff.progress", "step": event.done, "steps": event.steps}
                    yield _event("fastdiff.progress", told)
            elif isinstance(event, Picture):
                yield self._picture("completed", event.png, {"seed": self._drawing.seed})

    def _picture(self, kind: str, png: bytes, more: dict[str, Any]) -> bytes:
        kind = f"image_generation.{kind}"
        told = {"type": kind, "b64_json": _base64(png), "created_at": int(time.time())}
        return _event(kind, told | {"output_format": "png"} | more)


async def _gone(receive: Receive, job: Job) -> None:
    """Cancel the job when its client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass
    job.cancel()


def _event(kind: str, told: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(told)}\n\n".encode()


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()
