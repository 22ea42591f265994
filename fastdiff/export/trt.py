"""Builds a pipeline's networks as TensorRT engines: one folder for each target GPU."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastdiff.engines import exported, fingerprint, trt
from fastdiff.engines.bound import Engine
from fastdiff.engines.manifest import FILE, PLAN, Manifest, Profile
from fastdiff.engines.monitor import Watch
from fastdiff.engines.trt_engine import TrtEngine
from fastdiff.errors import UserError
from fastdiff.export import onnx, parity
from fastdiff.export.folder import new_folder, versions, write_beside, write_json
from fastdiff.export.parts import Part, left_out
from fastdiff.export.picture import run_of
from fastdiff.export.shapes import Shapes, profiles

ATTENTION_OPSET = 23
"""From this opset on attention is one op, which TensorRT takes only in half precision."""


@dataclass(frozen=True)
class Request:
    """The requested engines. flavor: not "auto"; compatible, timing_cache: see `trt.Order`."""

    flavor: str
    targets: tuple[str, ...]
    shapes: Shapes
    opset: int
    compatible: tuple[str, ...] = ()
    timing_cache: Path | None = None


def check(parts: Sequence[Part], request: Request) -> dict[str, Profile]:
    """Each part's profile, by its folder. UserError for a request that no library can build."""
    for part in parts:
        if request.opset >= ATTENTION_OPSET and part.dtype is torch.float32:
            raise UserError(
                f"--opset {request.opset} has an attention op that TensorRT takes in fp16 and bf16"
                f" only, and {part.folder} is in fp32; give --opset auto"
            )
    return profiles(parts, request.shapes)


def export(
    pipe: Any,
    parts: Sequence[Part],
    out: Path,
    request: Request,
    log: Callable[[str], object],
    watch: Watch,
) -> tuple[Manifest, ...]:
    """Build every part for every target into the new folder `out`: all or nothing.

    `out/<target>/<part>` gets plan and manifest, `out/<part>` the config.json, `out` the files
    beside the networks. The ONNX files are made on the way and not kept.

    UserError if a part cannot be exported or built, or the folder cannot be written.
    """
    shapes = check(parts, request)
    made: list[Manifest] = []
    with new_folder(out) as folder:
        for part in parts:
            onnx.write(part, folder, request.opset, log)
            made += engines(part, folder, request, shapes[part.folder], log, watch)
            for file in exported.files_of(folder / part.file):
                file.unlink()
        write_beside(pipe, folder, left_out(pipe))
    return tuple(made)


def planned(part: Part, profile: Profile, target: str, request: Request) -> dict[str, Any]:
    """The parts of an engine's manifest that are known before it is built."""
    return {
        "part": part.folder,
        "flavor": request.flavor,
        "version": trt.library(request.flavor).__version__,
        "target": target,
        "compatible": list(request.compatible),
        "dtype": str(part.dtype).removeprefix("torch."),
        "opset": request.opset,
        "inputs": {port.name: [port.dtype, *port.shape] for port in part.inputs},
        "outputs": {port.name: [port.dtype, *port.shape] for port in part.outputs},
        "profiles": [profile],
    }


def engines(
    part: Part,
    folder: Path,
    request: Request,
    profile: Profile,
    log: Callable[[str], object],
    watch: Watch,
) -> Iterator[Manifest]:
    """Build a part, whose ONNX file is in `folder`, for every target."""
    source = folder / part.folder
    file = source / "model.onnx"
    hashes: dict[str, Any] = {
        "onnx_sha256": exported.sha256_of(file),
        "config_sha256": fingerprint.of_files(source / "config.json"),
        "network_sha256": fingerprint.of_network(part.source),
    }
    gpu = trt.here()
    for target in request.targets:
        log(f"{part.folder}: building for {target}")
        start = time.perf_counter()
        order = trt.Order(target, profile, request.compatible, request.timing_cache)
        plan = trt.build(request.flavor, file, order, watch)
        seconds = time.perf_counter() - start
        place = folder / target / part.folder
        place.mkdir(parents=True)
        (place / PLAN).write_bytes(plan)
        manifest = Manifest(
            **planned(part, profile, target, request),
            **hashes,
            plan_bytes=plan.nbytes,
            plan_sha256=hashlib.sha256(plan).hexdigest(),
            numeric_check=None,
            numeric_check_reason=f"not run: built for {target} on a machine with {gpu or 'no GPU'}",
            build_seconds=round(seconds, 1),
            versions=versions(),
        )
        write_json(place / FILE, manifest.to_dict())
        if target == gpu:
            log(f"{part.folder}: running")
            numbers = _numbers(part, profile, TrtEngine(place, torch.device("cuda", 0)))
            manifest = replace(manifest, numeric_check=numbers, numeric_check_reason=None)
            write_json(place / FILE, manifest.to_dict())
        yield manifest


def _numbers(part: Part, profile: Profile, engine: Engine) -> dict[str, Any]:
    """An engine's outputs at its minimum shapes against torch's: rows as for `--verify`."""
    least = part.sizes({name: ends["min"] for name, ends in profile.items()})
    rows = parity.verify_part(replace(part, cases=(least,)), run_of(engine, part))
    return {"passed": all(row.passed for row in rows), "rows": [asdict(row) for row in rows]}
