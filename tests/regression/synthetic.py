"""Made-up comparisons with realistic noise: a level per process, and a skewed spread of times."""

from dataclasses import replace
from typing import Any

import numpy as np

from fastdiff.bench.stats import Ratio
from fastdiff.regression.comparison import Comparison, Line, State
from fastdiff.regression.history import Point
from fastdiff.regression.reports.roofline import Roofline, RoofPoint

MACHINE = {"os": "Linux x86_64", "cpu": "AMD EPYC", "cores": 2, "threads": 2, "gpu": None}
VERSIONS = {"fastdiff": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "triton": None}
BASE = State("main", "1b4daea", "2026-11-20T09:30:00+00:00", MACHINE, VERSIONS)
NEW = State("working tree", "bcef219-dirty", None, MACHINE, VERSIONS | {"torch": "2.13.1+cpu"})
HOSTILE = (
    "a|b `code` *bold* <script>alert(1)</script> & $x_1$ $y$",
    "line\nbreak\r\n| cell | \x1b[31mred\x00 \ud800 \u202egnp",
    "\\| backslash \\",
    "@user #1 www.example.com https://example.com [link](javascript:alert(1)) ![](x)",
    "</svg><img src=x onerror=alert(1)> {{ 7 * 7 }} --> ]]>",
    "x" * 500,
)
ROOFLINE = Roofline(
    "NVIDIA H100",
    790.0,
    3.35,
    (
        RoofPoint("conv2d, 64×64×320", 2e10, 1e8, 0.05),
        RoofPoint("group_norm_silu", 1e8, 8e7, 0.04),
        RoofPoint("attention, 4096 tokens", 5e10, 5e7),
        RoofPoint("linear", 1.2e10, 6e7, 0.02),
    ),
)
CASES = ("demo, float32", "demo, bfloat16", "sdxl scale 0.2, float32")
PARTS = ("fastdiff · step", "fastdiff · image", "networks · step", "eager · step")


def time(name: str, factor: float, seed: int, ms: float = 5.0, processes=4, rounds=15) -> Line:
    """A line whose new state takes `factor` times as long, with a verdict by a simple interval."""
    rng = np.random.default_rng(seed)

    def side(level: float) -> np.ndarray:
        process = level * np.exp(rng.normal(0, 0.006, (processes, 1)))
        return process * (1 + rng.gamma(1.2, 0.008, (processes, rounds)))

    base, new = side(ms), side(ms * factor)
    ratio = float(np.median(new) / np.median(base))
    half = 0.012 if processes > 1 else 0.09
    lo, hi = ratio * (1 - half), ratio * (1 + half)
    verdict: Any = "slower" if lo > 1.03 else "faster" if hi < 0.97 else "same"
    if verdict == "same" and (hi > 1.03 or lo < 0.97):
        verdict = "inconclusive"
    note = "6 more processes would settle it" if verdict == "inconclusive" else ""
    medians = float(np.median(base)), float(np.median(new))
    samples = tuple(map(tuple, base.tolist())), tuple(map(tuple, new.tolist()))
    return Line(name, "time", "ms", *medians, verdict, note, ratio, lo, hi, *samples)


def count(name: str, base: float | None, new: float | None, unit: str = "launches") -> Line:
    if base is None or new is None:
        return Line(name, "count", unit, base, new, "incomparable", "only in one state")
    verdict: Any = "slower" if new > base else "faster" if new < base else "same"
    return Line(name, "count", unit, base, new, verdict, ratio=new / base if base else None)


def comparison(*lines: Line, **changes: Any) -> Comparison:
    """A comparison of the given lines, by default of one of each kind, worst first."""
    if not lines:
        names = [f"{case} · {part}" for case in CASES for part in PARTS]
        factors = (1.31, 1.082, 1.0, 0.997, 1.0, 1.01, 0.82, 1.004, 0.99, 1.0, 1.0, 0.93)
        scale = (5.1, 104.0, 6.7, 17.3, 5.8, 110.0, 8.9, 40.0, 94.5, 444.8, 120.0, 224.0)
        times = [
            time(name, factor, seed, ms)
            for seed, (name, factor, ms) in enumerate(zip(names, factors, scale, strict=True))
        ]
        order = ("slower", "inconclusive", "incomparable", "faster", "same")
        lines = tuple(
            sorted(
                [
                    *times,
                    time("vae decode, float32 · fastdiff", 1.02, 77, 61.0, processes=1),
                    count("demo, float32 · fastdiff · launches", 350, 357),
                    count(
                        "demo, float32 · fastdiff · bytes", 8_600_123_456, 8_600_123_456, "bytes"
                    ),
                    count("demo, float32 · fastdiff · registers", None, 96, "registers"),
                ],
                key=lambda line: order.index(line.verdict),
            )
        )
    facts = Comparison(
        base=BASE,
        new=NEW,
        lines=tuple(lines),
        geomean=Ratio(1.008, 0.994, 1.021),
        floor=0.03,
        confidence=0.95,
        paired=True,
        command="fastdiff report --against main --rounds 15 --processes 4",
        differences=("torch is 2.13.0+cpu in base and 2.13.1+cpu in new",),
    )
    return replace(facts, **changes)


def hostile() -> Comparison:
    """A comparison with hostile text in each place that shows text of a file."""
    lines = [time(f"{name} · {name}", 1.4, seed) for seed, name in enumerate(HOSTILE)]
    lines += [replace(line, verdict="inconclusive", note=line.name) for line in lines]
    lines += [count(name, 3, 3, name) for name in HOSTILE]
    everything = " ".join(HOSTILE[:5])
    state = State(everything, everything, everything, {"cpu": everything}, {everything: everything})
    return comparison(
        *lines,
        base=state,
        new=replace(state, machine={"cpu": {"brand_raw": everything, "count": 2}}),
        command=everything,
        differences=HOSTILE,
    )


def history(commits: int = 14) -> list[Point]:
    """A history of five backends: fastdiff speeds up with one relapse, ort appears later."""
    rng = np.random.default_rng(5)
    levels = {"channels_last": 1.02, "inductor": 1.25, "networks": 2.6, "ort": 2.2, "fastdiff": 2.7}
    points = []
    for i in range(commits):
        for backend, level in levels.items():
            if backend == "ort" and i < 6:
                continue
            ours = 0.07 * i - (0.9 if i == 9 else 0) if backend == "fastdiff" else 0.0
            value = (level + ours) * (1 + rng.normal(0, 0.015))
            name = f"demo, float32, cpu, 64×64, 20 steps · {backend}"
            created = f"2026-{10 + i // 8:02}-{1 + 3 * (i % 8):02}T12:00:00+00:00"
            commit = f"{0x1B4DAEA + 977 * i:07x}"
            points.append(
                Point("synthetic", name, commit, created, value, 0.96 * value, 1.03 * value)
            )
    return points
