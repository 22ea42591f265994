"""What several files of tests read and none of them writes into: it is made once in a run.

xdist gives every worker session fixtures of its own. These lie in the folder of the whole run, and
the worker that asks first makes them while the others wait.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import run_json
from filelock import FileLock

from fastdiff.export import onnx as exporter


def once(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]
) -> tuple[Path, Any]:
    """A folder of the run, and what `make(folder)` returned in whichever worker filled it: JSON."""
    base = factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once" / name
    place.mkdir(parents=True, exist_ok=True)
    told = place / "told.json"
    with FileLock(place / "lock"):
        if not told.exists():
            folder = place / "made"
            shutil.rmtree(folder, ignore_errors=True)  # of a maker that failed
            folder.mkdir()
            told.write_text(json.dumps(make(folder)))
    return place / "made", json.loads(told.read_text())


@dataclass(frozen=True)
class Exported:
    """What `fastdiff export --onnx --out FOLDER --verify` made of `pipe`, and its document."""

    pipe: Any
    folder: Path
    document: dict[str, Any]
    progress: str


@pytest.fixture(scope="session")
def export_onnx(tmp_path_factory):
    """export_onnx(pipe, *arguments): `pipe` is what the arguments name."""

    def export(pipe, *arguments):
        def make(folder):
            out = folder / "out"
            code, document, progress = run_json(
                *("export", *arguments, "--onnx", "--out", out, "--verify")
            )
            assert code == 0, (document, progress)
            return [document, progress]

        name = "-".join(["onnx", *(str(word).strip("-") for word in arguments)])
        folder, told = once(tmp_path_factory, name, make)
        pipe.set_progress_bar_config(disable=True)
        return Exported(pipe, folder / "out", *told)

    return export


@pytest.fixture(scope="session")
def demo_export(demo, export_onnx):
    return export_onnx(demo)


@pytest.fixture(scope="session")
def demo_onnx(demo_export):
    """The demo pipeline as `fastdiff export --onnx` writes it; to be read alone."""
    return demo_export.folder


@pytest.fixture
def premade_onnx(demo_onnx, monkeypatch):
    """torch exports none of the demo's networks again, for tests of what comes after."""
    monkeypatch.setattr(exporter, "to_program", read_from(demo_onnx))


def read_from(folder):
    """What stands in for `to_program` of the networks that were exported to `folder`."""

    def program(part, opset):
        from onnxscript import ir

        return SimpleNamespace(model=ir.load(folder / part.file))

    return program
