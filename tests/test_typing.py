"""`mypy --strict` on a user's code knows the types of fastdiff's public names and finds errors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastdiff
from fastdiff.compiler.options import Keywords, Options

HERE = Path(__file__).parent
PROGRAMS = HERE / "typed"
DIFFUSERS = """
class StableDiffusionPipeline:
    device: str
"""
"""A stub that replaces diffusers, whose own types take minutes to read."""
CONFIG = """
[mypy]
strict = True
follow_imports = skip
[mypy-fastdiff.*,diffusers]
follow_imports = silent
"""
"""mypy reads fastdiff's files, and skips those of other libraries."""


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    """mypy's messages for each line of each program: {(program, line): [message, ...]}."""
    folder = tmp_path_factory.mktemp("typed")
    (folder / "stubs/diffusers").mkdir(parents=True)
    (folder / "stubs/diffusers/__init__.pyi").write_text(DIFFUSERS)
    (folder / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache"]
    done = subprocess.run(
        [*command, *map(str, sorted(PROGRAMS.glob("*.py")))],
        cwd=folder,
        env=os.environ | {"MYPYPATH": f"{folder}/stubs:{Path(fastdiff.__file__).parent.parent}"},
        capture_output=True,
        text=True,
    )
    assert not done.stderr, done.stderr
    found: dict[tuple[str, int], list[str]] = {}
    for line in done.stdout.splitlines():
        if place := re.match(r"(?:.*/)?(\w+)\.py:(\d+): (.*)", line):
            found.setdefault((place[1], int(place[2])), []).append(place[3])
    return found


def test_each_type_is_known(messages):
    lines = (PROGRAMS / "user.py").read_text().splitlines()
    below = zip(lines, lines[1:], strict=False)
    kinds = {i: b[2:] for i, (a, b) in enumerate(below, 1) if a.startswith("reveal_type(")}
    assert len(kinds) > 10
    assert not any(re.search(r"\bAny\b", kind) for kind in kinds.values())
    want = {i: [f'note: Revealed type is "{kind}"'] for i, kind in kinds.items()}
    assert {line: own for (name, line), own in messages.items() if name == "user"} == want


def test_mistakes_are_found(messages):
    lines = (PROGRAMS / "wrong.py").read_text().splitlines()
    want = {i: [line.split("  # ")[1]] for i, line in enumerate(lines, 1) if "  # " in line}
    faults = {
        line: [fault for one in own for fault in re.findall(r"error: .*\[([\w-]+)\]$", one)]
        for (name, line), own in messages.items()
        if name == "wrong"
    }
    assert faults == want


def test_keywords_of_compile_are_the_options():
    assert Keywords.__annotations__ == Options.__annotations__
    assert (Path(fastdiff.__file__).parent / "py.typed").exists()
