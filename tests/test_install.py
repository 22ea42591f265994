"""Installation: names, extras, wheels, shell completion, and another package in our folder."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import typer
import yaml
from command import environment, run
from packaging.requirements import Requirement

import fastdiff
from fastdiff import installed
from fastdiff.cli import app
from fastdiff.kernels import dispatch

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
PAGE = (ROOT / "docs/install.md").read_text()
WORKFLOW = (ROOT / ".github/workflows/wheels.yml").read_text()
FOR_US = {"docs", "train", "test", "dev"}


def test_no_file_tells_users_to_install_the_other_fastdiff():
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "*.md", "*.py", "*.toml", "*.yml", "Makefile", ".ci/run"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    wrong = re.compile(
        r"(?<![\w-])fastdiff\[\w|pip install '?fastdiff(?![\w-])|metadata.\w+\(.fastdiff.\)"
    )
    matches = {name: wrong.findall((ROOT / name).read_text()) for name in listed}
    matches.pop("tests/test_install.py", None)
    assert {name: found for name, found in matches.items() if found} == {}


def packages(extra):
    """The distributions that an extra requires, without our own."""
    names = [Requirement(line).name for line in EXTRAS[extra]]
    return [name for name in names if name != installed.DISTRIBUTION]


def test_each_extra_is_explained_in_the_code_and_on_the_page():
    wanted = set(EXTRAS) - FOR_US
    assert set(installed.BRINGS) == wanted
    rows = re.findall(r"^\| `([\w-]+)` \| (.*) \| (.*) \|$", PAGE, re.M)
    assert {extra for extra, _, _ in rows} == wanted
    for extra, purpose, names in rows:
        assert purpose.replace("`", "") == installed.BRINGS[extra]
        assert names.split(", and ")[0].split(", ") == packages(extra)
    assert set(installed.EXTRAS.values()) <= wanted


def test_the_distribution_name_is_the_same_everywhere():
    assert PROJECT["project"]["name"] == installed.DISTRIBUTION
    assert PROJECT["project"]["scripts"] == {"fastdiff": "fastdiff.cli:main"}
    of_ours = [Requirement(line) for own in EXTRAS.values() for line in own if "fastdiff" in line]
    assert {own.name for own in of_ours} == {installed.DISTRIBUTION}
    assert set().union(*(own.extras for own in of_ours)) <= set(EXTRAS)


def wheel(folder, name, version, files):
    """Write a minimal pure Python wheel."""
    base = f"{name.replace('-', '_')}-{version}"
    info = f"{base}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{base}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{f},,\n" for f in [*files, f"{info}/RECORD"]))
    return path


def test_another_package_in_our_folder_is_named(tmp_path):
    """pip installs one over the other silently, and uninstalling removes files of both."""
    package = Path(fastdiff.__file__).parent
    own = {f"fastdiff/{n}": (package / n).read_text() for n in ("__init__.py", "installed.py")}
    ours = wheel(tmp_path, "fastdiff-engine", "0.1.0", own)
    other = wheel(tmp_path, "fastdiff", "0.3.0", {"fastdiff/__init__.py": "__all__ = ['compare']"})
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"

    def pip(*arguments):
        command = [sys.executable, "-m", "pip", "--python", python, *arguments]
        subprocess.run(command, check=True, capture_output=True)

    def said():
        script = "from fastdiff import installed; print(installed.clash())"
        asked = [python, "-I", "-c", script]
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()

    how = "; pip uninstall --yes fastdiff fastdiff-engine, then install fastdiff-engine again"
    install = ("install", "--no-index", "--no-deps", "--force-reinstall")
    pip(*install, ours)
    assert said() == "None"
    pip(*install, other)
    replaced = "fastdiff 0.3.0, another project, has replaced our fastdiff/__init__.py"
    assert said() == replaced + how
    pip(*install, ours)
    assert said() == f"fastdiff 0.3.0, another project, is installed in our folder{how}"
    pip("uninstall", "--yes", "fastdiff")
    left = "fastdiff/__init__.py is missing or not ours, which another project's fastdiff causes"
    assert said() == left + how


def test_a_command_that_fails_because_of_it_says_so(monkeypatch):
    """With the other package's __init__.py, `import fastdiff` imports the other package."""
    monkeypatch.setattr(fastdiff, "__all__", ["compare"])
    monkeypatch.delattr(fastdiff, "__version__")
    code, _, err = run("env")
    assert code == 2
    assert err.startswith("fastdiff: fastdiff/__init__.py is missing or not ours")
    assert "pip uninstall --yes fastdiff fastdiff-engine" in err


