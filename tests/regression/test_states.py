"""Each compared state gets its own files and its own environment, which is made once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff.errors import UserError
from fastdiff.regression import environments, states

SETUPTOOLS = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "pupil"
version = "{version}"
dependencies = ["numpy>=2"]
[tool.setuptools]
py-modules = ["pupil"]
"""
PROJECT = """
[build-system]
requires = []
build-backend = "zips"
backend-path = ["."]
[project]
name = "pupil"
version = "{version}"
"""
ZIPS = """
import re, zipfile
from pathlib import Path

def build_wheel(folder, config_settings=None, metadata_directory=None):
    version = re.search('version = "(.*)"', Path("pyproject.toml").read_text())[1]
    facts = {
        "METADATA": ["Metadata-Version: 2.1", "Name: pupil", f"Version: {version}"],
        "WHEEL": ["Wheel-Version: 1.0", "Root-Is-Purelib: true", "Tag: py3-none-any"],
        "RECORD": [],
    }
    name = f"pupil-{version}-py3-none-any.whl"
    with zipfile.ZipFile(Path(folder, name), "w") as wheel:
        wheel.write("pupil.py")
        for file, lines in facts.items():
            wheel.writestr(f"pupil-{version}.dist-info/{file}", "".join(x + chr(10) for x in lines))
    return name
"""
"""A build backend that needs almost no time."""


def project(year, version=1, inside=""):
    """The files of a small project, with `inside` before their paths."""
    files = {
        "pupil.py": f"YEAR = {year}\n",
        "pyproject.toml": PROJECT.format(version=version),
        "zips.py": ZIPS,
    }
    return {f"{inside}{name}": text for name, text in files.items()}


def git(folder, *arguments):
    names = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", folder, *names, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def commit(folder, files, branch=None):
    write(folder, files)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "x")
    if branch:
        git(folder, "branch", branch)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/fastdiff/states"


@pytest.fixture
def repository(tmp_path, request):
    """A project at two revisions; the parameter holds further files of the first."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    commit(folder, project(1) | getattr(request, "param", {}), "old")
    commit(folder, {"pupil.py": "YEAR = 2\n", "inside/data.txt": "2"})
    return folder


def asked(place, code="import pupil; print(pupil.YEAR)"):
    """The output of `code` in the state's interpreter."""
    done = subprocess.run(
        [place.python, "-P", "-c", code],
        cwd=place.root,
        env=place.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    "repository",
    [
        pytest.param({}, id="zips"),
        # pip builds it in an isolated environment, and it has a dependency
        pytest.param(
            {"pyproject.toml": SETUPTOOLS.format(version=1)},
            id="setuptools",
            marks=pytest.mark.product,
        ),
    ],
    indirect=True,
)
def test_a_revision_is_installed_next_to_the_packages_of_this_environment(
    repository, cache, monkeypatch
):
    monkeypatch.chdir(repository)
    monkeypatch.setenv("PYTHONPATH", f"{repository}{os.pathsep}/elsewhere")
    said = []
    old = states.other("old", repository, said.append)
    assert said == ["old: making its environment (only once)"]
    assert asked(old) == "1"  # not 2, which PYTHONPATH would show
    assert old.environment()["PYTHONPATH"] == "/elsewhere"
    assert old.commit == git(repository, "rev-parse", "old")[:7]
    assert not (old.root / "inside").exists()
    assert asked(old, "import torch; print(torch.__file__)").startswith(sys.prefix)
    assert asked(old, "import importlib.metadata as m; print(m.version('pupil'))") == "1"

    commit(repository, {"pupil.py": "YEAR = 3\n"})
    again = states.other("old", repository, said.append)
    assert again == old
    assert len(said) == 1  # nothing was built

    inside = states.other("HEAD", repository / "inside", said.append)
    assert inside.root.name == "inside"
    assert (inside.root / "data.txt").read_text() == "2"
    with pytest.raises(UserError, match="--against old has no folder inside"):
        states.other("old", repository / "inside", said.append)


