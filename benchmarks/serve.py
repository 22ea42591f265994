"""fastdiff serve under bad requests, under load and under a signal: python -m benchmarks.serve

Starts servers of the demo on this machine, asks them as clients would, and exits with 1 where one
does not hold. `--seconds 60 --clients 20 --json FILE`. tests/serve/ runs it on a smaller scale.
"""

import argparse
import http.client
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import quote

DRAW = "/v1/images/generations"
JSON = {"Content-Type": "application/json"}
SENTENCE = re.compile(r"[^\n]{8,600}")


class Bad(NamedTuple):
    """A request that must get a 4xx in one sentence."""

    body: bytes
    path: str = DRAW
    method: str = "POST"
    headers: dict[str, str] = JSON


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
    """One request on a connection of its own. body: bytes, or what becomes JSON; None: GET."""
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


# Values that are wrong for a field of each type, and fields for which one is right after all.
WRONG = (
    *(-1, 0, 1.5, 10**9, 2**64, 10**400, 1e300, True, "", "2", "../../etc/passwd", "\x00"),
    *("file:///etc/passwd", [], [1], {}, {"path": "/etc/passwd"}),
)
TEXTS = ("prompt", "negative_prompt", "user")
NAMED = ("model", "size", "scheduler", "response_format", "output_format")
NUMBERS = ("n", "seed", "steps", "guidance_scale", "partial_images")
FIELDS = (*TEXTS, *NAMED, *NUMBERS, "stream", "progress")
SIZES = ("64", "64x", "x64", "64x64x64", "-64x64", "70x64", "8x99999", "99999x99999", "1６x64")
PATHS = (
    *("/../../etc/passwd", "/..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static/x.js"),
    *("/v1/images/edits", "/v1/files/etc/passwd", "//etc/passwd", "/page.html", "/.env"),
)
BODIES = (
    *(b"", b"{", b"[]", b"null", b"1", b'"a"', b"\x00", b"\xff\xfe", b'{"prompt": "a"', b"{}"),
    *(b'{"prompt": "a",}', b"{'prompt': 'a'}", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}'),
    *(b"[" * 100_000, b'{"a":' * 20_000, b'{"prompt": "a"} {}', b"prompt=a"),
)


def right(field: str, value: Any) -> bool:
    """Whether a field takes a value, which makes {"prompt": "a", field: value} a good request."""
    if field in TEXTS:
        return isinstance(value, str) and (field != "prompt" or bool(value))
    whole = type(value) is int
    return (
        (field == "seed" and whole and 0 <= value < 2**63)
        or (field == "guidance_scale" and type(value) in (int, float) and abs(value) <= 1000)
        or (field == "partial_images" and whole and value == 0)
        or (field == "stream" and value is True)
    )


def bad_requests() -> Iterator[Bad]:
    """Every kind there is, once."""
    good = {"prompt": "a"}
    for value, field in itertools.product(WRONG, FIELDS):
        if not right(field, value):
            yield Bad(json.dumps(good | {field: value}).encode())
    for size in SIZES:
        yield Bad(json.dumps(good | {"size": size}).encode())
    for number in ("NaN", "Infinity", "-Infinity", "1e999", "0x10", "1_000", "+1", "01"):
        for field in ("guidance_scale", "seed", "n"):
            yield Bad(f'{{"prompt": "a", "{field}": {number}}}'.encode())
    for field in ("quality", "style", "image", "file", "path", "__class__", "self", ""):
        yield Bad(json.dumps(good | {field: "x"}).encode())
    yield Bad(json.dumps(good | {"stream": True, "n": 2}).encode())
    for field, length in itertools.product(TEXTS, (200_000, 1_000_000, 5_000_000)):
        yield Bad(json.dumps(good | {field: "a" * length}).encode())
    yield from map(Bad, BODIES)
    body = json.dumps(good).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        yield Bad(body, headers={"Content-Type": kind})
    for name in ("../../etc/passwd", "a b", "x" * 65, "%2e%2e", "\xe9"):
        yield Bad(body, headers={"X-Request-Id": name})
        yield Bad(b"", f"{DRAW}/{quote(name)}", "DELETE")
    for path, method in itertools.product(PATHS, ("GET", "POST")):
        yield Bad(body, path, method)
    for method in ("GET", "PUT", "PATCH", "BREW"):
        yield Bad(body, method=method)


def refusal_of(port: int, bad: Bad) -> str:
    """The sentence that a bad request gets. AssertionError unless it is one, with a 4xx."""
    answer = ask(port, bad.body, path=bad.path, method=bad.method, headers=bad.headers)
    assert 400 <= answer.status < 500, (bad, answer)
    assert SENTENCE.fullmatch(answer.sentence), (bad, answer)
    return answer.sentence


