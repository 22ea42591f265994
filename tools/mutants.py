"""Plants faults in a copy of this tree, one at a time, and shows which test finds each.

    python -m tools.mutants [--only NAME …] [--out FILE.md] [--json FILE.json]

A row of mutants.toml is a fault that a tired developer may make: a file, a text that occurs in it
once, its replacement, and the tests of the fast suite that should find the fault.
First these tests run on the unchanged copy: a test that fails anyway finds nothing. Exits with 1 if
a fault survives, with 2 if none can be planted. An existing JSON file keeps the rows of faults that
are not planted this time.

After a fault in csrc/ the copy's C++ kernels are built again, for the lowest instruction set only
(`-DFASTDIFF_ONE_ISA=ON`): with CMake and the pybind11 of this Python. The tree itself is only read
and never written to, and the copy is removed when this process ends, in whatever way.
"""

import argparse
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from fastdiff.errors import UserError
from fastdiff.written import write_text

ROOT = Path(__file__).parent.parent
TABLE = "tools/mutants.toml"
FAST = "not slow and not product"
"""pytest's -m for the suite that should find all faults."""
LIMIT_S = 3600
"""Seconds after which a run that does not end has found the fault."""
SCHEMA = "fastdiff.mutants/1"
FOUND = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.M)

KEEPER = """
while read -r group; do last=$group; done
[ -z "$last" ] || kill -s KILL -- "-$last" 2>/dev/null
rm -rf "$1"
"""
"""Waits until the writer of process groups ends, then ends the last of these groups, and
removes the copy."""
SERVER = """
import importlib, json, os, sys
import pytest
for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    arguments, said = json.loads(line)
    if (child := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        code = pytest.main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Imports libraries once, for half of a short run is imports; then runs pytest in a fork for each
line that it reads: arguments, and the file that takes the output. Answers with the exit code."""
LIBRARIES = (
    "torch",
    "peft",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
)


@dataclass(frozen=True)
class Mutant:
    """A fault. `tests` are arguments of pytest, `k` its -k."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    k: str = ""

    def planted(self, text: str) -> str:
        """The file's text with the fault; UserError unless the old text occurs in it once."""
        if (count := text.count(self.old)) != 1:
            raise UserError(
                f"{self.name}: its old text stands {count} times in {self.file}, not once; write"
                f" the fault anew in {TABLE}"
            )
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Found:
    """The result for a fault. test: the first that failed; None if all passed."""

    mutant: str
    file: str
    test: str | None
    seconds: float


def read(root: Path = ROOT) -> list[Mutant]:
    """The faults of a tree's table, in its order."""
    rows = tomllib.loads((root / TABLE).read_text(encoding="utf-8"))["mutant"]
    return [Mutant(**row | {"tests": tuple(row["tests"])}) for row in rows]


