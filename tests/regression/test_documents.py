"""What programs read: our own document, and pytest-benchmark's, as its own command reads it."""

import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.stats import Stats
from regression import synthetic

from fastdiff.regression.reports import words
from fastdiff.regression.reports.as_json import to_json
from fastdiff.regression.reports.pytest_benchmark import to_pytest_benchmark

TOOL = Path(sys.executable).with_name("pytest-benchmark")


def test_own_document_holds_everything():
    comparison = synthetic.comparison()
    document = json.loads(to_json(comparison))
    assert document["schema"] == "fastdiff.report/1"
    assert document["exit_code"] == 1
    assert document["verdicts"] == {
        "slower": 3,
        "faster": 2,
        "same": 9,
        "inconclusive": 1,
        "incomparable": 1,
    }
    first = document["lines"][0]
    assert first["name"] == comparison.lines[0].name
    assert first["base_samples"] == [list(process) for process in comparison.lines[0].base_samples]
    assert document["new"]["versions"]["torch"] == "2.13.1+cpu"
    assert document["geomean"] == {"ratio": 1.008, "lo": 0.994, "hi": 1.021}


@pytest.mark.parametrize("write", [to_json, to_pytest_benchmark])
def test_any_text_can_be_written(write):
    document = write(synthetic.hostile())
    document.encode("utf-8")
    json.loads(document)


def test_statistics_are_theirs():
    """In seconds, and every field as pytest-benchmark itself computes it.

    Their quartiles are of another definition, of several: a rank's distance away.
    """
    comparison = synthetic.comparison()
    document = json.loads(to_pytest_benchmark(comparison))
    times = [line for line in comparison.lines if line.kind == "time"]
    assert [bench["name"] for bench in document["benchmarks"]] == [line.name for line in times]
    for bench, line in zip(document["benchmarks"], times, strict=True):
        theirs = Stats()
        for process in line.new_samples:
            for ms in process:
                theirs.update(ms / 1e3)
        ours = bench["stats"]
        assert set(theirs.as_dict()) <= set(ours)
        for field in ("min", "max", "mean", "stddev", "rounds", "median", "ops", "total"):
            assert ours[field] == pytest.approx(getattr(theirs, field), rel=1e-9), field
        for field in ("q1", "q3"):
            assert ours[field] == pytest.approx(getattr(theirs, field), rel=0.01), field
        assert statistics.median(ours["data"]) == ours["median"] == pytest.approx(line.new / 1e3)


@pytest.mark.parametrize("comparison", [synthetic.comparison(), synthetic.hostile()])
def test_pytest_benchmark_reads_it(tmp_path, comparison):
    file, table = tmp_path / "report.json", tmp_path / "table.csv"
    file.write_text(to_pytest_benchmark(comparison), encoding="utf-8")
    done = subprocess.run(
        [TOOL, "compare", file, "--columns=median,rounds", f"--csv={table}"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=tmp_path,
        env={"PYTHONUTF8": "1"},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    with table.open(encoding="utf-8", newline="") as handle:
        medians = {row["name"]: float(row["median"]) for row in csv.DictReader(handle)}
    times = [line for line in comparison.lines if line.kind == "time"]
    assert medians == {
        words.plain(line.name, limit=None): pytest.approx(line.new / 1e3) for line in times
    }
    for name in medians:
        assert name in done.stdout
    if not any("x" * 500 in name for name in medians):  # printed in milliseconds
        assert all(f"{line.new:.4f}" in done.stdout for line in times)
