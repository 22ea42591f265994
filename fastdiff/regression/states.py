"""The states to compare: the one here, and another revision, folder or wheel.

The other state gets an environment layered above the packages installed here, so that torch is not
downloaded again; only what the state requires in another version is installed. Environments are
cached by their contents, so a second comparison with the same revision builds nothing.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fastdiff.errors import UserError
from fastdiff.regression.environments import beneath, install, lay_beneath, packages_of

UNSET = ("TRITON_INTERPRET", "PYTHONDONTWRITEBYTECODE")
"""Environment variables that no state's processes have."""
KEPT = 8
"""Environments in the cache; the least recently used are removed."""


@dataclass(frozen=True)
class Place:
    """A state that can be run: its interpreter, and the folder with its files."""

    name: str
    python: Path
    root: Path
    commit: str | None

    def environment(self) -> dict[str, str]:
        """The environment variables of its processes; PYTHONPATH without the other state's
        folder. Both states keep bytecode: pip has written one's, and a first picture imports."""
        variables = {k: v for k, v in os.environ.items() if k not in UNSET}
        if self.python != here_python() and "PYTHONPATH" in variables:
            paths = variables["PYTHONPATH"].split(os.pathsep)
            kept = [p for p in paths if not Path(p).resolve().is_relative_to(Path.cwd())]
            variables["PYTHONPATH"] = os.pathsep.join(kept)
        return variables


def here_python() -> Path:
    return Path(sys.executable)


def here(root: Path) -> Place:
    """What is installed and in `root` now, edited or not."""
    return Place("here", here_python(), root, _git(root, "describe", "--always", "--dirty"))


def other(against: str, root: Path, log: Callable[[str], object]) -> Place:
    """The state that `against` names: a wheel, a folder, or a revision of the repository `root`.

    Raises UserError if it names none of these, or if that does not install.
    """
    path = Path(against)
    if path.suffix == ".whl" and path.is_file():
        key = hashlib.sha256(path.read_bytes()).hexdigest()
        return _cached(path.name, None, key, log, lambda _: path.resolve(), root)
    sha = _git(root, "rev-parse", "--verify", "--quiet", f"{against}^{{commit}}")
    if path.is_dir() and sha:
        raise UserError(
            f"--against {against} is a folder and a revision; give ./{against} or {sha}"
        )
    if path.is_dir():
        source = path.resolve()
        commit = _git(source, "describe", "--always", "--dirty")
        return _cached(against, commit, _content(source), log, lambda to: _copy(source, to), source)
    if sha is None:
        raise UserError(
            f"--against {against} is not a folder, wheel or revision of {root.name}; "
            "give one of these (a shallow clone has only its newest revision: fetch more)"
        )
    top = Path(_git(root, "rev-parse", "--show-toplevel") or root)
    inside = root.resolve().relative_to(top.resolve())

    def bring(folder: Path) -> Path:
        return _worktree(top, sha, folder) / inside

    return _cached(against, sha[:7], f"{sha} {inside}", log, bring, None)


def cache() -> Path:
    """The folder of cached environments."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastdiff" / "states"


def _cached(
    name: str,
    commit: str | None,
    content: str,
    log: Callable[[str], object],
    fetch: Callable[[Path], Path],
    root: Path | None,
) -> Place:
    """The environment for `content`, made if it is missing; `fetch` provides its source.

    root: where the state's files are, if not in that source.
    """
    key = hashlib.sha256(f"{content} {beneath()}".encode()).hexdigest()[:16]
    folder = cache() / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    ready = folder / "ready.json"
    if _hold(folder, ready):
        if not ready.is_file():
            shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
            folder.mkdir()
            log(f"{name}: making its environment (only once)")
            try:
                source = fetch(folder / "tree")
                if not source.exists():
                    raise UserError(f"--against {name} has no folder {source.name}")
                install(name, source, folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            ready.write_text(json.dumps({"source": str(source)}))
        ready.touch()
        lay_beneath(packages_of(folder))  # an editable project may have moved
        fcntl.flock(_HELD[folder], fcntl.LOCK_SH)
    _forget_oldest(folder)
    source = Path(json.loads(ready.read_text())["source"])
    return Place(name, folder / "venv/bin/python", root or source, commit)


_HELD: dict[Path, IO[str]] = {}
"""Locks on the environments that this process uses, held until it ends so that none is removed."""


def _hold(folder: Path, ready: Path) -> bool:
    """Lock an environment: exclusively, to make it (True), or shared, to use it (False)."""
    handle = _HELD.setdefault(folder, folder.with_suffix(".lock").open("w"))
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            fcntl.flock(handle, fcntl.LOCK_SH)  # waits until another process has made it
            if ready.is_file():
                return False
            fcntl.flock(handle, fcntl.LOCK_UN)


def _worktree(top: Path, sha: str, folder: Path) -> Path:
    """The revision's files, as a worktree of the repository `top`."""
    subprocess.run(["git", "-C", top, "worktree", "prune"], capture_output=True)
    done = subprocess.run(
        [
            "git",
            "-C",
            top,
            *["-c", "core.hooksPath=/dev/null", "worktree", "add", "--detach"],
            folder,
            sha,
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"git cannot check {sha[:7]} out: {done.stderr.strip().splitlines()[-1]}")
    return folder


def _files(folder: Path) -> list[Path]:
    """The names of a folder's files, without those that git ignores."""
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
    """Copy a folder's files, so that a build leaves its results beside the copy. Weights, which are
    large, are linked if the disk allows it."""
    to.mkdir()
    for name in _files(source):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        if name.suffix == ".safetensors":
            with suppress(OSError):
                os.link(source / name, to / name)
                continue
        shutil.copy2(source / name, to / name)  # a build may write into its sources
    return to


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None if it fails: no repository, no such revision, no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def _forget_oldest(current: Path) -> None:
    """Remove the least recently used environments, except those in use."""
    made = {ready: _last_used(ready) for ready in cache().glob("*/ready.json")}
    for ready in sorted(made, key=lambda ready: made[ready])[:-KEPT]:
        folder = ready.parent
        with folder.with_suffix(".lock").open("w") as handle, suppress(OSError):
            if folder != current:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ready.unlink()  # first, so that an interrupted removal leaves no valid environment
                shutil.rmtree(folder, ignore_errors=True)


def _last_used(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # another run has just removed it
        return 0.0
