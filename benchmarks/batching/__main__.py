"""Requests that share a recorded step beside requests drawn otherwise, on the demo.

    python -m benchmarks.batching check --requests 200 --minutes 60 --json check.json
    python -m benchmarks.batching speed --rounds 7 --json speed.json

`check` draws random requests (5 to 50 steps, guidance, scheduler, arrival) in a batch and holds the
latents of each to float64, within twice the error that the same request has drawn by itself; the
exit is 1 if one is outside, or was left out since the minutes were over. `speed` times, in random
order, one picture after the other, batches that wait for their slowest picture, a batch that is
joined and left between steps, and one such batch for each core, with as many places in all.
"""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.batching.check import check, tell_check
from benchmarks.batching.requests import CAPACITY
from benchmarks.batching.speed import speed, tell_speed
from fastdiff.bench.machine import commit, machine, versions
from fastdiff.jsonable import finite
from fastdiff.written import write_text


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.batching", description=__doc__)
    parser.add_argument("what", choices=("check", "speed"))
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7, help="with speed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="with check: of the batch")
    parser.add_argument("--minutes", type=float, default=math.inf, help="with check: at most")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    command = shlex.join(["python", "-m", "benchmarks.batching", *sys.argv[1:]])
    facts = {"schema": f"fastdiff.batching-{given.what}/1", "command": command}
    facts |= {"threads": torch.get_num_threads()}
    facts |= {"machine": machine(), "versions": versions(), "commit": commit()}
    found: dict[str, Any]
    if given.what == "check":
        count = given.requests or 200
        more = {"workers": given.workers, "minutes": given.minutes}
        compared = check(count, given.seed, max(1, CAPACITY // given.workers), **more)
        found = {"requests": count, "compared": compared}
        failed = tell_check(count, compared)
    else:
        found = speed(given.rounds, given.requests or 24, given.seed)
        tell_speed(found)
        failed = False
    if given.json:
        write_text(given.json, json.dumps(finite(facts | found), indent=1) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
