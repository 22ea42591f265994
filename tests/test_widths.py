"""The output of each command at 80, 100 and 120 columns, and on a full disk."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import copied, run
from regression.files import BENCH, COUNTS, PAIRED, STATIC, bench_row
from test_cli import static_table  # noqa: F401  a fixture

from fastdiff.bench import report as bench_report
from fastdiff.bench import roofline_table
from fastdiff.cli import graph

WIDTHS = (80, 100, 120)
FULL = os.strerror(errno.ENOSPC)
END = "\f"


@pytest.fixture(params=["bench", "count", "graph", "roofline"])
def shown(request, monkeypatch, tmp_path, small_folder):
    """A command that measures once and prints its table at each width: row names, headings, the
    output file, arguments."""

    def each(show):
        def again(*args):
            for width in WIDTHS:
                monkeypatch.setenv("COLUMNS", str(width))
                show(*args)
                sys.stdout.write(END)

        return again

    def texts(text):
        def again(*args):
            found = []
            for width in WIDTHS:
                monkeypatch.setenv("COLUMNS", str(width))
                found.append(text(*args))
            return END.join(found) + END

        return again

    short = (small_folder, "--steps", "2", "--device", "cpu")
    out = tmp_path / "out.json"
    command = request.param
    if command == "bench":
        monkeypatch.setattr(bench_report, "show", each(bench_report.show))
        names = ["eager", "fastdiff"]
        more = ("--backends", ",".join(names), "--rounds", "2")
        return names, bench_report.COLUMNS, out, ("bench", *short, *more, "--json", out)
    if command == "count":
        monkeypatch.setattr(bench_report, "show_counts", each(bench_report.show_counts))
        head = ("backend", "per", "launches", "MB", "GFLOP", "attention", "conv", "host read")
        return ["eager", "fastdiff"], head, out, ("count", *short, "--json", out)
    if command == "graph":
        monkeypatch.setattr(graph, "_show", each(graph._show))
        names = ["convolution (cuDNN)", "torch add (a convolution's bias)", "all"]
        return names, graph.HEAD, out, ("graph", "--preset", "sd15", "--json", out)
    monkeypatch.setattr(roofline_table, "text", texts(roofline_table.text))
    names = ["text encoder", "down 0", "VAE conv in", "the rest"]
    options = ("--gpu", "h200", "--measure", "--rounds", "2")
    return names, roofline_table.HEAD, out, ("roofline", *short, *options, "--json", out)


@pytest.fixture
def full_disk(monkeypatch):
    """Each write stops after half of the text, because the disk is full."""
    write_text = Path.write_text

    def half(path, text, **options):
        write_text(path, text[: len(text) // 2], **options)
        raise OSError(errno.ENOSPC, FULL)

    monkeypatch.setattr(Path, "write_text", half)


def readable(text, width, names, head):
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    for name in names:
        assert any(line.startswith(f"│{name} ") for line in lines), name
    for heading in head:
        assert any(heading in line for line in lines if line[:1] == "┃"), heading


def test_on_a_full_disk_a_readable_table_is_still_printed(shown, full_disk, tmp_path):
    names, head, out, command = shown
    code, printed, err = run(*command)
    *parts, rest = printed.split(END)
    assert rest.strip() == ""
    for width, text in zip(WIDTHS, parts, strict=True):
        readable(text, width, names, head)
    assert code == 2
    assert err.splitlines()[-1] == f"fastdiff: {out} cannot be written: {FULL}"
    assert list(tmp_path.iterdir()) == []


HEAD = ("name", "base", "new", "ratio [interval]", "verdict", "n")
LONG = "benchmarks/test_pipelines.py::test_step[sd15-float16-cpu-channels_last-20-steps]"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("document", [BENCH, COUNTS, PAIRED, STATIC], ids=lambda d: d["schema"])
def test_a_report_is_readable(tmp_path, monkeypatch, width, document):
    """`fastdiff compare` prints the same report."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document))
    monkeypatch.setenv("COLUMNS", str(width))
    files = [path] if document is PAIRED else [path, path]
    code, printed, err = run("report", *files, "--all")
    assert code in (0, 1, 3), err
    readable(printed, width, [], HEAD)
    table = [line for line in printed.splitlines() if line[:1] == "│"]
    names = " ".join(" ".join(line.split("│")[1] for line in table).split())
    for name in {
        "fastdiff.bench/1": ["fastdiff · step against eager", "fastdiff · peak memory"],
        "fastdiff.counts/1": ["fastdiff · recordings · another size"],
        "fastdiff.paired/1": ["channels_last · result", "fastdiff · step · launches"],
        "fastdiff.static/1": [
            "attention · _attention_kernel · sd15-64-self · float16 · sm_90 · matrix instructions"
        ],
    }[document["schema"]]:
        assert name in names


@pytest.mark.parametrize("width", WIDTHS)
def test_inspect_is_readable(static_table, monkeypatch, width):  # noqa: F811
    from fastdiff.cli.facts import COLUMNS

    monkeypatch.setenv("COLUMNS", str(width))
    code, printed, _ = run("inspect", "--arch", "90")
    assert code == 0
    readable(printed, width, [], ("kernel", *COLUMNS.values()))
    assert "131072" in printed
    assert "shared memory" in printed


