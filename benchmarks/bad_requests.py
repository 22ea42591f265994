"""Every kind of request that a server must refuse, and clients that are too slow."""

import http.client
import itertools
import json
import re
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

from benchmarks.clients import DRAW, JSON, Answer, ask

SENTENCE = re.compile(r"[^\n]{8,600}")


class Bad(NamedTuple):
    """A request that must get a 4xx in one sentence."""

    body: bytes
    path: str = DRAW
    method: str = "POST"
    headers: dict[str, str] = JSON


# Values that are wrong for a field of each type, and fields for which one of them is right.
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
    """One bad request of every kind."""
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
    """The sentence that a bad request gets. AssertionError unless it is one, with a 4xx status."""
    answer = ask(port, bad.body, path=bad.path, method=bad.method, headers=bad.headers)
    assert 400 <= answer.status < 500, (bad, answer)
    assert SENTENCE.fullmatch(answer.sentence), (bad, answer)
    return answer.sentence


def late(port: int, sent: bytes) -> Answer:
    """The answer to a client that sends `sent`, and then nothing."""
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
