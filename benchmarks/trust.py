"""Measures how reliable verdicts are: false alarms without a change, misses with one.

It repeats the paired bench of `.ci/run`: this state against its own commit, with the machine quiet
and with another process using a core; then against copies with a planted change
(`tests/regression/planted.py`). Every run's ratios and verdicts go to the file, and a short table
to the terminal. If the file exists, runs are added to it.

    python benchmarks/trust.py --out FILE [--only same,slow,counters]
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fastdiff.bench.machine import machine, versions
from fastdiff.regression import states
from fastdiff.regression.compare import compare
from fastdiff.regression.documents import pair_of
from fastdiff.regression.paired import document
from fastdiff.regression.pairs import Settings, Until, race
from fastdiff.written import write_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/regression"))

CI = Settings("pipelines", "cpu", "float32", threads=1, backends=("fastdiff",))
"""The settings of .ci/run."""
KERNEL = Settings("kernels", "cpu", "float32", threads=1, filter="conv2d · demo")
PAIRS = 5
PLANTS = {"loop": CI, "conv": KERNEL}
SHARES = {
    0.30: Until(pairs=6),
    0.10: Until(half_width=0.01, limit_s=40),
    0.05: Until(half_width=0.008, limit_s=75),
    0.03: Until(pairs=6),
}
"""The planted shares, and how long a run may take to find each."""
COUNTED = {
    "launch": "step · launches",
    "copy": "step · bytes",
    "record": "recordings · same size again",
}


@contextlib.contextmanager
def load(burning: bool) -> Iterator[None]:
    """With or without another process that keeps a core busy."""
    if not burning:
        yield
        return
    burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        burner.kill()
        burner.wait()


def run(kind: str, base: states.Place, new: states.Place, settings: Settings, **options) -> dict:
    """The verdicts of one paired bench. gates: only times; counters have their own runs."""
    start = time.perf_counter()
    done = race(base, new, settings, options["until"], lambda *line: None, options["gates"])
    paired = document(done, {"base": base, "new": new}, kind, settings.threads, "")
    found = compare(pair_of(paired), "")
    lines = [
        {key: getattr(line, key) for key in ("name", "verdict", "ratio", "lo", "hi")}
        for line in found.lines
    ]
    seconds = round(time.perf_counter() - start, 1)
    facts = {"kind": kind, "commit": new.commit or base.commit}
    return facts | {"seconds": seconds, "pairs": done.pairs, "lines": lines}


def same(base: states.Place, new: states.Place, runs: int) -> Iterator[dict]:
    """In every second run another process keeps a core busy."""
    until = Until(pairs=PAIRS)
    for index in range(runs):
        kind = "same, one core burning" if index % 2 else "same"
        with load(bool(index % 2)):
            yield run(kind, base, new, CI, until=until, gates=("times",))


def slow(
    base: states.Place, planted: states.Place, each: int, shares: list[float]
) -> Iterator[dict]:
    """Planted shares of a kernel's time and of a step's, in half of the runs each."""
    for share, until in ((share, SHARES[share]) for share in shares):
        for _ in range(each // 2):
            for place, settings in PLANTS.items():
                os.environ["FASTDIFF_PLANTED"] = f"{place}={share}"
                yield run(
                    f"{place} +{share:.0%}", base, planted, settings, until=until, gates=("times",)
                )


def counters(base: states.Place, planted: states.Place, each: int) -> Iterator[dict]:
    for what in COUNTED:
        os.environ["FASTDIFF_PLANTED"] = what
        for _ in range(each):
            yield run(what, base, planted, CI, until=Until(pairs=1), gates=("counters",))


def called(result: dict) -> str:
    """A run's verdict on the planted step or counter; if nothing is planted, on any row."""
    planted = (COUNTED | {"loop": "· step"}).get(result["kind"].split()[0], "")
    verdicts = {line["verdict"] for line in result["lines"] if planted in line["name"]}
    return next((v for v in ("slower", "faster", "inconclusive") if v in verdicts), "same")


def table(results: list[dict]) -> None:
    kinds: dict[str, list[dict]] = {}
    for result in results:
        kinds.setdefault(result["kind"], []).append(result)
    for kind, runs in kinds.items():
        counts = Counter(map(called, runs))
        longest = max(result["seconds"] for result in runs)
        said = ", ".join(f"{verdict} {count}" for verdict, count in counts.most_common())
        print(f"{kind:24} {len(runs):4} runs, at most {longest:.0f} s: {said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--only", default="same,slow,counters", help="comma-separated parts")
    parser.add_argument("--runs", type=int, default=100, help="of the same against itself")
    parser.add_argument("--each", type=int, default=20, help="of each planted change")
    parser.add_argument("--shares", default="30,10,5,3", help="planted slow-downs in percent")
    options = parser.parse_args()
    shares = [int(share) / 100 for share in options.shares.split(",")]
    new = states.here(ROOT)
    if new.commit is None or new.commit.endswith("-dirty"):
        parser.error("commit first: the base of every run is this commit")
    base = states.other("HEAD", ROOT, print)
    with tempfile.TemporaryDirectory() as folder:
        from planted import plant

        planted = states.other(str(plant(Path(folder))), ROOT, print)
        parts = {
            "same": lambda: same(base, new, options.runs),
            "slow": lambda: slow(new, planted, options.each, shares),
            "counters": lambda: counters(new, planted, options.each),
        }
        results = json.loads(options.out.read_text())["runs"] if options.out.exists() else []
        for part in options.only.split(","):
            for result in parts[part]():
                results.append(result)
                facts = {"machine": machine(), "versions": versions()}
                text = json.dumps(facts | {"runs": results}, indent=1) + "\n"
                write_file(options.out, lambda path, text=text: path.write_text(text))
                print(f"{result['seconds']:5.0f} s  {result['kind']}: {called(result)}", flush=True)
    table(results)


if __name__ == "__main__":
    main()
