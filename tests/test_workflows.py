"""Our workflows and those of docs/ci.md parse, are safe, and call existing commands; so do all
commands of the documentation."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from command import environment

from fastdiff.cli import app

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs/ci.md").read_text()
PAGES = [path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
WORKFLOWS = {
    path.name: path.read_text() for path in sorted((ROOT / ".github/workflows").glob("perf*.yml"))
} | {
    f"docs/ci.md, {number}": text
    for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", GUIDE, re.S), 1)
}
PERF = {name: text for name, text in WORKFLOWS.items() if "fastdiff report" in text}
"""The workflows that report a pull request's effect on speed."""
MARKER = "<!-- fastdiff-report -->"
OPERATORS = {"||", "&&", ";", "|", ">", ">>", "(", ")", "&"}


def steps(text):
    (job,) = yaml.safe_load(text)["jobs"].values()
    return job["steps"]


def commands(shell):
    """The arguments of each call of fastdiff in a shell script or an inline code span."""
    for line in re.sub(r"\\\n\s*", " ", shell).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();|&<>")
        lexer.whitespace_split = True
        words = list(lexer)
        while "fastdiff" in words:
            words = words[words.index("fastdiff") + 1 :]
            end = next((i for i, word in enumerate(words) if word in OPERATORS), len(words))
            yield words[:end]


def all_commands():
    scripts = [step["run"] for text in WORKFLOWS.values() for step in steps(text) if "run" in step]
    for page in PAGES:
        scripts += re.findall(r"```sh\n(.*?)```", page, re.S)
        prose = re.sub(r"```.*?```", "", page, flags=re.S)
        scripts += [" ".join(code.split()) for code in re.findall(r"`(fastdiff [^`]+)`", prose)]
    return sorted({tuple(words) for script in scripts for words in commands(script)})


def test_there_are_our_workflow_and_two_to_copy():
    assert {"perf.yml", "docs/ci.md, 1", "docs/ci.md, 2"} == PERF.keys()


@pytest.mark.parametrize("text", PERF.values(), ids=PERF)
def test_a_workflow_has_the_permissions_and_steps_it_needs(text):
    document = yaml.safe_load(text)
    assert document[True] == "pull_request", "YAML reads `on` as true"
    assert document["permissions"] == {"contents": "read", "pull-requests": "write"}
    uses = {step["uses"]: step for step in steps(text) if "uses" in step}
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in uses)
    (checkout,) = [step for action, step in uses.items() if "/checkout@" in action]
    assert checkout["with"]["fetch-depth"] == 0
    assert any("/upload-artifact@" in action for action in uses)
    (comment,) = [step for action, step in uses.items() if "/github-script@" in action]
    assert MARKER in comment["with"]["script"]
    (job,) = document["jobs"].values()
    own = "github.event.pull_request.head.repo.full_name == github.repository"
    assert own in (comment.get("if"), job.get("if")), "a fork's token cannot write"
    if "self-hosted" in job["runs-on"]:
        assert job["if"] == own, "a fork's code must not run on a self-hosted machine"
    assert job["timeout-minutes"] <= 60


@pytest.mark.parametrize("text", PERF.values(), ids=PERF)
@pytest.mark.parametrize(
    ("codes", "passes", "warns"),
    [("", True, False), ("3\n", True, True), ("1\n", False, False), ("2\n", False, False)]
    + [("3\n1\n", False, True), ("1\n3\n", False, True), ("139\n", False, False)],
)
def test_a_regression_fails_and_an_undecided_one_warns(text, codes, passes, warns, tmp_path):
    if codes:
        (tmp_path / "codes").write_text(codes)
    script = steps(text)[-1]["run"]
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode == 0) == passes
    assert ("::warning" in done.stdout) == warns


