"""Kills `fastdiff generate --prompts` at random moments, and checks its folder at the end.

    python -m benchmarks.killed --rows 2000 --kills 20
    python -m benchmarks.killed --rows 2000 --kills 20 --workers 2
    python -m benchmarks.killed --rows 200 --kills 6 --ray

Every kill is a SIGKILL, after a random number of further pictures and a random part of a picture's
time. It hits the process that asked, which is started again; with --ray every second one hits a
process that draws, which Ray starts again. At the end: a picture for each row, all different, none
drawn twice, none half-written; a manifest with a line for each, in order, with the right hashes;
nothing else in the folder. Ray gives a node 30 s to start. If a busy machine takes longer, the
command ends with one sentence; it is then started again, and the result counts these restarts.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

COLOURS = ("red", "yellow", "green", "blue", "purple", "black", "white", "orange", "pink", "brown")
THINGS = ("heart", "car", "sunflower", "cat", "house", "fish", "apple", "moon", "tree", "hat")
LATE = "timed out during startup"
"""Of Ray's own error."""


def prompts(path: Path, rows: int) -> None:
    """A file with this many rows, some with more than a prompt; some prompts repeat."""
    with path.open("w") as file:
        for n in range(rows):
            row = {"prompt": f"{COLOURS[n % 10]} {THINGS[n // 10 % 10]}", "id": n}
            row |= {"guidance": 2 + n % 5} if n % 3 == 0 else {}
            file.write(json.dumps(row) + "\n")


def pictures(folder: Path) -> dict[str, int]:
    """When each picture that is there was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.png")}


def kept(folder: Path, seen: dict[str, int]) -> dict[str, int]:
    """The pictures that are there, after a check that none of those seen was drawn again."""
    now = pictures(folder)
    again = [name for name, when in seen.items() if now.get(name) != when]
    assert not again, f"drawn twice: {again}"
    return now


def drawing(parent: int) -> list[int]:
    """The processes below `parent` in which Ray's actors draw."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text().rsplit(")")[1].split()[1]
                )
                names[int(entry.name)] = (entry / "cmdline").read_text()
            except OSError:  # it has ended
                continue
    below = {parent}
    while more := {one for one, of in parents.items() if of in below} - below:
        below |= more
    return [one for one in below if names.get(one, "").startswith("ray::MapWorker")]


def count(folder: Path) -> int:
    """How many pictures are there; cheap, since it is asked all the time."""
    return sum(name[0].isdigit() for name in os.listdir(folder)) if folder.exists() else 0


def started(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as errors:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)


def too_late(process: subprocess.Popen[bytes], log: Path) -> bool:
    """Whether it ended since Ray did not start in time."""
    return (process.returncode or 0) > 0 and LATE in log.read_text()


def strike(process: subprocess.Popen[bytes], folder: Path, until: int, inner: bool) -> str:
    """Kill the process once this many pictures exist; `inner`: instead kill one of its children
    that draws, after which it goes on. Returns what was killed."""
    while process.poll() is None and count(folder) < until:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.1))
    if process.poll() is not None:
        return "nothing: it had ended"
    if inner and (found := drawing(process.pid)):
        os.kill(random.choice(found), signal.SIGKILL)
        return "a process that draws"
    process.kill()
    process.wait()
    return "the process that asked"


def check(folder: Path, rows: int) -> None:
    """The folder holds the job, whole and nothing else."""
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, rows + 1))
    assert [line["id"] for line in lines] == list(range(rows))
    for line in lines:
        file = folder / line["file"]
        assert hashlib.sha256(file.read_bytes()).hexdigest() == line["sha256"], line
        Image.open(file).load()
    assert len({line["sha256"] for line in lines}) == rows, "two rows have the same picture"
    names = {line["file"] for line in lines} | {"manifest.jsonl", "job.json", ".lock"}
    assert {path.name for path in folder.iterdir()} == names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--ray", action="store_true", help="draw by a local Ray of two workers")
    parser.add_argument("--workers", type=int, help="threads that draw, or others for Ray")
    given = parser.parse_args()
    random.seed(given.seed)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        file, folder = Path(temporary, "prompts.jsonl"), Path(temporary, "out")
        log = Path(temporary, "errors")
        prompts(file, given.rows)
        command = [sys.executable, "-m", "fastdiff", "generate", "--prompts", str(file)]
        command += ["--out", str(folder), "--steps", str(given.steps), "--device", "cpu"]
        command += ["--ray", "local"] if given.ray else []
        if workers := given.workers or (2 if given.ray else None):
            command += ["--workers", str(workers)]
        process = started(command, log)
        seen: dict[str, int] = {}
        kills = late = 0
        while kills < given.kills and process.returncode != 0:
            more = random.randrange(2 * given.rows // (given.kills + 1))
            until = min(count(folder) + more, given.rows - 1)
            killed = strike(process, folder, until, inner=given.ray and kills % 2 == 1)
            seen = kept(folder, seen)
            print(f"{len(seen)} of {given.rows} drawn: killed {killed}", flush=True)
            if late < given.kills and too_late(process, log):
                late += 1
            else:
                assert process.returncode in (None, 0, -signal.SIGKILL), log.read_text()
                kills += process.returncode != 0
            if process.returncode:
                process = started(command, log)
        process.wait()
        while late < given.kills and too_late(process, log):
            late += 1
            process = started(command, log)
            process.wait()
        assert process.returncode == 0, log.read_text()
        kept(folder, seen)
        check(folder, given.rows)
    seconds = time.monotonic() - begun
    print(f"{given.rows} different pictures, the manifest exact, {kills} kills, {seconds:.0f} s")
    if late:
        print(f"Ray did not start in time {late} times")


if __name__ == "__main__":
    main()
