"""README stays true: its commands run, its Python runs, its table is the committed result."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULT = re.search(r"<!-- table: (\S+) -->\n(.*?)\n\n", README, re.S)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]


def test_python_runs():
    for block in blocks("python"):
        subprocess.run([sys.executable, "-c", block], check=True, timeout=300)


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("fastdiff ")])
def test_command_runs(line, tmp_path):
    beside = Path(sys.executable).parent / "fastdiff"
    command = str(beside) if beside.exists() else shutil.which("fastdiff")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        f"{command} {line.removeprefix('fastdiff ')}",
        shell=True,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    for name in re.findall(r"[\w-]+\.(?:png|json)", line):
        assert (tmp_path / name).stat().st_size > 0


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.split()[1] for line in COMMANDS if line.startswith("make ")]
    assert targets == ["bench", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_files_and_links_exist():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_counts_are_the_committed_ones():
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


def test_table_is_the_committed_result():
    assert RESULT is not None
    result = json.loads((ROOT / RESULT[1]).read_text())
    lines = [line for line in RESULT[2].splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(result["rows"])
    assert "dirty" not in result["commit"], "measured on something that is no commit"
    for line, row in zip(lines, result["rows"], strict=True):
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        ratio, receipt = row["ratio_vs_eager"], row["receipt"]
        assert cells == [
            row["backend"],
            f"{row['steps_per_s']:.1f}",
            f"{ratio['median']:.2f} [{ratio['lo']:.2f}, {ratio['hi']:.2f}]",
            f"{row['prepare_s']:.1f} s",
            "same" if receipt["psnr_db"] is None else f"{receipt['psnr_db']:.0f} dB",
            f"{receipt['err_vs_fp64']:.1e}",
        ], row["backend"]
