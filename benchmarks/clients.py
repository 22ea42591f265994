"""A server of the demo in its own process, and what a client of any server does."""

import http.client
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

DRAW = "/v1/images/generations"
JSON = {"Content-Type": "application/json"}


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def told(self) -> Any:
        return json.loads(self.body)

    @property
    def sentence(self) -> str:
        return self.told["error"]["message"]


def ask(port: int, body: Any = None, *, path: str = DRAW, timeout: float = 300, **more) -> Answer:
    """One request on a new connection. body: bytes, or an object to send as JSON; None: GET."""
    method = more.get("method", "GET" if body is None else "POST")
    sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, sent, JSON | more.get("headers", {}))
        answer = connection.getresponse()
        head = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, answer.read(), head)
    finally:
        connection.close()


def measured(port: int) -> dict[str, float]:
    """/metrics: the values by name and labels."""
    lines = ask(port, path="/metrics").body.decode().splitlines()
    rows = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {name: float(value) for name, _, value in rows}


def answered(metrics: dict[str, float], route: str = DRAW) -> Counter[int]:
    """How many requests of a route were answered with each status."""
    found = re.compile(rf'fastdiff_requests_total{{route="{re.escape(route)}",status="(\d+)"}}')
    hits = ((found.fullmatch(name), value) for name, value in metrics.items())
    return Counter({int(hit[1]): int(value) for hit, value in hits if hit})


def settled(port: int) -> dict[str, float]:
    """The metrics once nothing is drawn and all answers are counted."""
    for _ in range(3000):
        metrics = measured(port)
        if not metrics["fastdiff_drawing"] and not metrics["fastdiff_queue_length"]:
            time.sleep(0.5)
            return measured(port)
        time.sleep(0.1)
    raise AssertionError(f"still drawing after five minutes: {metrics}")


@contextmanager
def server(*options: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server of the demo in its own process, and its port."""
    command = [sys.executable, "-m", "fastdiff", "serve", "--port", "0", *options]
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "stderr.txt")
        with told.open("wb") as file:
            process = subprocess.Popen(command, stderr=file)
        try:
            while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", told.read_text())):
                assert process.poll() is None, told.read_text()
                time.sleep(0.05)
            yield process, int(found[1])
        finally:
            process.kill()
            process.wait()


class Ended(NamedTuple):
    accepted: list[int]
    """Statuses of the requests that were accepted before the signal."""
    later: Answer
    """What a request got after it."""


def ended_amid(port: int, requests: int, steps: int, end: Callable[[], None]) -> Ended:
    """`end()`, which sends SIGTERM, once `requests` are accepted."""
    body = {"prompt": "dog face", "steps": steps}
    before = answered(measured(port))[200]

    def accepted() -> float:
        metrics = measured(port)
        here = metrics["fastdiff_drawing"] + metrics["fastdiff_queue_length"]
        return here + answered(metrics)[200] - before

    with ThreadPoolExecutor(requests) as pool:
        running = [pool.submit(ask, port, body) for _ in range(requests)]
        while accepted() < requests:
            ended = [one.result() for one in running if one.done()]
            assert {one.status for one in ended} <= {200}, ended
            time.sleep(0.02)
        end()
        while ask(port, path="/readyz").status != 503:
            time.sleep(0.02)
        later = ask(port, body)
        return Ended([one.result().status for one in running], later)
