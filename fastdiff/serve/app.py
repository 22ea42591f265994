"""The routes."""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from html import escape
from importlib.resources import files
from typing import Any

from fastapi import Depends, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastdiff.serve.answers import GONE, OUTCOME, Stream, as_json
from fastdiff.serve.asked import Asked, drawings, read
from fastdiff.serve.drawing import Engine
from fastdiff.serve.jobs import Jobs
from fastdiff.serve.limits import Limits
from fastdiff.serve.metrics import Metrics
from fastdiff.serve.refused import Refused

DRAW = "/v1/images/generations"
NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
LISTENS = 64
"""How many times as long as allowed a body may be and its client still hear so: most clients hear
nothing before they have sent all."""
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
    " connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
"""The page loads nothing, and is shown in no other page."""


def make(engine: Engine, name: str, limits: Limits, api_key: str | None = None) -> FastAPI:
    """The server's ASGI application; its `state.jobs` are the accepted requests.

    name: of the model, as `/v1/models` lists it.
    api_key: the bearer token that `/v1/` requires; None: no token.
    """
    app = FastAPI(title="fastdiff", docs_url=None, redoc_url=None)
    metrics = Metrics()
    jobs = app.state.jobs = Jobs(engine, limits.queue, metrics)
    page = (files("fastdiff.serve") / "page.html").read_text("utf-8")
    page = page.replace("{{model}}", escape(name))
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "fastdiff"}

    async def authorised(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if api_key is not None and not _same(given, f"Bearer {api_key}"):
            sentence = "the API key is missing or wrong; send Authorization: Bearer KEY"
            raise Refused(401, sentence, "invalid_api_key")

    guarded: Any = [Depends(authorised)]
    schema = Asked.model_json_schema(ref_template="#/components/schemas/{model}")
    described = {"requestBody": {"content": {"application/json": {"schema": schema}}}}

    @app.post(DRAW, dependencies=guarded, openapi_extra=described)
    async def draw(request: Request) -> Response:
        """Draw, as OpenAI's images API does."""
        job_name = _name(request.headers.get("x-request-id"))
        head = {"X-Request-Id": job_name}
        asked = read(await _body(request, limits))
        wanted = drawings(asked, name, limits)
        job = jobs.start(job_name, wanted)
        if not asked.stream:
            return await as_json(job, wanted, request, head)
        events = job.events()
        await anext(events)  # accepted; else refused before the answer begins
        return Stream(job, events, asked, wanted[0], head)

    @app.delete(f"{DRAW}/{{name_of_request}}", dependencies=guarded)
    async def cancel(name_of_request: str) -> dict[str, Any]:
        """Cancel a request by its X-Request-Id."""
        jobs.cancel(name_of_request)
        return {"id": name_of_request, "object": "image.generation", "deleted": True}

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [model]}

    @app.get("/healthz")
    async def healthy() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        """Whether it takes requests."""
        if jobs.draining:
            raise Refused(503, "the server is shutting down", "draining", 1)
        return {"status": "ok"}

    @app.get("/metrics")
    async def measured() -> Response:
        """What Prometheus reads."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def shown() -> HTMLResponse:
        """A page to draw with."""
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        said = {404: "there is no such route", 405: f"this route takes no {request.method}"}
        told = Refused(error.status_code, said.get(error.status_code, str(error.detail)))
        return JSONResponse(told.body(), told.status, error.headers)

    app.add_middleware(Counted, metrics=metrics)
    return app


async def _body(request: Request, limits: Limits) -> bytes:
    """The body of JSON, read no further than it may go and no longer than it may take."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page elsewhere may send other kinds without being asked
        raise Refused(415, "the body's Content-Type is not application/json; send JSON")
    body, came = bytearray(), 0
    try:
        async with asyncio.timeout(limits.patience):
            async for piece in request.stream():
                came += len(piece)
                if came <= limits.body:
                    body += piece
                elif came > LISTENS * limits.body:
                    break
    except TimeoutError:
        sentence = f"the body did not arrive in {limits.patience:g} s; send it at once"
        raise Refused(408, sentence) from None
    except ClientDisconnect:
        raise Refused(GONE, "the client has disconnected") from None
    if came > limits.body:
        raise Refused(413, f"the body is too long; send at most {limits.body} bytes")
    return bytes(body)


def _name(given: str | None) -> str:
    """What a request is called: as its client says, or at random."""
    if given is None:
        return secrets.token_hex(16)
    if not NAME.fullmatch(given):
        raise Refused(400, "X-Request-Id may have up to 64 letters, digits, and . _ -; change it")
    return given


def _same(given: str, right: str) -> bool:
    """Whether both are equal, in a time that does not depend on where they differ."""
    one, other = (hashlib.sha256(text.encode()).digest() for text in (given, right))
    return hmac.compare_digest(one, other)


class Counted:
    """Counts every answer by route and status, and times those of drawing requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 500

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, seen)
        finally:
            status = scope.get(OUTCOME, status)
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(path, status).inc()
            if path == DRAW and status == 200:
                self._metrics.seconds.observe(time.monotonic() - begun)
