"""Runs servers on this machine, each in a thread, around the engine that a test gives."""

import asyncio
import base64
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import openai
from PIL import Image

from fastdiff.serve.app import make
from fastdiff.serve.drawing import Accepted, Picture, Step
from fastdiff.serve.limits import Limits
from fastdiff.serve.run import Server, configured, listening

PNG = b"a picture"


def shown(encoded: str) -> np.ndarray:
    """The pixels [H, W, 3] of a picture in a response."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))), dtype=int)


def close(encoded: str, want: Any) -> bool:
    """Whether a picture is `want` up to rounding: other requests in its batch may change last
    bits."""
    return np.abs(shown(encoded) - np.asarray(want, dtype=int)).max() <= 1


class Held:
    """An engine that draws the first of two steps, and the second one once `go` is set."""

    places = 1

    def __init__(self):
        self.go = threading.Event()
        self.begun: list[str] = []
        self.ended: list[str] = []

    async def draw(self, drawing):
        yield Accepted()
        self.begun.append(drawing.prompt)
        try:
            yield Step(1, 2, None)
            while not self.go.is_set():
                await asyncio.sleep(0.005)
            yield Step(2, 2, None)
            yield Picture(PNG)
        finally:
            self.ended.append(drawing.prompt)

    def close(self):
        pass


@contextmanager
def served(engine, key: str | None = None, **limits) -> Iterator[int]:
    """Run a server with this engine; yields its port."""
    limits = Limits(**{"patience": 60} | limits)
    app, bound = make(engine, "demo", limits, key), listening("127.0.0.1", 0)
    bound.listen()  # as the command does: a client may connect before the thread runs
    server = Server(configured(app, limits.patience), app.state.jobs)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield bound.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def client_of(port: int, key: str = "none") -> openai.OpenAI:
    """OpenAI's client, without retries."""
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)
