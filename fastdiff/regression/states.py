"""The states that are compared: what runs here, and another revision, folder or wheel.

Another state gets an environment of its own: what is installed here lies beneath it, so that torch
is not downloaded again; what the state asks for otherwise is installed above. Environments are
kept by what they were made of; a second comparison with the same revision builds nothing.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fastdiff.errors import UserError

KEPT = 8
"""Environments in the cache; the ones unused for longest go."""
BENEATH = "beneath.pth"
"""What shows an environment the packages that are installed here."""


@dataclass(frozen=True)
class Place:
    """A state that can be run: its interpreter, and the folder in which its files lie."""

    name: str
    python: Path
    root: Path
    commit: str | None

    def environment(self) -> dict[str, str]:
        """Variables of its processes. PYTHONPATH would show it the files of the other state."""
        left_out = {"TRITON_INTERPRET"} | (
            {"PYTHONPATH"} if self.python != here_python() else set()
        )
        return {name: value for name, value in os.environ.items() if name not in left_out}


def here_python() -> Path:
    return Path(sys.executable)


def here(root: Path) -> Place:
    """What is installed and lies in `root` now, edited or not."""
    return Place("working tree", here_python(), root, _git(root, "describe", "--always", "--dirty"))


def other(against: str, root: Path, log: Callable[[str], object]) -> Place:
    """The state that `against` names: a wheel, a folder, else a revision of the repository `root`.

    Raises UserError where it names nothing, or what it names does not install.
    """
    path = Path(against)
    if path.suffix == ".whl" and path.is_file():
        key = hashlib.sha256(path.read_bytes()).hexdigest()
        return _kept(path.name, None, key, log, lambda _: path.resolve(), root)
    sha = _git(root, "rev-parse", "--verify", "--quiet", f"{against}^{{commit}}")
    if path.is_dir() and sha:
        raise UserError(
            f"--against {against} is a folder and a revision; give ./{against} or {sha}"
        )
    if path.is_dir():
        source = path.resolve()
        commit = _git(source, "describe", "--always", "--dirty")
        return _kept(against, commit, _content(source), log, lambda to: _copy(source, to), source)
    if sha is None:
        raise UserError(
            f"--against {against} is no folder, no wheel and no revision of {root.name}; "
            "give one of these (a shallow clone has only its newest revision: fetch more)"
        )
    top = Path(_git(root, "rev-parse", "--show-toplevel") or root)
    inside = root.resolve().relative_to(top.resolve())
    place = _kept(against, sha[:7], sha, log, lambda folder: _worktree(top, sha, folder), None)
    return Place(place.name, place.python, place.root / inside, place.commit)


def cache() -> Path:
    """Where environments are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastdiff" / "states"


