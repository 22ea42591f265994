"""export --trt builds engines; inspect describes the engines in a folder."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from fastdiff.errors import UserError

SCHEMA = "fastdiff.engines/1"


@dataclass(frozen=True)
class EngineOptions:
    """The options that only `--trt` takes, as they were given."""

    flavor: str | None
    target: str | None
    shapes: str | None
    static: str | None
    compatible: str | None
    timing_cache: Path | None

    def given(self) -> list[str]:
        """The names of the options that were given."""
        names = (name for name, value in vars(self).items() if value is not None)
        return [f"--{name.replace('_', '-')}" for name in names]


def write_engines(
    out: Path,
    asked: EngineOptions,
    load: Callable[[], tuple[Any, Any]],
    opset: int,
    dry_run: bool,
    json_file: Path | None,
) -> None:
    """Build engines in the new folder `out`, and show them.

    load: returns the pipeline and its parts.
    """
    from fastdiff.bench.progress import phases
    from fastdiff.engines import trt
    from fastdiff.export import shapes
    from fastdiff.export import trt as builder
    from fastdiff.export.folder import check_new
    from fastdiff.export.parts import left_out
    from fastdiff.recipes import side_of
    from fastdiff.written import afterwards, check_writable

    wanted = shapes.parse(asked.shapes, asked.static)
    compatible = tuple(asked.compatible.split(",")) if asked.compatible is not None else ()
    if unknown := [one for one in compatible if one not in trt.COMPATIBLE]:
        known = " or ".join(trt.COMPATIBLE)
        raise UserError(
            f"--compatible is {unknown[0]!r}; choose {known}, or both separated by a comma"
        )
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
        wanted = wanted or shapes.default(parts, side_of(pipe))
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
    with afterwards(json_file, lambda: json.dumps(document, indent=1) + "\n"):
        _show_all(document)
    if failed:
        raise typer.Exit(1)


def _show_all(document: dict[str, Any]) -> None:
    """Print what was built, or would be built, and what was left out."""
    would = "would write" if document["dry_run"] else "wrote"
    print(f"{would} {document['out']}, opset {document['opset']}, {document['shapes']}")
    for engine in document["engines"]:
        _show(f"{engine['target']}/{engine['part']}", engine)
    for name in document["left_out"]:
        print(f"left out: {name}, which has no engine")


def inspect_engines(folder: Path, json_file: Path | None) -> None:
    """Show what the engines in `folder` are. UserError if one is damaged, or does not fit the
    installed library."""
    from fastdiff.bench.progress import status
    from fastdiff.engines import manifest, trt
    from fastdiff.written import afterwards, check_writable

    if json_file:
        check_writable(json_file, "--json")

    found = {}
    with status() as log:
        for place in manifest.find(folder):
            log(f"{place}: reading")
            made = manifest.check(place)
            trt.library_of(place, made)
            found[str(place)] = made.to_dict()
    with afterwards(json_file, lambda: json.dumps(found, indent=1) + "\n"):
        for name, engine in found.items():
            _show(name, engine)


def _show(name: str, engine: dict[str, Any]) -> None:
    """Print a line for an engine, one for each input's shapes, and how far it is from torch."""
    size = f", {engine['plan_bytes'] / 1e6:.1f} MB" if "plan_bytes" in engine else ""
    built = f", {engine['build_seconds']:g} s" if "build_seconds" in engine else ""
    print(
        f"{name}: {engine['flavor']} {engine['version']} for"
        f" {' '.join([engine['target'], *engine['compatible']])}, {engine['dtype']}{size}{built}"
    )
    for profile in engine["profiles"]:
        for tensor, shapes in profile.items():
            low, best, high = (shapes[end] for end in ("min", "opt", "max"))
            print(f"  {tensor}: minimum {low}, optimum {best}, maximum {high}")
    if reason := engine.get("numeric_check_reason"):
        print(f"  not compared with torch: {reason.removeprefix('not run: ')}")
    if check := engine.get("numeric_check"):
        within = "within" if check["passed"] else "OUTSIDE"
        print(f"  compared with torch: {within} the allowed error")