def test_env_prints_one_line_per_fact_at_any_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, _ = run("env")
    assert code == 0
    assert all(line.startswith("- ") for line in printed.splitlines())


def test_on_a_full_disk_report_and_inspect_still_print(
    tmp_path,
    full_disk,
    static_table,  # noqa: F811
):
    path, out = tmp_path / "counts.json", tmp_path / "out"
    path.write_bytes(json.dumps(COUNTS).encode())
    out.mkdir()
    kinds = ("markdown", "html", "junit", "json")
    options = [word for kind in kinds for word in (f"--{kind}", out / kind)]
    for command, says in (
        (("report", path, path, *options), "exit code 0: nothing got slower"),
        (("inspect", "--arch", "90", "--json", out / "x.json"), "│guided_step · "),
    ):
        code, printed, err = run(*command)
        assert code == 2
        assert says in printed
        assert err.splitlines()[-1].startswith(f"fastdiff: {out}/")
        assert err.endswith(f"cannot be written: {FULL}\n")
        assert list(out.iterdir()) == []


def test_a_summary_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    path, summary = tmp_path / "counts.json", tmp_path / "no" / "summary.md"
    path.write_text(json.dumps(COUNTS))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    code, printed, err = run("report", path, path)
    assert code == 2
    assert "exit code 0" in printed
    assert err == f"fastdiff: {summary} cannot be written: No such file or directory\n"


def test_results_are_written_although_stdout_is_closed(tmp_path, monkeypatch):
    path, out = tmp_path / "counts.json", tmp_path / "out.json"
    path.write_text(json.dumps(COUNTS))

    def closed(*_):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr("fastdiff.regression.reports.terminal.show", closed)
    run("report", path, path, "--json", out)
    assert json.loads(out.read_text())["exit_code"] == 0


def test_a_full_stdout_is_one_sentence():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastdiff", "env"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (
        2,
        f"fastdiff: {FULL}; make room and run it again\n",
    )


MISSING = {
    ("triton", "graph"): "graph needs triton (import of triton halted; None in sys.modules);"
    " pip install 'fastdiff-engine[gpu]'",
    ("triton", "inspect"): "inspect needs triton (import of triton halted; None in sys.modules);"
    " pip install 'fastdiff-engine[gpu]'",
    ("transformers", "graph"): "graph needs transformers",
    ("diffusers", "count", "--preset", "tiny"): "count needs diffusers",
    ("diffusers", "count"): "the demo pipeline needs diffusers and transformers",
    ("matplotlib", "report", "{file}", "{file}", "--html", "{out}"): "needs matplotlib",
    ("PIL", "generate", "--prompt", "sun", "--out", "{out}"): "generate needs PIL",
}
WITHOUT = """
assert sys.argv[1] not in sys.modules
sys.modules[sys.argv[1]] = None
from fastdiff.cli import main
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Programs in copies of a process that has imported the command line and what it needs of
    packages that are none of those."""
    needed = "torch, fastdiff.cli, numpy, rich.table, scipy.stats, skimage.metrics, sympy, typer"
    with copied(f"import {needed}", tmp_path_factory.mktemp("begun")) as run:
        yield run


@pytest.mark.parametrize("command", MISSING, ids=lambda command: " ".join(command[:2]))
def test_a_missing_package_is_one_sentence(tmp_path, begun, command):
    """In a separate process, because this one has imported the package."""
    file = tmp_path / "counts.json"
    file.write_text(json.dumps(COUNTS))
    words = [word.format(file=file, out=tmp_path / "out.png") for word in command]
    status, printed, err = begun(WITHOUT, *words)
    last = err.splitlines()[-1]
    assert (status, printed) == (2, "")
    assert last.startswith("fastdiff: ")
    assert MISSING[command] in last
    assert "pip install 'fastdiff-engine[" in last
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["counts.json"]


def test_an_import_error_of_our_own_shows_a_traceback(monkeypatch):
    def broken(*_):
        raise ImportError("cannot import name 'x' from 'fastdiff.export.onnx'")

    monkeypatch.setattr("fastdiff.bench.machine.versions", broken)
    code, _, err = run("env")
    assert code == 2
    assert "Traceback" in err


@pytest.mark.parametrize("samples", [[4.0, 5.0], [4.0, 4.0], [0.1] * 15])
def test_a_report_of_few_or_equal_rounds(tmp_path, samples):
    """Two rounds are too few for an error estimate; equal rounds have an error of zero."""
    document = BENCH | {
        "rows": [bench_row("eager", [2 * s for s in samples]), bench_row("fastdiff", samples)]
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(document))
    kinds = {kind: tmp_path / f"x.{kind}" for kind in ("markdown", "html", "junit", "json")}
    options = [word for kind, out in kinds.items() for word in (f"--{kind}", out)]
    code, printed, err = run("report", path, path, *options)
    assert (code, err) == (3 if len(samples) == 2 else 0, "")
    assert "nan" not in printed.lower()
    assert ("about 3 more rounds would settle it" in " ".join(printed.split())) == (code == 3)
    assert "nan" not in kinds["markdown"].read_text().lower()
