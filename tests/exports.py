"""Exports that several test files read and none changes: each is made once per test run.

xdist gives every worker its own session fixtures. These exports lie in a folder that all workers
share; the worker that asks first makes one while the others wait.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import run_json
from filelock import FileLock

from fastdiff.export import onnx as exporter
from fastdiff.export.parts import Part, parts


def once(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]
) -> tuple[Path, Any]:
    """A folder that all workers share, and what `make(folder)` returned, as JSON, when the first
    worker filled it."""
    base = factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once" / name
    place.mkdir(parents=True, exist_ok=True)
    returned = place / "returned.json"
    with FileLock(place / "lock"):
        if not returned.exists():
            folder = place / "made"
            shutil.rmtree(folder, ignore_errors=True)  # left by a `make` that failed
            folder.mkdir()
            returned.write_text(json.dumps(make(folder)))
    return place / "made", json.loads(returned.read_text())


@dataclass(frozen=True)
class Exported:
    """What `fastdiff export --onnx --out FOLDER --verify` wrote for `pipe`, and its JSON document.

    arguments: those of the command that name the pipeline.
    """

    pipe: Any
    arguments: tuple[Any, ...]
    folder: Path
    document: dict[str, Any]
    progress: str


def shrunken(demo: Any) -> Any:
    """The demo with smaller networks, which torch exports in a third of the time. The U-Net still
    has two levels, one of which attends to the text; the text encoder still has several layers."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from small import TINY, noisy

    config = copy.deepcopy(demo.text_encoder.config)
    config.num_hidden_layers = 2
    encoder = type(demo.text_encoder)(config)
    unet = UNet2DConditionModel(**TINY | {"sample_size": 16, "cross_attention_dim": 128})
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=32,
    )
    parts = {"text_encoder": noisy(encoder), "unet": noisy(unet), "vae": noisy(vae)}
    pipe = StableDiffusionPipeline(**demo.components | parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def export_onnx(tmp_path_factory):
    """export_onnx(name, pipe, *arguments): export `pipe`, which the command's arguments name."""

    def export(name, pipe, *arguments):
        def make(folder):
            out = folder / "out"
            code, document, progress = run_json(
                *("export", *arguments, "--onnx", "--out", out, "--verify")
            )
            assert code == 0, (document, progress)
            return [document, progress]

        folder, returned = once(tmp_path_factory, f"onnx-{name}", make)
        pipe.set_progress_bar_config(disable=True)
        return Exported(pipe, arguments, folder / "out", *returned)

    return export


@pytest.fixture(scope="session")
def small_demo(demo):
    """A Stable Diffusion that is exported in a third of the demo's time; tests take deep copies."""
    return shrunken(demo)


@pytest.fixture(scope="session")
def small_folder(small_demo, tmp_path_factory):
    """The folder that `small_demo` is saved in."""

    def make(folder):
        small_demo.save_pretrained(folder)

    return once(tmp_path_factory, "small", make)[0]


@pytest.fixture(scope="session")
def small_export(small_demo, small_folder, export_onnx):
    return export_onnx("small", small_demo, small_folder)


@pytest.fixture(scope="session")
def small_onnx(small_export):
    """`small_demo` as `fastdiff export --onnx` writes it; tests only read it."""
    return small_export.folder


@pytest.fixture
def premade_onnx(small_onnx, monkeypatch):
    """For tests of what follows torch's export: it is replaced by reading the networks of
    `small_demo` from `small_onnx`."""
    monkeypatch.setattr(exporter, "to_program", read_from(small_onnx))


def written(pipe: Any) -> tuple[Part, ...]:
    """The parts of a pipeline for an export without its autoencoder, which is exported as SD's
    is."""
    return tuple(part for part in parts(pipe, torch.float32) if "vae" not in part.folder)


@pytest.fixture(scope="module")
def out(pipe, tmp_path_factory):
    """The folder with the files of what is `written` of a module's own `pipe`."""
    folder = tmp_path_factory.mktemp("out") / "files"
    exporter.export(pipe, written(pipe), folder, exporter.ORT_OPSET, print)
    return folder


def transformer(pipe: Any) -> tuple[Part, ...]:
    """The part of a pipeline's transformer, for an export of it alone: the other parts are exported
    as SD's and SD3's are."""
    found = parts(pipe, pipe.transformer.dtype)
    return tuple(part for part in found if part.folder == "transformer")


def read_from(folder):
    """A replacement of `to_program` that reads the networks that were exported to `folder`."""

    def program(part, opset):
        from onnxscript import ir

        return SimpleNamespace(model=ir.load(folder / part.file))

    return program
