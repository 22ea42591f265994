"""Points of a history read from result files: this repository's, and broken ones."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from fastdiff.errors import UserError
from fastdiff.regression.history import read

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def document(commit=None, value=2.0, created=None, **changes):
    row = {
        "case": "demo, float32",
        "backend": "fastdiff",
        "ratio_vs_eager": {"median": value, "lo": value - 0.1, "hi": value + 0.1},
    }
    eager = row | {"backend": "eager"}
    failed = row | {"backend": "inductor", "ratio_vs_eager": None}
    facts = {"schema": "fastdiff.bench/1", "commit": commit, "rows": [row, eager, failed]}
    return facts | ({"created": created} if created else {}) | changes


@pytest.fixture
def write(tmp_path):
    def to(name, facts):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(facts if isinstance(facts, str) else json.dumps(facts))
        return path

    return to


def test_the_results_of_this_repository_are_read():
    points = read(RESULTS)
    assert {point.machine for point in points} >= {"cpu-zen5-2core"}
    assert not [point for point in points if point.name.endswith(" · eager")]
    ours = [p for p in points if p.name == "demo, float32, cpu, 64×64, 20 steps · fastdiff"]
    assert len(ours) >= 2
    assert all(3 < p.lo <= p.value <= p.hi < 4 for p in ours)
    assert [p.created for p in points] == sorted(p.created for p in points)


def test_order_is_by_created_then_commit_then_file(tmp_path, write):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", tmp_path]
    subprocess.run([*git, "init", "-q"], check=True)
    date = os.environ | {"GIT_COMMITTER_DATE": "2026-02-01T12:00:00+02:00"}
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True, env=date)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    commit = head.stdout.strip()[:8]
    write("m/a.json", document("--output=x", 4.0))
    os.utime(tmp_path / "m/a.json", (0, 0))
    write("m/b.json", document(f"{commit}-dirty", 3.0))
    write("m/c.json", document(commit, 2.0, "2026-02-01T09:30:00-03:00"))
    write("n/d.json", document(commit, 5.0, "2025-12-31T00:00:00Z"))
    points = read(tmp_path)
    assert [(p.machine, p.value) for p in points] == [
        ("m", 4.0),
        ("n", 5.0),
        ("m", 3.0),
        ("m", 2.0),
    ]
    assert points[2].created == "2026-02-01T10:00:00+00:00"
    assert not (tmp_path / "x").exists()


def test_files_of_other_schemas_are_skipped(tmp_path, write):
    write("counts/a.json", {"schema": "fastdiff.counts/1", "rows": 3})
    write("counts/b.json", [1, 2])
    assert read(tmp_path) == []


@pytest.mark.parametrize(
    "facts",
    ["{", "", document(rows=[{"case": "a"}]), document(rows=3), document(rows=[7])],
    ids=["cut", "empty", "no backend", "rows", "row"],
)
def test_a_broken_file_is_named(tmp_path, write, facts):
    path = write("m/broken.json", facts)
    with pytest.raises(UserError, match=str(path)):
        read(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        read(tmp_path / "absent")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_an_impossible_ratio_is_one_sentence(tmp_path, write, value):
    path = write("machine/a.json", document(value=value))
    with pytest.raises(UserError, match=f"^{path} says it is fastdiff.bench/1, but .*its ratio is"):
        read(tmp_path)