def late(port: int, sent: bytes) -> Answer:
    """What a client gets that sends `sent`, and then nothing."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(sent)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return Answer(answer.status, answer.read(), {})


LATE = (
    b"",
    b"POST /v1/images/gener",
    b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\n",
    b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    b'Content-Length: 90\r\n\r\n{"prompt"',
)
"""Beginnings of requests."""


# The load


@dataclass
class Load:
    """What clients saw."""

    seconds: float
    answers: Counter[int]
    """By status; 0: no answer."""
    slowest: float
    memory: list[tuple[float, int]]
    """Seconds since the start, bytes of the server."""

    def growth(self, after: float) -> float:
        """By how much memory has grown from `after` seconds on, as a share: the median of the last
        tenth of samples against that of the first."""
        kept = [count for at, count in self.memory if at >= after]
        tenth = max(1, len(kept) // 10)
        return median(kept[-tenth:]) / median(kept[:tenth]) - 1


def memory_of(pid: int) -> int:
    """Resident bytes of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", text)[1])


def load(port: int, clients: int, seconds: float, pid: int) -> Load:
    """Clients that ask one after another, each for other steps, sizes and numbers of pictures; one
    in eight goes before it has an answer."""
    answers: Counter[int] = Counter()
    times, begun, lock = [0.0], time.monotonic(), threading.Lock()

    def client(number: int) -> None:
        asked = number
        while time.monotonic() - begun < seconds:
            asked += clients
            body = {"prompt": f"red heart {asked}", "seed": asked, "steps": 2 + asked % 7}
            body |= {"n": 2} if asked % 5 == 0 else {"size": ("64x64", "72x64")[asked % 2]}
            body |= {"stream": True, "partial_images": 1} if asked % 5 and asked % 3 == 0 else {}
            start = time.monotonic()
            try:
                status = ask(port, body, timeout=0.05 if asked % 8 == 0 else 300).status
            except TimeoutError:
                status = 499
            except OSError:
                status = 0
            with lock:
                answers[status] += 1
                times.append(0.0 if status == 499 else time.monotonic() - start)
            if status == 429:
                time.sleep(0.2)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    memory = []
    while any(thread.is_alive() for thread in threads):
        memory.append((time.monotonic() - begun, memory_of(pid)))
        time.sleep(0.5)
    return Load(time.monotonic() - begun, answers, max(times), memory)


def settled(port: int) -> dict[str, float]:
    """The metrics once nothing is drawn and all answers are counted."""
    for _ in range(3000):
        metrics = measured(port)
        if not metrics["fastdiff_drawing"] and not metrics["fastdiff_queue_length"]:
            time.sleep(0.5)
            return measured(port)
        time.sleep(0.1)
    raise AssertionError(f"still drawing after five minutes: {metrics}")


# Servers of its own


@contextmanager
def server(*options: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server of the demo in a process of its own, and its port."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    document: dict[str, Any] = {}
    with server("--queue", "12") as (process, port):
        bad = list(bad_requests())
        sentences = [refusal_of(port, one) for one in bad]
        with ThreadPoolExecutor(len(LATE)) as pool:
            statuses = [one.status for one in pool.map(partial(late, port), LATE)]
        assert statuses == [408] * len(LATE), statuses
        assert ask(port, {"prompt": "red heart", "steps": 2}).status == 200
        document["bad"] = {"requests": len(bad), "sentences": len(set(sentences))}
        print(f"{len(bad)} bad requests: 4xx each, {len(set(sentences))} sentences; then healthy")
        before = answered(settled(port))
        seen = load(port, given.clients, given.seconds, process.pid)
        counted = answered(settled(port)) - before
        growth = seen.growth(min(60.0, given.seconds / 2))
        document["load"] = {
            "seconds": seen.seconds,
            "answers": dict(seen.answers),
            "counted": dict(counted),
            "slowest_s": seen.slowest,
            "growth": growth,
            "memory": seen.memory,
        }
        print(
            f"{given.clients} clients, {seen.seconds:.0f} s: {dict(seen.answers)} by the clients,"
        )
        print(f"{dict(counted)} by the server; the slowest answer took {seen.slowest:.1f} s")
        print(f"memory: {seen.memory[-1][1] / 2**20:.0f} MiB, {growth:+.1%}")
        assert set(seen.answers) <= {200, 429, 499}
        assert counted.total() == seen.answers.total()
        assert abs(growth) <= 0.02
    with server("--queue", "12") as (process, port):
        ended = ended_amid(port, 8, 100, lambda: process.send_signal(signal.SIGTERM))
        code = process.wait(60)
        document["term"] = {"accepted": ended.accepted, "later": ended.later.status}
        print(f"SIGTERM: accepted {ended.accepted}, later {ended.later.status}, exit {code}")
        assert ended.accepted == [200] * 8
        assert (ended.later.status, code) == (503, 0)
    if given.json:
        given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