def _kept(
    name: str,
    commit: str | None,
    content: str,
    log: Callable[[str], object],
    fetch: Callable[[Path], Path],
    root: Path | None,
) -> Place:
    """The environment for `content`, made where it is not there: `fetch` brings its source.

    root: where the state's files lie, if not in what was brought.
    """
    key = hashlib.sha256(f"{content} {_beneath()}".encode()).hexdigest()[:16]
    folder = cache() / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        ready = folder / "ready.json"
        if not ready.is_file():
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run has left
            folder.mkdir()
            log(f"{name}: making its environment, once")
            source = fetch(folder / "tree")
            try:
                _install(name, source, folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            ready.write_text(json.dumps({"source": str(source)}))
        ready.touch()
        source = Path(json.loads(ready.read_text())["source"])
    _forget_oldest(folder)
    return Place(name, folder / "venv/bin/python", root or source, commit)


def _install(name: str, source: Path, folder: Path) -> None:
    """A virtual environment in `folder` with `source` installed: a wheel, a project, or its
    requirements. Nothing of either: what is installed here, alone."""
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    packages = next((folder / "venv/lib").glob("python*/site-packages"))
    _lay_beneath(packages)
    project = source.is_file() or any(
        (source / file).is_file() for file in ("pyproject.toml", "setup.py")
    )
    requirements = source / "requirements.txt"
    if project:
        report = folder / "report.json"
        # Over what is installed here under the same name, without touching what it depends on …
        _pip(name, folder, "--no-deps", "--ignore-installed", "--report", report, source)
        installed = json.loads(report.read_text())["install"][0]["metadata"]
        needs = [need for need in installed.get("requires_dist", []) if "extra ==" not in need]
        if needs:  # … and then that, where its own versions are asked for
            _pip(name, folder, *needs)
    elif requirements.is_file():
        _pip(name, folder, "--requirement", requirements)
    _lay_beneath(packages)


def _lay_beneath(packages: Path) -> None:
    """Show an environment what is installed here, editable projects too; not those of its own.

    An editable project is a .pth file, which Python reads in the folders of an environment, but
    not in those that another .pth file names: so their lines are said again.
    """
    own = {d.name for d in metadata.distributions(path=[str(packages)])}
    hidden = {
        Path(str(file.locate()))
        for distribution in metadata.distributions()
        if distribution.name in own
        for file in distribution.files or ()
        if file.suffix == ".pth"
    }
    lines = []
    for folder in map(Path, _site_packages()):
        lines.append(str(folder))
        for pth in sorted(set(folder.glob("*.pth")) - hidden):
            if pth.name != BENEATH:  # this interpreter is a state's itself: see its own folders
                for line in filter(None, pth.read_text().splitlines()):
                    is_code = line.startswith(("import ", "import\t"))
                    lines.append(line if is_code else str(folder / line))
    (packages / BENEATH).write_text("\n".join(lines) + "\n")


def _pip(name: str, folder: Path, *arguments: object) -> None:
    python = folder / "venv/bin/python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", *arguments]
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_USER")}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=variables
    )
    if done.returncode:
        log = folder.with_suffix(".log")
        log.write_text(done.stdout + done.stderr)
        raise UserError(
            f"--against {name} does not install: {_first_error(done.stdout + done.stderr)}"
            f" (all that pip said: {log})"
        )


def _first_error(output: str) -> str:
    """The first line that names an error in words, not only that there was one."""
    lines = (line.strip(" |") for line in output.splitlines())
    errors = [line for line in lines if re.search(r"error: \S+ \S", line, re.I)]
    return errors[0] if errors else "pip did not say why"


def _worktree(top: Path, sha: str, folder: Path) -> Path:
    """The revision's files, as a worktree of the repository `top`."""
    subprocess.run(["git", "-C", top, "worktree", "prune"], capture_output=True)
    done = subprocess.run(
        ["git", "-C", top, "worktree", "add", "--detach", folder, sha],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"git cannot check {sha[:7]} out: {done.stderr.strip().splitlines()[-1]}")
    return folder


def _beneath() -> str:
    """What an environment depends on beside its own source: this interpreter and its packages."""
    installed = sorted(f"{d.name} {d.version}" for d in metadata.distributions())
    return "\n".join([sys.version, *_site_packages(), *installed])


def _site_packages() -> list[str]:
    """The folders of this interpreter's packages, in its own order."""
    found = dict.fromkeys(
        path for path in sys.path if path.endswith(("site-packages", "dist-packages"))
    )
    return list(found)


def _files(folder: Path) -> list[Path]:
    """Names of a folder's files, without what git ignores."""
    listed = _git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ".")
    names = (
        map(Path, listed.split("\0"))
        if listed
        else (p.relative_to(folder) for p in folder.rglob("*"))
    )
    return sorted(name for name in names if (folder / name).is_file())


def _content(folder: Path) -> str:
    """A hash of the names, sizes and times of a folder's files."""
    digest = hashlib.sha256(str(folder).encode())
    for name in _files(folder):
        facts = (folder / name).stat()
        digest.update(f"{name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _copy(source: Path, to: Path) -> Path:
    """A folder's files once more, for what builds them to leave its own beside them. Links where
    the disk allows it: weights are large."""
    for name in _files(source):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, to / name)
        except OSError:
            shutil.copy2(source / name, to / name)
    return to


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None where it fails: no repository, no such revision, no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two runs that want the same environment make it one after the other."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _forget_oldest(current: Path) -> None:
    made = sorted(cache().glob("*/ready.json"), key=lambda ready: ready.stat().st_mtime)
    for ready in made[:-KEPT]:
        if ready.parent != current:
            shutil.rmtree(ready.parent, ignore_errors=True)
