"""Writes a pipeline's networks as ONNX files, in the folder layout that Optimum reads."""

import inspect
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdiff import installed
from fastdiff.engines import exported, fingerprint
from fastdiff.errors import UserError
from fastdiff.export import fused
from fastdiff.export.folder import config_of, new_folder, versions, write_beside, write_json
from fastdiff.export.parts import Part, draw, left_out

OPSETS = range(18, 24)
ORT_OPSET = 20
"""From 21 on GroupNormalization is a separate op, for which ONNX Runtime has no kernel and which
it splits up; at 20 it is an InstanceNormalization, which ONNX Runtime runs and fuses."""
TRT_OPSET = 22
"""As a separate op, GroupNormalization becomes one normalization layer in TensorRT. 21 would be
enough, except for bfloat16."""
BF16_OPSET = 22
"""The first opset whose convolutions take bfloat16."""
EXTERNAL_ABOVE = 100_000_000
"""Bytes above which weights go to a separate file. Runtimes map such a file, but copy weights
inside the ONNX file; and protobuf is limited to 2 GiB."""


@dataclass(frozen=True)
class Written:
    """One ONNX file: size and hash, both including separate weights, and the seconds it took.

    fused: names of the nodes that only ONNX Runtime's CUDA provider computes.
    """

    part: Part
    bytes: int
    sha256: str
    seconds: float
    fused: tuple[str, ...] = ()


def check_opset(value: str, auto: int, dtype: torch.dtype) -> int:
    """The opset for `--opset`; "auto" means `auto`. UserError if unknown or without `dtype`."""
    half = dtype is torch.bfloat16
    known = OPSETS[OPSETS.index(BF16_OPSET) :] if half else OPSETS
    if value == "auto":
        return max(auto, known[0])
    if value.isdecimal() and int(value) in known:
        return int(value)
    which = " for bf16" if half else ""
    raise UserError(f"--opset is {value!r}; choose auto or {known[0]} to {known[-1]}{which}")


def check_packages(verify: bool) -> None:
    """UserError naming a package that export, or verify, needs and that is not installed."""
    for package in ("onnx", "onnxscript", *(("onnxruntime",) if verify else ())):
        try:
            __import__(package)
        except ImportError as error:
            how = installed.pip("onnx")
            raise UserError(f"export needs {package} ({error}); {how}") from error


def export(
    pipe: Any,
    parts: tuple[Part, ...],
    out: Path,
    opset: int,
    log: Callable[[str], object],
    ort_fused: bool = False,
) -> tuple[Written, ...]:
    """Write every part and the files beside them into the new folder `out`: all or nothing.

    UserError if a network cannot be exported, if fusing was requested but nothing can be fused,
    or if the folder cannot be written.
    """
    with new_folder(out) as folder:
        written = tuple(write(part, folder, opset, log, ort_fused) for part in parts)
        if ort_fused and not any(made.fused for made in written):
            raise UserError(
                "no GroupNorm here fits ONNX Runtime's kernel; export without --ort-fused"
            )
        write_beside(pipe, folder, left_out(pipe))
        write_json(folder / exported.FILE, document(parts, opset, written))
    return written


def document(
    parts: tuple[Part, ...], opset: int, written: tuple[Written, ...] = ()
) -> dict[str, Any]:
    """Schema `fastdiff.export/1`: files, tensors, source weights, versions; sizes once written."""
    rows: list[dict[str, Any]] = []
    for part in parts:
        rows.append(
            {
                "file": part.file,
                "dtype": str(part.dtype).removeprefix("torch."),
                "network_sha256": fingerprint.of_network(part.source),
                "inputs": {port.name: [port.dtype, *port.shape] for port in part.inputs},
                "outputs": {port.name: [port.dtype, *port.shape] for port in part.outputs},
            }
        )
    for row, made in zip(rows, written, strict=False):
        row |= {"bytes": made.bytes, "sha256": made.sha256, "seconds": round(made.seconds, 1)}
        if made.fused:
            row["contrib_ops"] = {fused.OPERATOR: list(made.fused)}
    return {"schema": exported.SCHEMA, "opset": opset, "versions": versions(), "parts": rows}


def to_program(part: Part, opset: int) -> Any:
    """The part as torch's ONNXProgram; its `model` is an onnx_ir Model of standard ops.

    UserError if torch cannot export it.
    """
    generator = torch.Generator().manual_seed(0)
    arguments = tuple(draw(port, part.example, part.net.config, generator) for port in part.inputs)
    named = _named(part)
    free: list[Any] = [
        {i: side for i, side in enumerate(port.shape) if isinstance(side, str)} or None
        for port in part.inputs
    ]
    try:
        with torch.no_grad(), _quiet():
            program: Any = torch.onnx.export(
                part.module,
                arguments,
                dynamo=True,
                opset_version=opset,
                input_names=[port.name for port in part.inputs],
                output_names=[port.name for port in part.outputs],
                dynamic_shapes=(*free[:named], *([tuple(free[named:])] if free[named:] else [])),
                verbose=False,
            )
    except Exception as error:  # any operator of any torch version may fail
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{part.folder} cannot be exported: {reason}") from error
    model = program.model
    if (got := model.opset_imports.get("")) != opset:
        raise UserError(f"{part.folder} comes out at opset {got}, not {opset}; try --opset auto")
    for value, port in zip(model.graph.outputs, part.outputs, strict=True):
        value.shape = type(value.shape)(port.shape)  # torch's shapes are formulas
    return program


def write(
    part: Part, folder: Path, opset: int, log: Callable[[str], object], ort_fused: bool = False
) -> Written:
    """Write and check `folder/<part>/model.onnx`, and write the config.json beside it."""
    import onnx
    from onnxscript import ir

    log(f"{part.folder}: exporting, opset {opset}")
    start = time.perf_counter()
    model = to_program(part, opset).model
    names = fused.fuse(model) if ort_fused else ()
    place = folder / part.folder
    place.mkdir()
    file = place / "model.onnx"
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    ir.save(model, file, external_data="model.onnx_data" if weights > EXTERNAL_ABOVE else None)
    log(f"{part.folder}: checking")
    onnx.checker.check_model(str(file), full_check=True)
    write_json(place / "config.json", config_of(part.net))
    size = sum(path.stat().st_size for path in exported.files_of(file))
    return Written(part, size, exported.sha256_of(file), time.perf_counter() - start, names)


def _named(part: Part) -> int:
    """How many inputs the module takes as named parameters; it takes the rest as one tuple."""
    given = inspect.signature(part.module.forward).parameters.values()
    return sum(one.kind is one.POSITIONAL_OR_KEYWORD for one in given)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's advice (no torchvision, names of shapes) in this block."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