def packages(place):
    return next((place.python.parents[1] / "lib").glob("python*/site-packages"))


def test_an_editable_install_shows_only_in_states_without_the_project(
    tmp_path, repository, monkeypatch
):
    """Other projects see the working tree; a state of the same project sees its own revision."""
    here, edited = tmp_path / "here/site-packages", tmp_path / "edited"
    write(edited, {"pupil.py": "YEAR = 5\n"})
    info = {"METADATA": "Name: pupil\nVersion: 5\n", "RECORD": "pupil.pth,,\n"}
    write(here / "pupil-5.dist-info", info)
    write(here, {"pupil.pth": f"{edited}\n"})
    monkeypatch.syspath_prepend(here)
    user = tmp_path / "user"
    user.mkdir()
    git(user, "init", "--quiet")
    commit(user, {"README": "no project, no requirements"})
    shown = states.other("HEAD", user, print)
    assert asked(shown) == "5"
    old = states.other("old", repository, print)
    assert asked(old) == "1"
    # as if the comparing interpreter belonged to a state, with pupil 1 before pupil 5 on its path
    monkeypatch.syspath_prepend(packages(old))
    assert asked(states.other("HEAD", repository, print)) == "2"
    assert asked(states.other("HEAD", user, print)) == "1"


def test_a_state_under_fastdiffs_old_distribution_name_is_not_hidden(tmp_path, monkeypatch):
    """Both names are one package: a state that has either does not see the one installed here."""
    here, state = tmp_path / "here/site-packages", tmp_path / "state/site-packages"
    pth = "_editable_skbc_fastdiff_engine.pth"
    info = {"METADATA": "Name: fastdiff-engine\nVersion: 1\n", "RECORD": f"{pth},,\n"}
    write(here / "fastdiff_engine-1.dist-info", info)
    write(here, {pth: "/edited\n"})
    write(state / "fastdiff-0.dist-info", {"METADATA": "Name: fastdiff\nVersion: 0\n"})
    monkeypatch.syspath_prepend(here)
    environments.lay_beneath(state)
    lines = (state / environments.BENEATH).read_text().splitlines()
    assert str(here) in lines
    assert "/edited" not in lines


def test_a_project_in_a_subfolder_of_a_repository_is_installed(tmp_path, monkeypatch):
    """The subfolder's project at that revision is installed, not the working tree's."""
    whole = tmp_path / "whole"
    whole.mkdir()
    git(whole, "init", "--quiet")
    commit(whole, project(1, inside="pkg/"), "old")
    commit(whole, {"pkg/pupil.py": "YEAR = 2\n"})
    monkeypatch.syspath_prepend(whole / "pkg")
    place = states.other("old", whole / "pkg", print)
    assert asked(place) == "1"
    assert place.root.name == "pkg"


def test_linter_settings_make_no_project_and_relative_requirements_are_the_states_own(
    tmp_path, monkeypatch
):
    library = project(1, inside="lib/")
    folder = tmp_path / "user"
    folder.mkdir()
    git(folder, "init", "--quiet")
    settings = {"pyproject.toml": "[tool.ruff]\n", "requirements.txt": "./lib\n"}
    commit(folder, library | settings, "old")
    write(folder, {"lib/pupil.py": "YEAR = 2\n"})
    monkeypatch.chdir(folder)
    assert asked(states.other("old", folder, print)) == "1"


