"""`make gpu` without one: goals read off rows, a budget that leaves out, the kernels' part dry."""

import json
import sys

import pytest

from benchmarks import gpu
from benchmarks.clock import Budget
from benchmarks.goals import GOALS, table


def row(kernel, sizes, **times):
    moved, flops = 2_000_000, 4 * 10**9
    samples = {name.replace("_", " "): [ms, ms, 9.0] for name, ms in times.items()}
    return {"kernel": kernel, "case": "case", "sizes": sizes, "bytes": moved, "flops": flops} | {
        "samples_ms": samples | {"sdpa flash": "RuntimeError: no kernel"}
    }


HEADS = {"B": 2, "H": 8, "K": 64, "Lq": 4096, "Lk": 4096}
PIXELS = {"B": 2, "Y": 64, "X": 64, "C": 320}
ROWS = [
    (row("group_norm_silu", PIXELS, ours=2.0, copy=1.5), "5 to 10 MB", "1.33 x a copy"),
    (row("group_norm_silu", PIXELS | {"C": 2560}, ours=2.0, copy=1.5), "20 MB", "75% of a copy"),
    (row("attention", HEADS, ours=0.01), "64 wide, 4k", "400 TFLOP/s"),
    (row("attention", HEADS | {"K": 40}, ours=0.02), "40 wide", "200 TFLOP/s"),
    (
        row("attention", HEADS | {"Lk": 77}, ours=2.0, copy=1.0, sdpa_cudnn=3.0),
        "cross-attention",
        "50% of a copy, 1.50 x the speed of sdpa cudnn",
    ),
    (row("attention", HEADS | {"Lk": 77}, ours=2.0, copy=1.0), "cross-attention", "did not run"),
    (row("guided_step", {}, ours=0.0025), "scheduler", "2.50 us"),
]


@pytest.mark.parametrize(("measured", "title", "figure"), ROWS)
def test_a_goal_reads_its_figure_off_a_row(measured, title, figure):
    (line,) = [line for line in table([measured]) if "not measured" not in line]
    assert title in line
    assert figure in line


def test_goals_that_were_not_reached_are_lines_too():
    lines = table([])
    assert len(lines) == len(GOALS)
    assert all("not measured" in line for line in lines)


def test_geglu_is_held_to_both():
    measured = row("geglu", {}, ours=2.0)
    measured["samples_ms"] |= {"cublas + gelu_gate": [3.0], "cublas alone": [1.8]}
    (line,) = [line for line in table([measured]) if line.startswith("GEGLU")]
    assert "1.50 x the speed of cublas + gelu_gate, 90% of the rate of cublas alone" in line


def test_a_budget_remembers_what_it_left_out(capsys):
    budget = Budget(minutes=1)
    assert budget.allows("quick", 30)
    assert not budget.allows("sdxl", 120)
    budget.say()
    assert capsys.readouterr().out == "1 minutes are over; left out: sdxl\n"


def test_kernels_dry(monkeypatch, tmp_path, capsys):
    """Every Triton kernel has its row with all rivals that a CPU has."""
    arguments = ["gpu", "--dry-run", "--only", "verify,kernels", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu.main() == 0
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} == {k.spec.name for k in gpu.triton_kernels()}
    for row in rows:
        times = row["samples_ms"]
        assert all(isinstance(times[name], list) for name in ("ours", "eager", "copy")), row
    assert "GEGLU" in capsys.readouterr().out


def test_no_minutes_no_parts(monkeypatch, tmp_path, capsys):
    arguments = ["gpu", "--dry-run", "--minutes", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu.main() == 0
    assert f"left out: {', '.join(gpu.PARTS)}" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
