"""Listens until a signal arrives; then draws everything that was accepted, and ends."""

import asyncio
import json
import socket
import sys
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastdiff.errors import UserError
from fastdiff.serve.jobs import Jobs
from fastdiff.serve.refused import Refused

LAST_BYTES = 30
"""Seconds for clients to read their answers when the server ends."""


def listening(host: str, port: int) -> socket.socket:
    """A socket bound to an address, not yet listening; port 0 picks a free one. UserError if the
    system refuses it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host {host} --port {port} cannot be listened on: {reason}; give another"
        ) from error
    return bound


def url_of(bound: socket.socket) -> str:
    """The address for a browser."""
    host, port, *_ = bound.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: FastAPI, bound: socket.socket, patience: float) -> None:
    """Serve `app`, which `app.make` made, until SIGTERM or SIGINT; then finish what was accepted
    while new requests get 503. A second signal ends it at once.

    patience: seconds in which the head of a request must arrive.
    """
    Server(configured(app, patience), app.state.jobs).run(sockets=[bound])


def configured(app: FastAPI, patience: float) -> uvicorn.Config:
    """uvicorn's settings."""
    return uvicorn.Config(
        app,
        http=lambda **given: Patient(patience, **given),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=LAST_BYTES,
    )


class Server(uvicorn.Server):
    """uvicorn's server, which at the first signal only begins to end."""

    def __init__(self, config: uvicorn.Config, jobs: Jobs) -> None:
        super().__init__(config)
        self._jobs, self._signals = jobs, 0
        self._drained: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._signals and self._drained is None:
            sys.stderr.write("fastdiff: finishing what was accepted\n")
            self._drained = asyncio.create_task(self._jobs.drain())
        if self._drained is not None and self._drained.done():
            self.should_exit = True
        return await super().on_tick(counter)


class Patient(H11Protocol):
    """HTTP as uvicorn speaks it, with a limit on how long the head of a request may take."""

    def __init__(self, patience: float, **given: Any) -> None:
        super().__init__(**given)
        self._patience = patience
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_longer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._wait_no_longer()
        elif self._timer is None:  # of the second request, a part
            self._wait()

    def _wait(self) -> None:
        self._timer = self.loop.call_later(self._patience, self._end)

    def _wait_no_longer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        if self.transport.is_closing():
            return
        sentence = f"the request's head did not arrive in {self._patience:g} s; send it at once"
        body = json.dumps(Refused(408, sentence).body()).encode()
        head = f"HTTP/1.1 408 Request Timeout\r\nContent-Length: {len(body)}\r\n"
        kind = "Content-Type: application/json\r\nConnection: close\r\n\r\n"
        self.transport.write(f"{head}{kind}".encode() + body)
        self.transport.close()