class Copy:
    """A copy of a tree, and a Python that imports it."""

    def __init__(self, root: Path, folder: Path, keeper: "subprocess.Popen[str]") -> None:
        self.tree, self._folder, self._keeper = folder / "tree", folder, keeper
        listed = ["git", "-C", str(root), "ls-files", "-z", "-co", "--exclude-standard"]
        names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout
        for name in filter(None, names.split("\0")):
            if (root / name).is_file():  # git lists what was deleted, too
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / name, self.tree / name)
        # a separate environment: an editable install would put its fastdiff before the copy
        venv.create(folder / "venv", symlinks=True)
        self.python = str(folder / "venv" / "bin" / "python")
        (site,) = (folder / "venv").glob("lib/*/site-packages")
        packages = [path for path in sys.path if path.endswith("-packages")]
        (site / "copy.pth").write_text("\n".join([str(self.tree), *packages]) + "\n")
        (folder / "tmp").mkdir()
        own = {"TMPDIR": str(folder / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
        own["TRITON_INTERPRET"] = "1"  # read when Triton is imported, as tests/conftest.py sets it
        self._environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | own
        self._serve()

    def run(self, *command: str) -> tuple[int, str]:
        """Exit code and output of a command in the tree."""
        done = subprocess.run(
            command,
            cwd=self.tree,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=self._server.pid,
        )
        return done.returncode, done.stdout

    def pytest(self, *arguments: str) -> tuple[int | None, str]:
        """Like `run`, for the fast suite's tests in `arguments`; None if they do not end."""
        options = ["-q", "-rfE", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", FAST]
        said = self._folder / "said.txt"
        said.write_text("")
        asks, answers = self._server.stdin, self._server.stdout
        assert asks is not None
        assert answers is not None
        asks.write(json.dumps([[*options, *arguments], str(said)]) + "\n")
        asks.flush()
        code: int | None = None
        if select.select([answers], [], [], LIMIT_S)[0]:
            if not (answer := answers.readline()):
                raise UserError(
                    f"{self.python} does not run pytest; install fastdiff-engine[test] here"
                )
            code = int(answer)
        else:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
            self._serve()
        return code, said.read_text(encoding="utf-8", errors="replace")

    def _serve(self) -> None:
        libraries = LIBRARIES if (self.tree / "fastdiff").exists() else ()
        self._server = subprocess.Popen(
            [self.python, "-c", SERVER, *libraries],
            cwd=self.tree,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # of imports alone
            text=True,
            process_group=0,  # so that everything that it starts can be ended
        )
        assert self._keeper.stdin is not None
        self._keeper.stdin.write(f"{self._server.pid}\n")
        self._keeper.stdin.flush()

    def build(self) -> None:
        """Build the tree's C++ kernels into its package; UserError if that fails."""
        if not (self.tree / "CMakeLists.txt").exists():
            return
        code, pybind11 = self.run(sys.executable, "-m", "pybind11", "--cmakedir")
        if code:
            raise UserError("the C++ kernels are built with pybind11: pip install pybind11")
        build = str(self._folder / "build")
        options = [
            "-DFASTDIFF_ONE_ISA=ON",
            "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
            "-DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF",
            f"-Dpybind11_DIR={pybind11.strip()}",
            f"-DPython_EXECUTABLE={self.python}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={self.tree / 'fastdiff'}",
        ]
        for command in (
            ["cmake", "-S", str(self.tree), "-B", build, *options],
            ["cmake", "--build", build, "-j", str(len(os.sched_getaffinity(0)))],
        ):
            code, out = self.run(*command)
            if code != 0:
                raise UserError(f"{' '.join(command[:3])} failed:\n{out}")

    @property
    def native(self) -> dict[Path, bytes]:
        """The built module."""
        return {path: path.read_bytes() for path in (self.tree / "fastdiff").glob("_C*.so")}


@contextmanager
def copied(root: Path) -> Iterator[Copy]:
    """A copy of a tree for as long as the block, or this process, runs."""
    folder = Path(tempfile.mkdtemp(prefix="fastdiff-mutants-"))
    keeper = subprocess.Popen(
        ["sh", "-c", KEEPER, "sh", str(folder)],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C ends this process, and so the keeper's work begins
    )
    try:
        yield Copy(root, folder, keeper)
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait()


def check(copy: Copy, mutants: Sequence[Mutant]) -> None:
    """UserError unless the tests of all `mutants` pass without any fault."""
    for kept in (True, False):  # a -k would deselect tests of those that have none
        some = [mutant for mutant in mutants if bool(mutant.k) == kept]
        if some:
            tests = dict.fromkeys(test for mutant in some for test in mutant.tests)
            more = ["-k", " or ".join(dict.fromkeys(f"({m.k})" for m in some))] if kept else []
            code, out = copy.pytest("-x", *more, *tests)
            if code != 0:
                raise UserError(f"without any fault the tests do not pass:\n{out[-8000:]}")


def plant(copy: Copy, mutant: Mutant, native: dict[Path, bytes]) -> Found:
    """Plant one fault, run its tests, and take it out again."""
    path = copy.tree / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(mutant.planted(text), encoding="utf-8")
    in_cpp = mutant.file.startswith("csrc/")
    try:
        if in_cpp:
            copy.build()
        start = time.perf_counter()
        more = ["-k", mutant.k] if mutant.k else []
        code, out = copy.pytest("-x", *more, *mutant.tests)
        seconds = time.perf_counter() - start
    finally:
        path.write_text(text, encoding="utf-8")
        for module, content in native.items() if in_cpp else ():
            module.write_bytes(content)
    return Found(mutant.name, mutant.file, _finder(mutant, code, out), round(seconds, 1))


def _finder(mutant: Mutant, code: int | None, out: str) -> str | None:
    """Which test failed; None if none did. UserError if pytest could not run them."""
    if code == 0:
        return None
    if code is None:
        return f"no end within {LIMIT_S} s"
    if code < 0:
        return f"the process ended by {signal.Signals(-code).name}"
    if code in (1, 2) and (failed := FOUND.search(out)):
        return failed[1]
    raise UserError(f"{mutant.name}: pytest exited with {code}:\n{out[-2000:]}")


def markdown(mutants: Sequence[Mutant], rows: Mapping[str, Found]) -> str:
    """The table as a page; `rows` by the fault's name."""
    found = sum(row.test is not None for row in rows.values())
    survived, left = len(rows) - found, len(mutants) - len(rows)
    lines = [
        "# Planted faults",
        "",
        "`python -m tools.mutants` plants each of these faults in a copy of the tree and runs the",
        "tests of the fast suite that are to find it, which all pass without the fault. What each",
        f"fault changes stands in {TABLE}.",
        "",
        f"Of {len(mutants)} faults {found} are found, {survived} survive, {left} were not planted.",
        "",
        "| fault | in | found by | seconds |",
        "|---|---|---|---|",
    ]
    for mutant in mutants:
        by, seconds = "not planted", ""
        if row := rows.get(mutant.name):
            by = "**nothing**" if row.test is None else f"`{row.test}`".replace("|", "\\|")
            seconds = f"{row.seconds:.0f}"
        lines.append(f"| {mutant.name} | {mutant.file} | {by} | {seconds} |")
    return "\n".join(lines) + "\n"


def _kept(path: Path | None) -> dict[str, Found]:
    """The rows of an earlier run, by name."""
    if path is None or not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {row["mutant"]: Found(**row) for row in rows}


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Exit code: 0 if all planted faults are found, 1 if one survives.

    UserError if a fault cannot be planted, or a test fails without one.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", nargs="+", metavar="NAME", help="plant these alone")
    parser.add_argument("--out", type=Path, help="write the table as Markdown")
    parser.add_argument("--json", type=Path, help="write or update the rows as JSON")
    asked = parser.parse_args(arguments)
    mutants = read(root)
    names = [mutant.name for mutant in mutants]
    if unknown := set(asked.only or ()) - set(names):
        parser.error(f"there is no fault {min(unknown)}; there are {', '.join(names)}")
    chosen = [mutant for mutant in mutants if not asked.only or mutant.name in asked.only]
    for mutant in chosen:
        mutant.planted((root / mutant.file).read_text(encoding="utf-8"))  # before anything is built
    rows = _kept(asked.json)
    planted: list[Found] = []
    with copied(root) as copy:
        copy.build()
        check(copy, chosen)
        native = copy.native
        for mutant in chosen:
            found = plant(copy, mutant, native)
            planted.append(found)
            print(f"{found.mutant}: {found.test or 'SURVIVED'}, {found.seconds:.0f} s", flush=True)
            rows[found.mutant] = found
            rows = {name: rows[name] for name in names if name in rows}
            if asked.json:
                document = {"schema": SCHEMA, "rows": [asdict(row) for row in rows.values()]}
                write_text(asked.json, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
            if asked.out:
                write_text(asked.out, markdown(mutants, rows))
    return 1 if any(found.test is None for found in planted) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
