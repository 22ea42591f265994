"""export --trt and inspect: engines that are built, and engines that lie in a folder."""

import json as json_module
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from fastdiff.errors import UserError
from fastdiff.recipes import denoiser

SCHEMA = "fastdiff.engines/1"


@dataclass(frozen=True)
class EngineOptions:
    """What only `--trt` takes, as it was given."""

    flavor: str | None
    target: str | None
    shapes: str | None
    static: str | None
    compatible: str | None
    timing_cache: Path | None

    def given(self) -> list[str]:
        """The options that were."""
        names = (name for name, value in vars(self).items() if value is not None)
        return [f"--{name.replace('_', '-')}" for name in names]


def write_engines(
    out: Path,
    asked: EngineOptions,
    load: Callable[[], tuple[Any, Any]],
    opset: int,
    dry_run: bool,
    json: bool,
) -> None:
    """Build, and print, the engines in the new folder `out` of what `load` gives.

    load: the pipeline and its parts.
    """
    from fastdiff.bench.progress import phases
    from fastdiff.engines import trt
    from fastdiff.export import shapes
    from fastdiff.export import trt as builder
    from fastdiff.export.folder import check_new
    from fastdiff.export.parts import left_out
    from fastdiff.written import check_writable

    wanted = shapes.parse(asked.shapes, asked.static)
    compatible = tuple(asked.compatible.split(",")) if asked.compatible is not None else ()
    if unknown := [one for one in compatible if one not in trt.COMPATIBLE]:
        known = " or ".join(trt.COMPATIBLE)
        raise UserError(f"--compatible is {unknown[0]!r}; choose {known}, or both with a comma")
    if asked.timing_cache is not None:
        check_writable(asked.timing_cache, "--timing-cache")
    named = asked.target.split(",") if asked.target is not None else ()
    flavor, targets = trt.choose(asked.flavor or "auto", named)
    for one in targets:
        trt.check(flavor, trt.Order(one, {}, compatible, asked.timing_cache))
    check_new(out)
    with phases() as progress:
        progress.log("loading")
        pipe, parts = load()
        wanted = wanted or shapes.default(parts, denoiser(pipe).config.sample_size)
        request = builder.Request(flavor, targets, wanted, opset, compatible, asked.timing_cache)
        profiles = builder.check(parts, request)
        if dry_run:
            rows = [
                builder.planned(part, profiles[part.folder], target, request)
                for part in parts
                for target in targets
            ]
        else:
            made = builder.export(pipe, parts, out, request, progress.log, progress)
            rows = [manifest.to_dict() for manifest in made]
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "out": str(out),
            "dry_run": dry_run,
            "opset": opset,
            "shapes": str(wanted),
            "left_out": left_out(pipe),
            "engines": rows,
        }
    numbers = [engine.get("numeric_check") for engine in document["engines"]]
    failed = any(check is not None and not check["passed"] for check in numbers)
    if json:
        print(json_module.dumps(document, indent=1))
    else:
        _show_all(document)
    if failed:
        raise typer.Exit(1)


def _show_all(document: dict[str, Any]) -> None:
    """What was built, or would be, and what was left out."""
    would = "would write" if document["dry_run"] else "wrote"
    print(f"{would} {document['out']}, opset {document['opset']}, {document['shapes']}")
    for engine in document["engines"]:
        _show(f"{engine['target']}/{engine['part']}", engine)
    for name in document["left_out"]:
        print(f"left out: {name}, which has no engine")


def inspect_engines(folder: Path, json: bool) -> None:
    """Print what the engines in `folder` are. UserError where one is damaged, or not for the
    library that is installed."""
    from fastdiff.bench.progress import status
    from fastdiff.engines import manifest, trt

    found = {}
    with status() as log:
        for place in manifest.find(folder):
            log(f"{place}: reading")
            made = manifest.check(place)
            trt.library_of(place, made)
            found[str(place)] = made.to_dict()
    if json:
        print(json_module.dumps(found, indent=1))
        return
    for name, engine in found.items():
        _show(name, engine)


def _show(name: str, engine: dict[str, Any]) -> None:
    """A line for an engine, one for each of its inputs' shapes, and what was checked."""
    size = f", {engine['plan_bytes'] / 1e6:.1f} MB" if "plan_bytes" in engine else ""
    built = f", {engine['build_seconds']:g} s" if "build_seconds" in engine else ""
    print(
        f"{name}: {engine['flavor']} {engine['version']} for"
        f" {' '.join([engine['target'], *engine['compatible']])}, {engine['dtype']}{size}{built}"
    )
    for profile in engine["profiles"]:
        for tensor, shapes in profile.items():
            ends = " to ".join(str(shapes[end]) for end in ("min", "max"))
            print(f"  {tensor}: {ends}, best at {shapes['opt']}")
    if reason := engine.get("numeric_check_reason"):
        print(f"  numbers: {reason}")
    if numbers := engine.get("numeric_check"):
        print(f"  numbers: {'within' if numbers['passed'] else 'OUT OF'} torch's own budget")
