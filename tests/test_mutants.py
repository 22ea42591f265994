"""tools/mutants.py on a small made-up tree, and its table of faults, which must fit this tree."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from _pytest.mark import KeywordMatcher
from _pytest.mark.expression import Expression
from command import until

from fastdiff.errors import UserError
from tools import mutants

MUTANTS = mutants.read()
TABLE = """
[[mutant]]
name = "sum"
file = "sums.py"
old = "a + b"
new = "a - b"
tests = ["test_sums.py"]

[[mutant]]
name = "unseen"
file = "sums.py"
old = "a * b"
new = "a / b"
tests = ["test_sums.py"]
k = "add or times"
"""
SUMS = "def add(a, b):\n    return a + b\n\n\ndef times(a, b):\n    return a * b\n"
TEST = "import sums\n\n\ndef test_add():\n    assert sums.add(2, 1) == 3\n"
TIMES = "\n\ndef test_times():\n    assert sums.times(2, 3) == 6\n"
SLEEPS = """
import os, time
from pathlib import Path

def test_add():
    Path(os.environ["STARTED"]).write_text(str(os.getpid()))
    time.sleep(600)
"""
RUNS = """
import sys
from pathlib import Path
from tools.mutants import main
main([], Path(sys.argv[1]))
"""


def test_each_fault_can_be_planted_and_its_tests_exist():
    for mutant in MUTANTS:
        text = (mutants.ROOT / mutant.file).read_text(encoding="utf-8")
        assert mutant.planted(text) != text, mutant.name
        for test in mutant.tests:
            file, _, function = test.partition("::")
            found = (mutants.ROOT / file).read_text(encoding="utf-8")
            assert not function or f"def {function}(" in found, (mutant.name, test)


def test_each_fault_selects_at_least_one_test(request):
    """For a run of whole files: a `k` that matches no test of its file could find nothing."""
    asked = request.config
    if asked.option.keyword or any("::" in argument for argument in asked.args):
        return
    items, none = request.session.items, []
    for mutant in MUTANTS:
        own = [item for item in items if item.nodeid.startswith(mutant.tests)]
        fits = Expression.compile(mutant.k or "not none").evaluate
        if own and not any(fits(KeywordMatcher.from_item(item)) for item in own):
            none.append(mutant.name)
    assert none == []


def test_there_are_at_least_forty_faults_in_all_parts_of_the_tree():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40
    folders = {str(Path(mutant.file).parent) for mutant in MUTANTS}
    parts = ("models", "runtime", "families", "compiler", "engines", "export", "bench")
    assert {"csrc", *(f"fastdiff/{part}" for part in (*parts, "regression", "cli"))} <= folders


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository with a table of two faults, one of which no test finds."""
    root = tmp_path / "tree"
    (root / "tools").mkdir(parents=True)
    (root / "tools/mutants.toml").write_text(TABLE)
    (root / "sums.py").write_text(SUMS)
    (root / "test_sums.py").write_text(TEST)
    subprocess.run(["git", "init", "--quiet", root], check=True)
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "copies"))
    return root


def test_the_table_says_which_test_found_each_fault(tree, tmp_path, capsys):
    page, rows = tmp_path / "found.md", tmp_path / "found.json"
    assert mutants.main(["--json", str(rows)], tree) == 1
    found = {row["mutant"]: row["test"] for row in json.loads(rows.read_text())["rows"]}
    assert found == {"sum": "test_sums.py::test_add", "unseen": None}
    assert "unseen: SURVIVED" in capsys.readouterr().out
    # run one fault again with a test that finds it; the other fault's row stays
    (tree / "test_sums.py").write_text(
        f"{TEST}\n\ndef test_times():\n    assert sums.times(2, 3) == 6\n"
    )
    again = ["--only", "unseen", "--json", str(rows), "--out", str(page)]
    assert mutants.main(again, tree) == 0
    text = page.read_text()
    assert "Of 2 faults 2 are found, 0 survive, 0 were not planted." in text
    assert "| unseen | sums.py | `test_sums.py::test_times` |" in text
    assert "| sum | sums.py | `test_sums.py::test_add` |" in text
    assert (tree / "sums.py").read_text() == SUMS
    assert list((tmp_path / "copies").iterdir()) == []


def test_a_test_that_fails_anyway_finds_nothing(tree):
    (tree / "test_sums.py").write_text("def test_never():\n    assert False\n")
    with pytest.raises(UserError, match="without any fault"):
        mutants.main([], tree)


def test_an_ambiguous_old_text_is_refused(tree):
    (tree / "sums.py").write_text(SUMS + SUMS)
    with pytest.raises(UserError, match="sum: its old text stands 2 times in sums.py"):
        mutants.main([], tree)


def test_a_killed_run_leaves_no_copy_and_no_process(tree, tmp_path):
    (tree / "test_sums.py").write_text(SLEEPS)
    started, copies = tmp_path / "started", tmp_path / "copies"
    variables = os.environ | {"TMPDIR": str(copies), "STARTED": str(started)}
    command = [sys.executable, "-c", RUNS, str(tree)]
    process = subprocess.Popen(command, cwd=mutants.ROOT, env=variables)
    until(lambda: started.exists() and started.read_text())
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not list(copies.iterdir()))
    until(lambda: _ended(started.read_text()))


def _ended(process):
    """Whether a process has ended or is a zombie."""
    try:
        status = Path("/proc", process, "stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] == "Z"
