"""fastdiff serve under bad requests, under load and under a signal: python -m benchmarks.serve

Starts servers of the demo on this machine, sends requests as clients would, and exits with 1 if
a claim does not hold. `--seconds 60 --clients 20 --json FILE`. tests/serve/ runs it on a smaller
scale.
"""

import argparse
import json
import re
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bad_requests import LATE, bad_requests, late, refusal_of
from benchmarks.clients import answered, ask, ended_amid, server, settled


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
        """The share by which memory has grown from `after` seconds on: the median of the last tenth
        of samples against that of the first."""
        kept = [count for at, count in self.memory if at >= after]
        tenth = max(1, len(kept) // 10)
        return median(kept[-tenth:]) / median(kept[:tenth]) - 1


def memory_of(pid: int) -> int:
    """Resident bytes of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", text)[1])


def load(port: int, clients: int, seconds: float, pid: int) -> Load:
    """Clients that send one request after another, each with other steps, sizes and numbers of
    pictures; one in eight disconnects before it has an answer."""
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
