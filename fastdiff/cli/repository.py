"""export --triton-repo: a pipeline, or its export, as a Triton Inference Server's repository."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastdiff.errors import UserError


def write_repository(
    folder: Path | None,
    out: Path,
    asked: list[str],
    target: str | None,
    load: Callable[[], tuple[Any, Any]],
    opset: int,
    dry_run: bool,
    json_file: Path | None,
) -> None:
    """Make the repository `out` and show it.

    folder: an exported folder to serve; otherwise what `load` returns is exported to ONNX first.
    asked: the given options that only a pipeline takes; with an exported folder they are an error.
    target: the GPU architecture whose engines to serve.
    load: returns the pipeline and its parts.
    """
    from fastdiff.bench.progress import status
    from fastdiff.export import onnx as exporter
    from fastdiff.export import triton
    from fastdiff.export.folder import check_new, new_folder
    from fastdiff.written import afterwards

    triton.check_packages()
    check_new(out)
    with status() as log:
        if folder and triton.is_exported(folder):
            if asked:
                raise UserError(f"{folder} is exported already; leave out {asked[0]}")
            found = triton.read(folder, target)
            if not dry_run:
                with new_folder(out) as place:
                    triton.fill(place, folder, found, shutil.copyfile)
        else:
            if target:
                raise UserError("--target needs a folder that --trt made, or --trt itself")
            log("loading")
            pipe, networks = load()
            found = triton.models(exporter.document(networks, opset))
            if not dry_run:
                with new_folder(out) as place, TemporaryDirectory(dir=place) as scratch:
                    source = Path(scratch, "onnx")
                    exporter.export(pipe, networks, source, opset, log)
                    triton.fill(place, source, found, Path.rename)
    document = triton.document(found) | {"out": str(out), "dry_run": dry_run}
    with afterwards(json_file, lambda: json.dumps(document, indent=1) + "\n"):
        _show(document)


def _show(document: dict[str, Any]) -> None:
    """Print a line for each model, and how to serve them."""
    print(f"{'would write' if document['dry_run'] else 'wrote'} {document['out']}")
    for model in document["models"]:
        batch = f"batches of up to {n}" if (n := model["max_batch_size"]) else "no batching"
        print(f"{model['name']}: {model['backend']}, {batch}")
    print(f"to serve it: tritonserver --model-repository={document['out']}")
