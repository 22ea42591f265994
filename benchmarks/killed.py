"""Kills `fastdiff generate --prompts` at random moments, and checks what is there at the end.

    python -m benchmarks.killed --rows 2000 --kills 20
    python -m benchmarks.killed --rows 200 --kills 6 --ray

Every kill is a SIGKILL, after a random number of further pictures and a random part of a picture's
time. With --ray every second one hits a process that draws, which Ray starts again, the others the
process that asked. At the end: a picture for each row, all different, none drawn over, none
half-written; a manifest with a line for each, in order, whose hashes hold; nothing else in the
folder.
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


def prompts(path: Path, rows: int) -> None:
    """A file of so many rows, some with more than a prompt; prompts come again."""
    with path.open("w") as file:
        for n in range(rows):
            row = {"prompt": f"{COLOURS[n % 10]} {THINGS[n // 10 % 10]}", "id": n}
            row |= {"guidance": 2 + n % 5} if n % 3 == 0 else {}
            file.write(json.dumps(row) + "\n")


def pictures(folder: Path) -> dict[str, int]:
    """When each picture that is there was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.png")}


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


def run(
    command: list[str], folder: Path, until: int | None, rng: random.Random, inner: bool
) -> int:
    """Run the command; kill it once it has drawn `until` pictures more. `inner`: kill a process
    that draws, and let the command end. Returns its exit code."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    before = len(pictures(folder))
    if until is not None:
        while process.poll() is None and len(pictures(folder)) < before + until:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        if not inner:
            process.kill()
        elif found := drawing(process.pid):
            os.kill(rng.choice(found), signal.SIGKILL)
            print("  killed a process that draws", flush=True)
            return run_on(process)
    return run_on(process)


def run_on(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end; its exit code."""
    error = process.communicate()[1].decode()
    if process.returncode not in (0, -signal.SIGKILL):
        print(error, flush=True)
    return process.returncode


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
    given = parser.parse_args()
    rng, begun = random.Random(given.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        file, folder = Path(temporary, "prompts.jsonl"), Path(temporary, "out")
        prompts(file, given.rows)
        command = [sys.executable, "-m", "fastdiff", "generate", "--prompts", str(file)]
        command += ["--out", str(folder), "--steps", str(given.steps), "--device", "cpu"]
        command += ["--ray", "local", "--workers", "2"] if given.ray else []
        seen: dict[str, int] = {}
        for kill in range(given.kills):
            more = rng.randrange(2 * given.rows // (given.kills + 1))
            left = given.rows - len(pictures(folder))
            inner = given.ray and kill % 2 == 1
            code = run(command, folder, min(more, left - 1), rng, inner)
            now = pictures(folder)
            assert all(now.get(name) == when for name, when in seen.items()), "drawn twice"
            seen = now
            print(f"kill {kill + 1}: {len(seen)} of {given.rows} drawn, exit {code}", flush=True)
            if len(seen) == given.rows:
                break
        code = run(command, folder, None, rng, False)
        now = pictures(folder)
        assert all(now.get(name) == when for name, when in seen.items()), "drawn twice"
        assert code == 0, code
        check(folder, given.rows)
    seconds = time.monotonic() - begun
    print(f"{given.rows} different pictures, the manifest exact, {kill + 1} kills, {seconds:.0f} s")


if __name__ == "__main__":
    main()
