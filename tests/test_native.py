"""Without the C++ kernels a CPU is as slow as eager; report, env and bench say so."""

import subprocess
import sys

import pytest
from command import environment, run

import fastdiff
from fastdiff.kernels import dispatch

BLOCKED = """
import sys
sys.modules["fastdiff._C"] = None  # as if no compiler was found
import fastdiff, fastdiff.cli
from fastdiff.kernels.dispatch import NATIVE
assert NATIVE is None
pipe = fastdiff.compile(fastdiff.load_demo())
print(fastdiff.report(pipe))
fastdiff.cli.main(["env"])
"""
HOW = "install a C++ compiler, then fastdiff again"


def test_report_and_env_say_that_they_are_not_built(demo, monkeypatch):
    monkeypatch.setattr(dispatch, "NATIVE", None)
    assert fastdiff.report(demo).note == dispatch.NOT_BUILT
    (line,) = [line for line in run("env")[1].splitlines() if HOW in line]
    assert line.startswith("- fastdiff._C: ")


# 6 s; the test above checks the same in this process.
@pytest.mark.product
def test_report_and_env_of_a_build_without_them_say_so_in_one_line_each():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if HOW in line]
    assert [line.startswith("- fastdiff._C: ") for line in found] == [False, True]
    assert all("as fast as eager, not two to three times as fast" in line for line in found)


def test_bench_says_that_they_are_not_built_above_its_table(monkeypatch):
    monkeypatch.setattr(dispatch, "NATIVE", None)
    arguments = ("--backends", "eager", "--rounds", 2, "--steps", 1, "--device", "cpu")
    code, out, _ = run("bench", *arguments)
    assert code == 0
    assert out.splitlines()[0] == dispatch.NOT_BUILT
    assert HOW in out.splitlines()[0]


def test_nothing_is_said_when_they_are_built(demo):
    if dispatch.NATIVE is None:
        pytest.skip("not built")
    assert fastdiff.report(demo).note is None
    assert dispatch.NOT_BUILT not in str(fastdiff.report(demo))
    assert HOW not in run("env")[1]
