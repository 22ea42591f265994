"""`fastdiff report` and `compare` from their arguments to files and exit codes."""

import copy
import html
import json

import pytest
from command import run
from regression.files import BENCH, COUNTS, PAIRED, STATIC

from fastdiff.regression import pairs
from fastdiff.regression.reports.markdown import MARKER


@pytest.fixture
def paired(tmp_path):
    path = tmp_path / "paired.json"
    path.write_text(json.dumps(PAIRED))
    return path


def test_reports_of_all_formats_agree(tmp_path, paired, monkeypatch):
    summary = tmp_path / "summary.md"
    summary.write_text("# what an earlier step wrote\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    out = tmp_path / "out"
    out.mkdir()
    kinds = {
        kind: out / f"it.{kind}"
        for kind in ("markdown", "html", "junit", "json", "pytest-benchmark")
    }
    options = [word for kind, path in kinds.items() for word in (f"--{kind}", path)]
    code, printed, err = run("report", paired, *options)
    assert code == 1
    assert err == ""
    assert "exit code 1: something got slower or larger" in printed
    text = {kind: path.read_text() for kind, path in kinds.items()}
    assert len(list(out.iterdir())) == len(kinds)
    assert text["markdown"].startswith(MARKER)
    assert summary.read_text() == f"# what an earlier step wrote\n{text['markdown']}\n"
    document = json.loads(text["json"])
    assert document["schema"] == "fastdiff.report/1"
    slower = [line["name"] for line in document["lines"] if line["verdict"] == "slower"]
    assert slower == ["channels_last · result", "fastdiff · step", "fastdiff · step · launches"]
    for kind in ("markdown", "html"):
        assert all(name in html.unescape(text[kind]) for name in slower), kind
    assert text["junit"].count("<failure") == len(slower)
    (row,) = json.loads(text["pytest-benchmark"])["benchmarks"]
    assert row["stats"]["median"] == pytest.approx(5.6e-3)


def test_equal_rows_are_shown_on_request(tmp_path):
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(COUNTS))
    code, printed, _ = run("report", path, path)
    assert code == 0
    assert "recordings" not in printed
    code, printed, _ = run("report", path, path, "--all")
    assert code == 0
    assert "recordings · another size" in printed


def test_the_history_of_this_repository_is_drawn(tmp_path):
    """The committed results with commits on the axis, alone and next to a comparison."""
    page = tmp_path / "history.html"
    code, printed, err = run("report", "--history", "benchmarks/results", "--html", page)
    assert (code, printed, err) == (0, f"{page}\n", "")
    assert "1b4daea" in page.read_text()
    assert "cpu-zen5-2core" in page.read_text()
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps(COUNTS))
    both = tmp_path / "both.html"
    options = ("--history", "benchmarks/results", "--html", both)
    roof = ("--roofline", "benchmarks/results/roofline/sd15-h200.json")
    assert run("report", counts, counts, *options, *roof)[0] == 0
    text = both.read_text()
    assert "1b4daea" in text
    assert "NVIDIA H200" in text
    assert "up 1" in text


def test_states_that_cannot_be_compared_exit_3(tmp_path):
    paths = []
    for name, document in (("a.json", BENCH), ("b.json", BENCH | {"versions": {"torch": "2.11"}})):
        paths.append(tmp_path / name)
        paths[-1].write_text(json.dumps(document))
    code, printed, _ = run("report", *paths)
    assert code == 3
    assert "torch is 2.13.0+cpu in BASE and 2.11 in NEW" in printed