def native():
    """The file of the C++ kernels."""
    if dispatch.NATIVE is None:
        pytest.skip("built without a compiler")
    return Path(dispatch.NATIVE.__file__)


LOADED = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("_C", sys.argv[1])
module = module_from_spec(spec)
spec.loader.exec_module(module)
files = {line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}
print(module.isa(), module.thread_runtime(), *files, sep="\\n")
"""


def test_one_build_works_with_any_torch():
    """The C++ kernels load without torch, with all symbols bound at once."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LOADED, native()],
        env=environment() | {"LD_BIND_NOW": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    isa, threads, *files = done.stdout.splitlines()
    assert isa in dispatch.NATIVE.isas()
    assert threads == "none: serial"
    assert str(native()) in files
    assert [name for name in files if re.search(r"torch|c10|gomp|omp\.so", name)] == []


def test_there_is_a_wheel_for_each_supported_python():
    supported = {
        line.rpartition(" ")[2]
        for line in PROJECT["project"]["classifiers"]
        if line.startswith("Programming Language :: Python :: 3.")
    }
    minors = re.fullmatch(
        r"cp3\{([\d,]+)\}-manylinux_x86_64", PROJECT["tool"]["cibuildwheel"]["build"]
    )[1]
    assert {f"3.{minor}" for minor in minors.split(",")} == supported
    assert native().name.endswith(EXTENSION_SUFFIXES[0]), "no stable ABI, so a wheel for each"


def test_the_workflow_of_wheels_is_safe():
    document = yaml.safe_load(WORKFLOW)
    assert document["permissions"] == {"contents": "read"}
    assert set(document[True]) == {"workflow_dispatch", "pull_request"}, "YAML reads `on` as true"
    for job in document["jobs"].values():
        assert job["timeout-minutes"] <= 120
        for step in job["steps"]:
            assert "run" in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
            script = re.sub(r"\$\{\{.*?\}\}", "x", step.get("run", ""))
            subprocess.run(["bash", "-n", "-c", script], check=True)
            for tool in re.findall(r"pipx run (\S+)", script):
                assert "==" in tool, "the tool's version is not pinned"


def commands(text):
    """The arguments of each line that calls fastdiff."""
    lines = map(str.strip, text.splitlines())
    return [tuple(line.split()[1:]) for line in lines if line.startswith("fastdiff ")]


@pytest.mark.parametrize(
    "words", commands("\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.S))), ids=" ".join
)
def test_the_pages_commands_run(words, monkeypatch):
    # this machine may have findings
    monkeypatch.setattr("fastdiff.bench.doctor.of_machine", lambda device: [])
    code, out, err = run(*words)
    assert code == 0, err
    assert out


def test_wheels_are_tried_with_commands_that_exist():
    jobs = yaml.safe_load(WORKFLOW)["jobs"].values()
    scripts = [step.get("run", "") for job in jobs for step in job["steps"]]
    tried = commands("\n".join([*scripts, *PROJECT["tool"]["cibuildwheel"]["test-command"]]))
    assert {words[0] for words in tried} == {"bench", "doctor", "env"}
    group = typer.main.get_command(app)
    for name, *rest in tried:
        with group.commands[name].make_context(name, list(rest)) as context:
            assert context.info_name == name


def test_the_version_option_prints_the_packages_version():
    assert run("--version") == (0, f"fastdiff {PROJECT['project']['version']}\n", "")
    assert fastdiff.__version__ == PROJECT["project"]["version"]


def test_env_writes_the_printed_facts_as_json(tmp_path):
    code, out, _ = run("env", "--json", tmp_path / "env.json")
    assert code == 0
    document = json.loads((tmp_path / "env.json").read_text())
    assert document.pop("schema") == "fastdiff.env/1"
    assert out.splitlines() == [
        f"- {name}: {'none' if value is None else value}" for name, value in document.items()
    ]
    code, out, err = run("env", "--json", tmp_path / "no" / "env.json")
    assert (code, out) == (2, "")
    assert "does not exist; make it first" in err


def test_the_shell_completes_commands_and_options(tmp_path):
    """With the script that `--install-completion` installs for bash."""
    fastdiff_command = Path(sys.executable).with_name("fastdiff")
    variables = environment() | {"HOME": str(tmp_path)}
    path = f"{fastdiff_command.parent}{os.pathsep}{variables['PATH']}"
    script = """
        fastdiff --install-completion >/dev/null; source ~/.bashrc
        for words in "fastdiff ro" "fastdiff env --js"; do
          COMP_WORDS=($words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
          $(complete -p fastdiff | grep -oP '(?<=-F )\\S+') fastdiff; echo "${COMPREPLY[@]}"
        done
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env=variables | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["roofline", "--json"], done.stderr
