"""A new folder, written whole or not at all, and the files beside the networks in it."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastdiff import installed
from fastdiff.errors import UserError
from fastdiff.written import told

PACKAGES = ("fastdiff", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")


def check_new(out: Path) -> None:
    """UserError unless `out` can become a new folder; checks before minutes of work, not after."""
    parent = out.absolute().parent
    with told(out):  # the name may be too long, or a parent folder closed to us
        there, has_parent = out.exists() or out.is_symlink(), parent.is_dir()
    if there:
        raise UserError(f"{out} exists already; give another name, or remove it first")
    if not has_parent:
        raise UserError(f"{out}: the folder {parent} does not exist; make it first")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{out}: the folder {parent} cannot be written to")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` to fill, which is renamed to `out` when the block succeeds.

    What a killed process left behind is removed by the next one. UserError if `out` exists already,
    another process is writing it, or the disk is full.
    """
    check_new(out)
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial")
    with told(out):
        if partial.is_symlink():  # do not empty the folder it points to
            raise UserError(f"{partial} is a link; remove it first")
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            _take(lock, partial, out)
            try:
                yield partial
                partial.rename(out)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        finally:
            os.close(lock)


def _take(lock: int, partial: Path, out: Path) -> None:
    """Lock the folder until this process ends, and empty it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing {out}; give another name") from None
    if not partial.exists() or os.fstat(lock).st_ino != partial.stat().st_ino:
        # the other process finished after we opened it and before we locked it
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out))
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """`value` as indented JSON; refuses NaN, which JSON does not have."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def config_of(owner: Any) -> dict[str, Any]:
    """A config as its library writes it, without the folder that it was read from."""
    # transformers' configs have it
    writer = owner if hasattr(owner, "to_json_string") else owner.config
    config: dict[str, Any] = json.loads(writer.to_json_string())
    config.pop("_name_or_path", None)
    return config


def write_beside(pipe: Any, folder: Path, left_out: tuple[str, ...]) -> None:
    """Scheduler, tokenizers and feature extractor as their libraries save them, and the index.

    `left_out`: components to mark as absent in the index.
    """
    for name, component in pipe.components.items():
        if not isinstance(component, torch.nn.Module) and hasattr(component, "save_pretrained"):
            component.save_pretrained(folder / name)
            if backend := getattr(component, "backend_tokenizer", None):
                backend.model.save(str(folder / name))  # vocab.json, which transformers 4 needs
    index = config_of(pipe) | {name: [None, None] for name in left_out}
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    write_json(folder / "model_index.json", index)


def versions() -> dict[str, str | None]:
    """Versions of the packages that affect an exported file; None for one that is not installed."""
    return installed.versions(PACKAGES)
