"""The files that contributors look for exist, and agree with each other and with the code."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import fastdiff
from fastdiff.cli import app

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORMS = sorted(
    path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"
)
PAGES = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]


def test_pre_commit_runs_the_pinned_ruff():
    (pin,) = [line for line in PROJECT["optional-dependencies"]["dev"] if line.startswith("ruff")]
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert f"ruff=={repo['rev'].removeprefix('v')}" == pin
    assert [hook["id"] for hook in repo["hooks"]] == ["ruff-check", "ruff-format"]


def test_all_files_name_the_same_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == fastdiff.__version__
    assert citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_the_changelog_names_this_version():
    """As a heading, or as the version that will be released next."""
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\]", text, re.M)
    assert headings[0] == "Unreleased"
    assert PROJECT["version"] in headings or f"will be {PROJECT['version']}" in text
    kinds = set(re.findall(r"^### (\w+)", text, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_ask_for_the_environment(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"]
    assert form["description"]
    asked = {item["id"]: item for item in form["body"]}
    assert len(asked) == len(form["body"])
    assert all(item["attributes"]["label"] for item in asked.values())
    assert asked["env"]["validations"]["required"]
    assert "fastdiff env" in asked["env"]["attributes"]["label"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pages_name_existing_files_targets_and_commands(path):
    text = path.read_text()
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        file, _, heading = link.partition("#")
        page = ROOT / file if file else path
        assert page.exists(), link
        titles = re.findall(r"^#+ (.*)", page.read_text(), re.M) if heading else [heading]
        assert heading in [title.lower().replace(" ", "-") for title in titles], link
    for name in re.findall(r"`((?:tests|tools|fastdiff|csrc|docs)/[\w./]*|\.ci/\w+)`", text):
        assert (ROOT / name).exists(), name
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", text, re.M):
        assert "".join(target) in targets
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    for name in re.findall(r"`fastdiff (\w+)", text):
        assert name in commands
    assert set(re.findall(r"fastdiff\.(\w+)\(", text)) <= set(fastdiff.__all__)