def test_an_environment_in_use_is_not_removed(repository, cache, monkeypatch):
    """Another process that makes room keeps it, and can use the same environment meanwhile."""
    place = states.other("old", repository, print)
    monkeypatch.setattr(states, "KEPT", 0)
    script = "import sys\nfrom fastdiff.regression import states\nfrom pathlib import Path\n"
    script += (
        f"states.KEPT = 0\nprint(states.other('HEAD', Path({str(repository)!r}), print).python)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert asked(place) == "1"
    same = script.replace("'HEAD'", "'old'")
    done = subprocess.run([sys.executable, "-c", same], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(place.python)


def test_an_interrupted_environment_is_made_again(repository, cache):
    old = states.other("old", repository, print)
    ready = old.python.parents[2] / "ready.json"
    ready.unlink()
    (old.root / "pupil.py").write_text("YEAR = 'half'")
    assert asked(states.other("old", repository, print)) == "1"


def test_the_working_tree_is_what_runs_here(repository):
    here = states.here(repository)
    assert (here.python, here.root) == (Path(sys.executable), repository)
    assert here.commit == git(repository, "rev-parse", "--short", "HEAD")
    write(repository, {"pupil.py": "YEAR = 9\n"})
    assert states.here(repository).commit.endswith("-dirty")


def test_both_states_may_write_bytecode(repository, monkeypatch):
    """pip compiles the other state's modules, so without it that state's first picture would be
    the faster one."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert "PYTHONDONTWRITEBYTECODE" not in states.here(repository).environment()


def test_a_state_may_consist_of_requirements_or_of_a_wheel(tmp_path, repository):
    """A user's repository: a pipeline and the versions that it runs on."""
    wheel = tmp_path / "wheels"
    write(tmp_path / "lib", project(7, version=7))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--wheel-dir",
        wheel,
        tmp_path / "lib",
    ]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = wheel.iterdir()
    folder = tmp_path / "user"
    folder.mkdir()
    git(folder, "init", "--quiet")
    commit(folder, {"requirements.txt": f"numpy>=2\n{file}\n", "my_pipe/model_index.json": "{}"})
    place = states.other("HEAD", folder, print)
    assert asked(place) == "7"
    assert (place.root / "my_pipe/model_index.json").exists()

    by_wheel = states.other(str(file), folder, print)
    assert asked(by_wheel) == "7"
    assert by_wheel.root == folder  # a wheel has no files of its own


def test_a_folder_is_installed_again_only_after_an_edit(tmp_path, repository):
    said = []
    source = tmp_path / "checkout"
    subprocess.run(["git", "clone", "--quiet", repository, source], check=True)
    first = states.other(str(source), repository, said.append)
    assert states.other(str(source), repository, said.append) == first
    assert len(said) == 1
    write(source, {"pupil.py": "YEAR = 42\n"})
    assert asked(states.other(str(source), repository, said.append)) == "42"
    assert len(said) == 2


def test_a_state_that_does_not_install_says_why_and_leaves_only_a_log(repository, cache):
    commit(repository, {"pyproject.toml": SETUPTOOLS.format(version="not a version")})
    with pytest.raises(UserError) as caught:
        states.other("HEAD", repository, print)
    message = str(caught.value)
    assert message.startswith("--against HEAD does not install: ")
    assert "version" in message
    assert "\n" not in message
    assert not list(cache.glob("*/"))
    (log,) = cache.glob("*.log")
    assert str(log) in message


@pytest.mark.parametrize("name", ["nothing", "v1.0", ""])
def test_an_unknown_name_is_refused(repository, name):
    with pytest.raises(UserError, match="is not a folder, wheel or revision of repository"):
        states.other(name or "''", repository, print)


def test_a_name_of_both_a_folder_and_a_revision_is_refused(repository, monkeypatch):
    (repository / "old").mkdir()
    monkeypatch.chdir(repository)
    with pytest.raises(UserError, match=r"is a folder and a revision; give ./old or [0-9a-f]{40}"):
        states.other("old", repository, print)


def test_a_revision_outside_a_git_repository_is_refused(tmp_path):
    with pytest.raises(UserError, match="wheel or revision of"):
        states.other("HEAD", tmp_path, print)


def test_the_oldest_environments_are_removed(tmp_path, repository, cache, monkeypatch):
    monkeypatch.setattr(states, "KEPT", 2)
    for age, name in enumerate(("a", "b", "c")):
        folder = cache / name
        folder.mkdir(parents=True)
        (folder / "ready.json").write_text(json.dumps({"source": "x"}))
        os.utime(folder / "ready.json", (age, age))
    place = states.other("old", repository, print)
    left = {path.parent.name for path in cache.glob("*/ready.json")}
    assert left == {"c", place.python.parents[2].name}
