"""Goals on a GPU, and the results of a `benchmarks.gpu` run for each.

A kernel's goal is a title, the sizes it applies to, an aim, and a figure computed from a race's
row; a pipeline's goal is in steps per second. A size that was not measured has a line that says so.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.race import medians

Row = Mapping[str, Any]
SMALL, LARGE = (5e6, 10e6), 20e6
"""Bytes of an activation tensor."""


def copy_share(row: Row) -> str:
    """The bandwidth as a share of that of an equally large copy."""
    times = medians(row)
    return f"{times['copy'] / times['ours']:.0%} of a copy"


def copies(row: Row) -> str:
    times = medians(row)
    return f"{times['ours'] / times['copy']:.2f} x a copy"


def rate(row: Row) -> str:
    """Useful FLOP/s, without padding."""
    return f"{row['flops'] / medians(row)['ours'] / 1e9:.0f} TFLOP/s"


def against_attention(row: Row) -> str:
    times = medians(row)
    best = min((name for name in times if name.startswith("sdpa")), key=times.__getitem__)
    return f"{copy_share(row)}, {times[best] / times['ours']:.2f} x the speed of {best}"


def microseconds(row: Row) -> str:
    return f"{1e3 * medians(row)['ours']:.2f} us"


def milliseconds(row: Row) -> str:
    return ", ".join(f"{name} {ms:.2f} ms" for name, ms in medians(row).items())


@dataclass(frozen=True)
class Goal:
    title: str
    aim: str
    kernel: str
    about: Callable[[Row], bool]
    figure: Callable[[Row], str]


def _heads(width: int, least: int, most: int = 1 << 20) -> Callable[[Row], bool]:
    """Self-attention with heads of this width over this many tokens."""

    def about(row: Row) -> bool:
        sizes = row["sizes"]
        return sizes["K"] == width and least <= sizes["Lq"] < most and sizes["Lq"] == sizes["Lk"]

    return about


def _activations(row: Row) -> int:
    sizes, halves = row["sizes"], 2
    return int(halves * sizes["B"] * sizes["Y"] * sizes["X"] * (sizes["C"] + sizes.get("C2", 0)))


GOALS = (
    Goal("GroupNorm + SiLU from 20 MB", "75% of a copy", "group_norm_silu",
         lambda row: _activations(row) >= LARGE, copy_share),
    Goal("GroupNorm + SiLU, 5 to 10 MB", "1.35 x a copy", "group_norm_silu",
         lambda row: SMALL[0] <= _activations(row) <= SMALL[1], copies),
    Goal("attention, 64 wide, 4k tokens on", "400 TFLOP/s", "attention", _heads(64, 4096), rate),
    Goal("attention, 64 wide, 1k tokens", "300 TFLOP/s", "attention", _heads(64, 1024, 4096), rate),
    Goal("attention, 40 wide", "240 TFLOP/s", "attention", _heads(40, 1024), rate),
    Goal("attention, 80 wide", "350 TFLOP/s", "attention", _heads(80, 1024), rate),
    Goal("attention, 160 wide", "300 TFLOP/s", "attention", _heads(160, 256), rate),
    Goal("joint attention, 64 wide, 4k on", "400 TFLOP/s", "joint_attention",
         lambda row: row["sizes"]["L"] >= 4096, rate),
    Goal("cross-attention", "65% of a copy, 1.3 x the best of torch's", "attention",
         lambda row: row["sizes"]["Lk"] <= 128 < row["sizes"]["Lq"], against_attention),
    Goal("LayerNorm and more, from 40 MB", "90% of a copy", "ada_norm",
         lambda row: row["bytes"] >= 2 * LARGE, copy_share),
    Goal("a scheduler's step, in a graph", "4 us", "guided_step", lambda row: True, microseconds),
    Goal("VAE decode", "25 ms at 1024 px", "vae", lambda row: True, milliseconds),
)  # fmt: skip


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each size of each goal: title, size, figure, aim."""
    lines = []
    for goal in GOALS:
        own = [row for row in rows if row["kernel"] == goal.kernel and goal.about(row)]
        found = [(row["case"], _figure(goal, row)) for row in own] or [("", "not measured")]
        lines += [
            f"{goal.title:33} {case:15} {figure}  (aim: {goal.aim})" for case, figure in found
        ]
    return lines


PIPELINES = {
    "sd15": ("SD1.5 512 px", "220 steps/s on an H100, 250 on an H200"),
    "sdxl": ("SDXL 1024 px", "36 steps/s on an H100, 40 on an H200"),
}
"""By part: title and aim."""


def lines(folder: Path) -> list[str]:
    """The lines of all goals, from the files of a run in `folder`."""
    found = []
    for part, (title, aim) in PIPELINES.items():
        for row in _rows(folder / f"{part}.json") or [{}]:
            speed, backend = row.get("steps_per_s"), row.get("backend", "")
            figure = f"{speed:.1f} steps/s" if speed else "not measured"
            found.append(f"{title:33} {backend:15} {figure}  (aim: {aim})")
    kernels = [row for part in ("kernels", "vae") for row in _rows(folder / f"{part}.json")]
    return found + table(kernels)


def _rows(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text())["rows"]) if path.exists() else []


def _figure(goal: Goal, row: Row) -> str:
    try:
        return goal.figure(row)
    except (KeyError, ValueError):  # a rival did not run
        return "a part of it did not run: see the file"
