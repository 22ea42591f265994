"""A virtual environment for a state, layered above the packages installed here."""

import json
import os
import platform
import re
import subprocess
import sys
import tomllib
import venv
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from fastdiff.errors import UserError

BENEATH = "beneath.pth"
"""The file that makes the packages installed here visible in an environment."""
NAMES = {"fastdiff", "fastdiff-engine"}
"""Our package's names to pip: a state from before we were renamed has the old one."""


def install(name: str, source: Path, folder: Path) -> None:
    """Make a virtual environment in `folder` with `source` installed: a wheel, or a project and its
    requirements.txt. Without any of these it has only the packages installed here."""
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    lay_beneath(packages_of(folder))
    if source.is_file() or _is_project(source):
        report = folder / "report.json"
        # first over the package of the same name that is installed here, leaving its dependencies …
        _pip(name, folder, source, "--no-deps", "--ignore-installed", "--report", report, source)
        installed = json.loads(report.read_text())["install"][0]["metadata"]
        needs = [need for need in installed.get("requires_dist", []) if "extra ==" not in need]
        if needs:  # … and then those dependencies, in the versions it requires
            _pip(name, folder, source, *needs)
    if (source / "requirements.txt").is_file():
        _pip(name, folder, source, "--requirement", source / "requirements.txt")


def packages_of(folder: Path) -> Path:
    return next((folder / "venv/lib").glob("python*/site-packages"))


def _is_project(source: Path) -> bool:
    """Whether a folder can be installed; a pyproject.toml may only configure a linter."""
    if (source / "setup.py").is_file():
        return True
    try:
        tables = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise UserError(f"{source.name}/pyproject.toml is not TOML: {error}") from error
    return "project" in tables or "build-system" in tables


def lay_beneath(packages: Path) -> None:
    """Make the packages installed here visible in an environment, including editable projects,
    except projects that it has itself.

    An editable project is a .pth file. Python reads .pth files in an environment's own folders, but
    not in folders that another .pth file names, so their lines are repeated.
    """
    own = {d.name for d in metadata.distributions(path=[str(packages)])}
    if own & NAMES:
        own |= NAMES
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
            if pth.name != BENEATH:  # the folders named there are in _site_packages() already
                for line in filter(None, pth.read_text().splitlines()):
                    is_code = line.startswith(("import ", "import\t"))
                    lines.append(line if is_code else str(folder / line))
    (packages / BENEATH).write_text("\n".join(lines) + "\n")


def _pip(name: str, folder: Path, source: Path, *arguments: object) -> None:
    """Install; relative paths in requirements are the state's own."""
    if find_spec("pip") is None:
        raise UserError("--against needs pip to make the other environment; install it here first")
    python = folder / "venv/bin/python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", *arguments]
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_USER")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=source if source.is_dir() else source.parent,
        capture_output=True,
        text=True,
        env=variables,
    )
    if done.returncode:
        log = folder.with_suffix(".log")
        log.write_text(done.stdout + done.stderr)
        raise UserError(
            f"--against {name} does not install: {_first_error(done.stdout + done.stderr)}"
            f" (pip's full output: {log})"
        )


def _first_error(output: str) -> str:
    """The first line that describes an error, not only says that there was one."""
    lines = (line.strip(" |") for line in output.splitlines())
    errors = [line for line in lines if re.search(r"error: \S+ \S", line, re.I)]
    return (errors or output.strip().splitlines()[-1:] or ["pip did not say why"])[0]


def beneath() -> str:
    """What an environment depends on besides its source: this interpreter and its packages."""
    installed = sorted(f"{d.name} {d.version}" for d in metadata.distributions())
    tools = [os.environ.get(name, "") for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CMAKE_ARGS")]
    return "\n".join([sys.version, platform.platform(), *tools, *_site_packages(), *installed])


def _site_packages() -> list[str]:
    """The folders of this interpreter's packages, in its order."""
    found = dict.fromkeys(
        path for path in sys.path if path.endswith(("site-packages", "dist-packages"))
    )
    return list(found)
