"""`make gpu` on a machine without a GPU: goals read from rows; an ended run keeps its results."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from command import until

from benchmarks import gpu
from benchmarks.clock import Budget
from benchmarks.goals import GOALS, lines, table
from benchmarks.shapes import triton_kernels as gpu_kernels

ROOT = Path(__file__).parents[2]


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
def test_a_goal_reads_its_figure_from_a_row(measured, title, figure):
    (line,) = [line for line in table([measured]) if "not measured" not in line]
    assert title in line
    assert figure in line


def test_goals_without_a_measurement_are_lines_too():
    lines = table([])
    assert len(lines) == len(GOALS)
    assert all("not measured" in line for line in lines)


def test_a_budget_names_what_it_left_out(capsys):
    budget = Budget(minutes=1)
    assert budget.allows("quick", 30)
    assert not budget.allows("sdxl", 120)
    budget.say()
    assert capsys.readouterr().out == "1 minutes are over; left out: sdxl\n"


def test_goals_of_pipelines_are_read_from_their_files(tmp_path):
    rows = [{"backend": "eager", "steps_per_s": 27.0}, {"backend": "fastdiff", "steps_per_s": None}]
    (tmp_path / "sd15.json").write_text(json.dumps({"rows": rows}))
    first, second, third, *_ = lines(tmp_path)
    assert first.split()[:5] == ["SD1.5", "512", "px", "eager", "27.0"]
    assert "fastdiff" in second
    assert "not measured" in second
    assert third.startswith("SDXL 1024 px")


def make_gpu(out, *options, **settings):
    """A dry run of `benchmarks.gpu`, as `make gpu DRY=1` starts it, in a process of its own."""
    command = [sys.executable, "-P", "-m", "benchmarks.gpu", "--dry-run", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    files = ["--parts", str(out / "parts"), *options]
    return subprocess.Popen([*command, *files], env=environment, cwd=ROOT, **settings)


def packed(out):
    """The files of the archive by name."""
    with tarfile.open(out / gpu.ARCHIVE) as archive:
        return {
            member.name.removeprefix("results/"): archive.extractfile(member).read()
            for member in archive.getmembers()
        }


# Takes half a minute; test_kernels.py and test_tune.py test what these parts do.
@pytest.mark.product
def test_every_kernel_has_its_rows_in_the_archive(tmp_path):
    run = make_gpu(tmp_path, "--only", "ceilings,verify,kernels", stdout=subprocess.PIPE, text=True)
    printed = run.communicate()[0]
    assert run.returncode == 0, printed
    files = packed(tmp_path)
    done = json.loads(files["run.json"])
    assert done["incomplete"] is False
    assert [row.get("rc") for row in done["rows"]] == [0, 0, 0, None]
    names = {kernel.spec.name for kernel in gpu_kernels()}
    for part in ("verify", "kernels"):
        document = json.loads(files[f"{part}.json"])
        assert document["incomplete"] is False
        assert {row["kernel"] for row in document["rows"]} == names
    for row in json.loads(files["kernels.json"])["rows"]:
        times = row["samples_ms"]
        assert all(isinstance(times[name], list) for name in ("ours", "eager", "copy")), row
    assert "joint attention" in printed
    assert files["goals.txt"].decode() in printed


ENDS = {signal.SIGTERM: 143, signal.SIGKILL: -9}


def stands_for(document, then=""):
    """Command of a stand-in part: a process that writes `document`, then runs the code `then`."""
    return lambda name, run: [
        *(sys.executable, "-S", "-c"),
        f"import os, time; before = os.getppid()\n"
        f"open({str(run.folder / name)!r} + '.json', 'w').write({json.dumps(document)!r})\n{then}",
    ]


@pytest.mark.parametrize("number", ENDS)
def test_an_ended_run_packs_what_its_parts_wrote(tmp_path, monkeypatch, number):
    """Two-line parts stand in for the real ones, in a fork of this process."""
    half = {"incomplete": True, "rows": [1]}
    waits = "while os.getppid() == before: time.sleep(0.05)"
    parts = (
        gpu.Part("ceilings", stands_for({}), 0, 60),
        gpu.Part("cases", stands_for(half, waits), 0, 60),
    )
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "PACK_S", 0.05)
    where = ["--out", str(tmp_path), "--parts", str(tmp_path / "parts")]
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--dry-run", *where])
    if not (child := os.fork()):
        code = 99
        try:
            code = gpu.main()
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)
    ended = []
    try:
        until(lambda: (tmp_path / gpu.ARCHIVE).exists() and "cases.json" in packed(tmp_path))
        os.kill(child, number)
        until(lambda: ended.append(os.waitpid(child, os.WNOHANG)) or ended[-1][0])
    finally:
        if not ended or not ended[-1][0]:
            os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(ended[-1][1]) == ENDS[number]
    files = {name: json.loads(text) for name, text in packed(tmp_path).items() if "json" in name}
    assert (files["ceilings.json"], files["cases.json"]) == ({}, half)
    assert files["run.json"]["incomplete"] is True
    assert [row["part"] for row in files["run.json"]["rows"]] == ["ceilings"]


# The same with the real parts, in half a minute.
@pytest.mark.slow
@pytest.mark.parametrize("number", ENDS)
def test_an_ended_run_of_real_parts_leaves_what_it_found(tmp_path, number):
    run = make_gpu(tmp_path, "--only", "ceilings,cases", start_new_session=True)
    cases = tmp_path / "parts" / "cases.json"
    until(lambda: cases.exists() and json.loads(cases.read_text())["rows"])
    os.kill(run.pid, number)
    assert run.wait() == ENDS[number]
    for file in (tmp_path / "parts").glob("*.json"):
        assert json.loads(file.read_text())["incomplete"] is (file.name != "ceilings.json")
    assert json.loads(packed(tmp_path)["ceilings.json"])["incomplete"] is False
    if number == signal.SIGTERM:  # a killed run last packed its archive some seconds earlier
        assert json.loads(packed(tmp_path)["cases.json"])["rows"]


def test_a_part_that_hangs_or_breaks_does_not_stop_the_others(tmp_path):
    run = gpu.Run(tmp_path, tmp_path / "parts", True, Budget(1))
    run.folder.mkdir()
    assert run.do("hangs", [sys.executable, "-c", "while True: pass"], 0.5) is None
    assert run.process.returncode == -signal.SIGKILL
    assert run.do("breaks", [sys.executable, "-c", "raise ValueError('odd')"], 9) == 1
    assert b"ValueError: odd" in (run.folder / "breaks.log").read_bytes()


@pytest.fixture
def gpu_here(monkeypatch):
    """gpu_here(*arguments): the exit code of a dry run of `benchmarks.gpu` in this process."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    def run(*arguments):
        words = ["benchmarks.gpu", "--dry-run", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        return gpu.main()

    return run


def test_an_archive_does_not_pack_itself(tmp_path, gpu_here, capsys):
    kept = tmp_path / "kept"
    kept.write_text("")
    with pytest.raises(SystemExit) as caught:
        gpu_here("--out", tmp_path, "--parts", tmp_path)
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("give the archive another folder")
    assert kept.exists()


def test_a_budget_of_zero_minutes_runs_no_part(tmp_path, gpu_here, capsys):
    assert gpu_here("--out", tmp_path, "--parts", tmp_path / "parts", "--minutes", 0) == 0
    printed = capsys.readouterr().out
    names = [part.name for part in gpu.PARTS if part.needs == "torch"]
    assert all(name in printed.splitlines()[-1] for name in names)
    assert set(packed(tmp_path)) == {"run.json", "goals.txt"}