@pytest.mark.parametrize("text", WORKFLOWS.values(), ids=WORKFLOWS)
def test_shell_parses(text):
    for step in steps(text):
        if "run" in step:
            script = re.sub(r"\$\{\{.*?\}\}", "x", step["run"])
            subprocess.run(["bash", "-n", "-c", script], check=True)


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
def test_documented_commands_exist(words):
    group = typer.main.get_command(app)
    if words[0].startswith("--"):  # an option of fastdiff itself
        assert words[0] in {name for option in group.params for name in option.opts}
        return
    with group.make_context("fastdiff", list(words)) as context:
        name, command, rest = group.resolve_command(context, list(words))
        assert command is not None, name
        if rest:  # without arguments prose only names the command
            command.make_context(name, rest, parent=context).close()


# Takes a minute; tests/regression covers states, process pairs, documents and reports one by one.
@pytest.mark.product
def test_the_commands_of_the_guide_run_in_a_users_repository(demo, tmp_path):
    """The repository has a tracked pipeline and an equal branch to compare with."""
    demo.save_pretrained(tmp_path / "my_pipe")
    for command in (
        "init --quiet",
        "add --all",
        "-c user.name=t -c user.email=t@example.org commit --quiet --message x",
        "update-ref refs/remotes/origin/main HEAD",
    ):
        subprocess.run(["git", "-C", tmp_path, *command.split()], check=True)
    variables = environment()
    variables |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "GITHUB_STEP_SUMMARY": "summary.md"}
    codes = []
    for line in re.search(r"```sh\n(.*?)```", GUIDE, re.S)[1].split("\n"):
        if line:
            command = [sys.executable, "-m", *shlex.split(line)]
            done = subprocess.run(
                command, cwd=tmp_path, env=variables, capture_output=True, text=True
            )
            # any verdict will do, since noise decides it here
            assert done.returncode in (0, 1, 3), done.stderr
            assert "Traceback" not in done.stderr
            codes.append(done.returncode)
    assert codes[1] == codes[0], "the report of a file has the exit code of its run"
    assert codes[2:] == [0, 0, 0]
    paired = json.loads((tmp_path / "paired.json").read_text())
    assert paired["case"].startswith("my_pipe, float32")
    assert paired["states"]["base"]["name"] == "origin/main"
    assert len(paired["times"][0]["base"]) == 6
    assert (tmp_path / "summary.md").read_text().count(MARKER) >= 2
    for page in ("paired.md", "paired.html", "paired.xml"):
        assert (tmp_path / page).stat().st_size > 1000


def test_the_table_of_trust_equals_the_committed_runs():
    """It is recomputed from the runs' verdicts; at most one of a hundred may be a false alarm."""
    path, table = re.search(r"<!-- trust: (\S+) -->\n(.*?)\n\n", GUIDE, re.S).groups()
    runs = json.loads((ROOT / path).read_text())["runs"]
    planted = {
        "loop": "· step",
        "launch": "step · launches",
        "copy": "step · bytes",
        "record": "recordings · same size again",
    }
    kinds = {}
    for run in runs:
        part = planted.get(run["kind"].split()[0], "")
        verdicts = [line["verdict"] for line in run["lines"] if part in line["name"]]
        verdict = next((v for v in ("slower", "faster", "inconclusive") if v in verdicts), "same")
        kinds.setdefault(run["kind"], []).append((verdict, run["seconds"]))
    for line in table.splitlines()[2:]:
        kind, count, *counts, longest = [cell.strip() for cell in line.strip("|").split("|")]
        found = kinds.pop(kind)
        found_verdicts = [verdict for verdict, _ in found]
        assert int(count) == len(found)
        for verdict, number in zip(
            ("slower", "faster", "inconclusive", "same"), counts, strict=True
        ):
            assert int(number) == found_verdicts.count(verdict), kind
        assert longest == f"{max(seconds for _, seconds in found):.0f} s"
        if kind.startswith("same"):
            assert found_verdicts.count("slower") + found_verdicts.count("faster") <= 1
    assert kinds == {}
