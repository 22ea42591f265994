"""docs/add-a-network.md, followed step by step on a copy of fastdiff."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import environment

import fastdiff
from fastdiff import _C

HERE = Path(__file__).parent
PAGE = (HERE.parent / "docs/add-a-network.md").read_text()
# 13 s; other tests check each of these things with fastdiff's own networks.
pytestmark = pytest.mark.product
FILE = re.compile(r"`(fastdiff/\w+/quilt\.py)`.*?```python\n(.*?)```", re.S)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What add_a_network.py found: it uses a Quilt pipeline as users do, in its own process."""
    folder = tmp_path_factory.mktemp("added")
    package = Path(fastdiff.__file__).parent
    shutil.copytree(package, folder / "fastdiff", ignore=shutil.ignore_patterns("__pycache__"))
    native = Path(_C.__file__)
    if native.parent != package:
        shutil.copy(native, folder / "fastdiff")
    for name, text in files():
        assert not (folder / name).exists()
        (folder / name).write_text(text)
    recipes = folder / "fastdiff/recipes.py"
    recipes.write_text(with_row(recipes.read_text()))
    shutil.copy(HERE / "logged.py", folder)
    shutil.copy(HERE / "quilt.py", folder)
    shutil.copy(HERE / "add_a_network.py", folder)
    # -S skips site, so that an editable install does not come before the copy
    paths = [str(folder), *(path for path in sys.path if path.endswith("-packages"))]
    done = subprocess.run(
        [sys.executable, "-S", "add_a_network.py", str(folder)],
        cwd=folder,
        env=environment() | {"PYTHONPATH": ":".join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "seen.json").read_text())
    assert Path(found["fastdiff"]).parent == Path(found["native"]).parent == folder / "fastdiff"
    return found


def files():
    """Names and texts of the files that the page adds."""
    found = FILE.findall(PAGE)
    assert [name for name, _ in found] == ["fastdiff/models/quilt.py", "fastdiff/families/quilt.py"]
    return found


def with_row(recipes):
    """The table of recipes with the page's row added."""
    (row,) = re.findall(r'```python\n( +"quilt\.QuiltPipeline".*?)```', PAGE, re.S)
    table, brace, rest = recipes.partition("    }\n\n\nRECIPES")
    assert brace
    return table + row + brace + rest


def test_the_added_network_draws_what_eager_draws(seen):
    assert len(seen["errors"]) == 6
    for name, (error, allowed) in seen["errors"].items():
        assert error <= allowed, name


def test_the_added_pipeline_runs_as_a_plan(seen):
    report = seen["report"]
    assert report["loop"] == ["fastdiff", "4 loops"]
    assert report["transformer"][0] == "fastdiff"
    assert report["vae.decoder"][0] == "fastdiff"
    assert report["text_encoder"][0] == "diffusers"


def test_the_added_pipelines_launches_are_counted(seen):
    launches = seen["launches a step"]
    assert 0 < launches["fastdiff"] < launches["eager"] / 2


def test_the_graph_of_the_added_network(seen):
    assert seen["launches"] == {
        "matrix product (cuBLAS)": 2 * 4 + 2,  # none for the modulation, none for the text
        "ada_norm _ada_norm_kernel": 2 * 2 + 1,
        "joint_attention _joint_kernel": 2,
        "torch cat": 1,
        "guided_step _guided_step_kernel": 1,
    }


def test_the_added_network_is_exported(seen):
    exported = seen["exported"]
    assert len(exported) == 6  # two sizes at three timesteps
    assert all(passed for *_, passed in exported)
    assert seen["report"]["engine"] == ["ort"]


def test_a_patched_method_of_the_library_is_refused(seen):
    assert "QuiltBlock.split_heads is not its library's own" in seen["refused"]
