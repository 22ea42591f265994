"""README and docs/export.md: commands and Python run, and tables equal the committed results."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import environment, run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXPORT = (ROOT / "docs/export.md").read_text()
TEXTBOOK = (ROOT / "docs/textbook.md").read_text()


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands(text: str) -> list[list[str]]:
    """The fastdiff lines of each block; the lines of a block run in one folder, in order."""
    found = [block.splitlines() for block in blocks("sh", text)]
    return [own for lines in found if (own := [x for x in lines if x.startswith("fastdiff ")])]


def test_the_table_of_graphs_equals_the_committed_files():
    found = re.search(r"<!-- graphs: (\S+) (\S+) -->\n(.*?)\n\n", README, re.S)
    before, now, table = found.groups()
    names = [
        f"{folder}/{name}.json"
        for preset in ("sd15", "sdxl")
        for folder, name in ((before, f"{preset}-before"), (now, f"graph-{preset}"))
    ]
    names += [f"{now}/graph-{preset}.json" for preset in ("sd3", "sd35-medium", "sd35-large")]
    for line, name in zip(table.splitlines()[2:], names, strict=True):
        graph = json.loads((ROOT / name).read_text())
        assert "dirty" not in graph["commit"], "counted on something that is no commit"
        assert [cell.strip(" *") for cell in line.strip("|").split("|")][1:] == [
            str(graph["launches"]),
            f"{graph['bytes'] / 1e9:.1f}",
            f"{graph['flops'] / 1e12:.3f}",
            f"{graph['floor_ms']:.2f} ms",
        ]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(README, id="README"),
        # 20 s; compiler/test_engines.py compiles for ONNX Runtime with one export for all
        pytest.param(EXPORT, id="export", marks=pytest.mark.product),
    ],
)
def test_python_blocks_run(text):
    for block in blocks("python", text):
        exec(block, {})


MADE = "fastdiff export --onnx --out demo-onnx --verify"
COMPILES = ("fastdiff inspect ", "fastdiff warm ")
"""These need Triton's compiler; the process of the tests has its interpreter instead."""


# Takes minutes; test_workflows.py checks their options against the command line, and each command
# has its own tests: test_cli.py, bench/, export/, kernels/test_inspect.py and test_shipped.py.
@pytest.mark.product
@pytest.mark.parametrize(
    "lines", commands(README) + commands(EXPORT) + commands(TEXTBOOK), ids=lambda x: x[0][:40]
)
def test_commands_run(lines, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    for line in lines:
        if line == MADE:
            made = request.getfixturevalue("export_onnx")("demo", request.getfixturevalue("demo"))
            shutil.copytree(made.folder, "demo-onnx")
        elif line.startswith(COMPILES):
            command = [sys.executable, "-m", *shlex.split(line)]
            done = subprocess.run(command, env=environment(), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        else:
            code, out, err = run(*shlex.split(line, comments=True)[1:])
            assert code == 0, (out, err)
        for name in re.findall(r"[\w-]+\.(?:png|json)", line):
            assert (tmp_path / name).stat().st_size > 0


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    lines = "".join(blocks("sh", README)).splitlines()
    targets = [line.split()[1] for line in lines if line.startswith("make ")]
    assert targets == ["bench", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_files_and_links_exist():
    guide = (ROOT / "docs/ci.md").read_text()
    for page, text in ((ROOT, README), (ROOT / "docs", EXPORT), (ROOT / "docs", guide)):
        for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
            assert (page / link.partition("#")[0]).exists(), link


def test_the_table_of_counts_equals_the_committed_file():
    path, table = re.search(r"<!-- counts: (\S+) -->\n(.*?)\n\n", README, re.S).groups()
    result = json.loads((ROOT / path).read_text())
    assert "dirty" not in result["commit"], "counted on something that is no commit"
    lines = table.splitlines()[2:]
    for line, row in zip(lines, result["rows"], strict=True):
        counts = row["counts"]
        total = counts["step_total"]
        assert [cell.strip(" *") for cell in line.strip("|").split("|")] == [
            row["backend"],
            str(total["launches"]),
            f"{total['bytes'] / 1e9:.1f}",
            f"{total['flops'] / 1e12:.3f}",
            str(counts["step"].get("host read", {"launches": 0})["launches"]),
        ]


TABLES = re.findall(r"<!-- table: (\S+) -->\n(.*?)\n\n", README + EXPORT, re.S)


@pytest.mark.parametrize(("path", "table"), TABLES, ids=[path for path, _ in TABLES])
def test_tables_equal_the_committed_results(path, table):
    result = json.loads((ROOT / path).read_text())
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(result["rows"])
    assert "dirty" not in result["commit"], "measured on uncommitted code"
    for line, row in zip(lines, result["rows"], strict=True):
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        ratio, receipt = row["ratio_vs_eager"], row["receipt"]
        assert cells == [
            row["backend"],
            f"{row['steps_per_s']:.{1 if row['steps_per_s'] >= 1 else 2}f}",
            f"{ratio['median']:.2f} [{ratio['lo']:.2f}, {ratio['hi']:.2f}]",
            f"{row['prepare_s']:.1f} s",
            "same" if receipt["psnr_db"] is None else f"{receipt['psnr_db']:.0f} dB",
            f"{receipt['err_vs_fp64']:.1e}",
        ], row["backend"]