BAD = {
    "give BASE.json and NEW.json": (),
    "holds one state": ("{static}",),
    "--floor is 0; give a share between 0% and 100%": ("{static}", "{static}", "--floor", "0"),
    "--floor is abc": ("{static}", "{static}", "--floor", "abc"),
    "--floor is 100%": ("{static}", "{static}", "--floor", "100%"),
    "the folder {tmp}/no does not exist": ("{static}", "{static}", "--html", "{tmp}/no/x.html"),
    "--roofline needs --html": ("{static}", "{static}", "--roofline", "{static}"),
    "holds no roofline": (
        *("{static}", "{static}", "--roofline", "{static}"),
        *("--html", "{tmp}/x.html"),
    ),
    "--junit needs two states": (
        *("--history", "benchmarks/results", "--html", "{tmp}/x.html"),
        *("--junit", "{tmp}/x.xml"),
    ),
    "or --history and --html": ("--history", "benchmarks/results"),
    "nothing is not a folder": ("--history", "{tmp}/nothing", "--html", "{tmp}/x.html"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_of_report(tmp_path, message):
    static = tmp_path / "static.json"
    static.write_text(json.dumps(STATIC))
    arguments = [word.format(tmp=tmp_path, static=static) for word in BAD[message]]
    refused(tmp_path, message, "report", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["static.json"]


AGAINST = ("--against", "HEAD")
BAD_COMPARE = {
    "--pairs is 0; give at least 1": (*AGAINST, "--pairs", "0"),
    "--limit is 0": (*AGAINST, "--limit", "0"),
    "--threads is 0": (*AGAINST, "--threads", "0"),
    "--until-precise is 2": (*AGAINST, "--until-precise", "2"),
    "got --pairs and --until-precise": (*AGAINST, "--pairs", "5", "--until-precise", "1%"),
    "--gate is 'all'; choose from both, times, counters": (*AGAINST, "--gate", "all"),
    "got --pairs and --limit": (*AGAINST, "--pairs", "5", "--limit", "9"),
    "--filter needs kernels": (*AGAINST, "--filter", "conv2d"),
    "leave out --preset": ("kernels", *AGAINST, "--preset", "tiny"),
    "--backends is 'warp'": (*AGAINST, "--backends", "warp"),
    "compare cannot run --backends ort": (*AGAINST, "--backends", "fastdiff,ort"),
    "got the pipeline here and --preset tiny": ("here", *AGAINST, "--preset", "tiny"),
    "--dtype is 'int8'": (*AGAINST, "--dtype", "int8"),
    "the folder {tmp}/no does not exist": (*AGAINST, "--json", "{tmp}/no/x.json"),
    "is not a folder, wheel or revision": ("--against", "no-such-revision"),
    "{tmp}/nothing is neither an existing folder or .safetensors file": ("{tmp}/nothing", *AGAINST),
}


@pytest.mark.parametrize("message", BAD_COMPARE)
def test_bad_input_of_compare(tmp_path, monkeypatch, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = [word.format(tmp=tmp_path) for word in BAD_COMPARE[message]]
    refused(tmp_path, message, "compare", *arguments)
    assert list(tmp_path.iterdir()) == []


def refused(tmp_path, message, *arguments):
    """Run a command that must end with one sentence and exit code 2."""
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("fastdiff: ")
    assert err.count("\n") == 1
    assert message.format(tmp=tmp_path, static="") in err


def test_a_kernel_is_timed_in_both_states_from_the_command_line(tmp_path, monkeypatch):
    """The other state is a folder without a project, so its environment shows the packages that
    are installed here; a real second state would need a build."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/README").write_text("nothing to install")
    path = tmp_path / "paired.json"
    options = ("--filter", "ada_norm · demo", "--pairs", "2", "--json", path)
    code, out, err = run("compare", "kernels", "--against", tmp_path / "other", *options)
    assert code == 3, err
    assert "about" in out
    assert "more process pairs would settle it" in " ".join(out.split())
    document = json.loads(path.read_text())
    (row,) = document["times"]
    assert row["name"].startswith("ada_norm · demo(")
    assert len(row["base"]) == len(row["new"]) == 2
    assert document["case"] == "kernels, float32, cpu"
    again, printed, _ = run("report", path)
    assert again == 3
    assert "ada_norm · demo" in printed
    broken = copy.deepcopy(document)
    broken["wrong"]["new"] = {row["name"]: "error 1"}
    broken["times"] = []
    path.write_text(json.dumps(broken))
    assert run("report", path)[0] == 1


def test_a_filter_without_a_match_is_refused(tmp_path, monkeypatch):
    """Both states say that they have no such row; their processes are tested above."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pairs, "race", lambda *_, **__: pairs.Race(rows={"base": [], "new": []}))
    (tmp_path / "other").mkdir()
    code, out, err = run("compare", "kernels", "--against", tmp_path / "other", "--filter", "warp")
    assert (code, out) == (2, "")
    assert "--filter warp matches no kernel or case" in err
