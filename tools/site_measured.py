"""Pages of everything committed in benchmarks/results: a figure for each file, from its numbers.

A file of an unknown kind ends the build, because it would be missing on the pages.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdiff.regression.reports import svg
from tools.site_figures import Row, bars, dots, stacked
from tools.site_kernels import amount, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
OURS = "_kernel"
"""How the names of our kernels end."""
BLUE = "blue: our kernels"
MOST = 16
"""Kernels of a figure; the file has them all."""
VERDICTS = {
    "slower": svg.SLOWER,
    "faster": svg.FASTER,
    "inconclusive": svg.UNDECIDED,
    "same": svg.SAME,
}
INTRODUCTION = {
    "graph": "The launches of a step before norms added deferred sums, counted on tensors without"
    " memory. The present counts are in `benchmarks/static`.",
    "mutants": "Faults that `python -m tools.mutants` plants in a copy of the tree, and the test of"
    " `make test` that finds each.",
    "roofline": "The least time of each block of a picture on an H200, computed from counts, not"
    " measured.",
    "static": "What Triton makes of every case of every kernel, compiled without a GPU.",
}


def pages() -> dict[str, str]:
    """A page for each folder of results, by name, after a page that lists them."""
    folders = sorted(path for path in RESULTS.iterdir() if path.is_dir())
    made = {f"measured/{folder.name}.md": page(folder) for folder in folders}
    return {"measured/index.md": _index(folders)} | made


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.json"))


def figure(path: Path) -> str:
    """The figure of a committed file, and for some kinds a table."""
    document = json.loads(path.read_text("utf-8"))
    return _kind(path, document)(path.relative_to(RESULTS).as_posix(), document)


def _kind(path: Path, document: dict[str, Any]) -> Callable[[str, dict[str, Any]], str]:
    schema = document.get("schema", path.stem.partition("-")[0])
    if schema not in KINDS:
        raise ValueError(f"{path}: no figure is known for {schema!r}; add one to KINDS")
    return KINDS[schema]


def _index(folders: list[Path]) -> str:
    rows = []
    for folder in folders:
        own = files(folder)
        link = f"[{folder.name}]({folder.name}.md)"
        rows.append((link, len(own), ", ".join(path.stem for path in own)))
    return "\n\n".join(
        [
            "# Measured",
            "Every number on these pages is read from the files in `benchmarks/results` when the"
            " site is built, and each figure links to its file: machine, versions, commit, command"
            " and all samples are in it. Each folder is named after a machine or a kind of count.",
            table(("folder", "files", "of"), rows, words=3),
            "Absolute times of two machines are not compared. If a backend's error is more than"
            " twice eager's own, no speed is shown.",
        ]
    )


def page(folder: Path) -> str:
    """Everything that is committed in one folder of results."""
    parts = [f"# {folder.name}"]
    if folder.name in INTRODUCTION:
        parts.append(INTRODUCTION[folder.name])
    for notes in sorted(folder.rglob("README.md")):
        parts.append(f"[Notes of this run](../../{notes.relative_to(ROOT)})")
    for path in files(folder):
        document = json.loads(path.read_text("utf-8"))
        parts += [f"## {path.relative_to(folder).with_suffix('')}", _facts(document)]
        parts += [figure(path), f"[{path.name}](../../{path.relative_to(ROOT)})"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(document: dict[str, Any]) -> str:
    """What was measured, on which machine and at which commit, as far as the file says so."""
    rows = document.get("rows") or [{}]
    facts = [document.get("case") or rows[0].get("case")] if "machine" in document else []
    machine, versions = document.get("machine", {}), document.get("versions", {})
    if machine:
        gpu = machine.get("gpu")
        device = f"{gpu['name']} and " if gpu else ""
        facts.append(f"{device}{machine['cores']} cores of {machine['cpu']}")
    facts += [f"{name} {versions[name]}" for name in ("torch", "triton") if versions.get(name)]
    if document.get("commit"):
        facts.append(f"commit {document['commit']}")
    said = "; ".join(str(fact) for fact in facts if fact)
    command = document.get("command")
    return f"{said}." + (f"\n\n```sh\n{command}\n```" if command else "")


def _bench(name: str, document: dict[str, Any]) -> str:
    drawn, cells, absent = [], [], []
    for row in document["rows"]:
        if row.get("unavailable"):
            absent.append(f"{row['backend']}: {row['unavailable']}")
            continue
        if not row.get("samples_ms"):
            continue
        ratio, receipt = row.get("ratio_vs_eager"), row.get("receipt") or {}
        times = f"{ratio['median']:.2f} [{ratio['lo']:.2f}, {ratio['hi']:.2f}]" if ratio else ""
        speed = f"{row['steps_per_s']:.4g} steps/s"
        ours = row["backend"] == "fastdiff"
        drawn.append(Row(row["backend"], row["samples_ms"], speed, ours))
        psnr = receipt.get("psnr_db")
        cells.append(
            (
                row["backend"],
                f"{row['steps_per_s']:.4g}",
                times,
                f"{row['prepare_s']:.1f} s",
                "same" if receipt and psnr is None else "" if psnr is None else f"{psnr:.0f} dB",
                f"{receipt['err_vs_fp64']:.1e}" if receipt else "",
                f"{amount(row['peak_mem_bytes'])}B" if row.get("peak_mem_bytes") else "",
            )
        )
    head = ("backend", "steps/s", "× eager [95%]", "prepare", "PSNR", "step error", "peak memory")
    picture = dots(f"{name}: a step, each round", "ms a step; each dot is a round", drawn)
    return "\n\n".join([picture, table(head, cells), *absent])


def _graph(name: str, document: dict[str, Any]) -> str:
    rows = sorted(document["rows"], key=lambda row: -row["floor_ms"])
    drawn = [
        Row(row["kernel"], [row["floor_ms"]], f"{row['launches']} launches", _ours(row))
        for row in rows
    ]
    whole = (
        f"{document['case']}, on {document['gpu']}: {document['launches']} launches,"
        f" {amount(document['bytes'])}B, {amount(document['flops'])}FLOP, floor"
        f" {document['floor_ms']:.2f} ms."
    )
    return whole + "\n\n" + bars(f"{name}: floors by kernel", f"ms at the roofline; {BLUE}", drawn)


def _ours(row: dict[str, Any]) -> bool:
    return str(row["kernel"]).endswith(OURS)


def _roofline(name: str, document: dict[str, Any]) -> str:
    steps = document["steps"]
    drawn = [
        Row(
            row["block"],
            [row["floor_ms"] * (steps if row["per"] == "step" else 1)],
            f"{row['launches']} launches a {row['per']}, {row['bound']}",
            row["bound"] == "compute",
        )
        for row in document["rows"]
    ]
    title = f"{name}: floors of a picture with {steps} steps"
    axis = f"ms of a picture with {steps} steps; blue: bound by arithmetic, grey: by memory"
    return bars(title, axis, drawn)


def _trust(name: str, document: dict[str, Any]) -> str:
    kinds: dict[str, list[str]] = {}
    for run in document["runs"]:
        kinds.setdefault(run["kind"], []).extend(line["verdict"] for line in run["lines"])
    drawn = []
    for kind, said in kinds.items():
        counts = [said.count(verdict) for verdict in VERDICTS]
        label = ", ".join(
            f"{count} {verdict}" for count, verdict in zip(counts, VERDICTS, strict=True) if count
        )
        drawn.append(Row(kind, counts, label))
    title = f"{name}: verdicts of all rows, by planted change"
    words = (
        "The planted changes, and the verdict on every row of every run. [What it means](../ci.md)"
    )
    return words + "\n\n" + stacked(title, "verdicts", drawn, tuple(VERDICTS.values()))


def _choices(name: str, document: dict[str, Any]) -> str:
    groups: dict[str, list[float]] = {}
    for row in document["rows"]:
        medians = {who: statistics.median(times) for who, times in row["samples"].items()}
        if medians.get("eager") and medians.get(row["runs"]):
            ratio = medians["eager"] / medians[row["runs"]]
            groups.setdefault(f"{row['op']}, {row['dtype']}", []).append(ratio)
    drawn = [
        Row(group, sorted(values), f"{len(values)} sizes, median {statistics.median(values):.2f}")
        for group, values in sorted(groups.items())
    ]
    title = f"{name}: the chosen implementation against torch as diffusers calls it"
    axis = "speed relative to torch as diffusers calls it; each dot is a size of a model"
    return dots(title, axis, drawn, log=True, mark=1)


def _compiled(name: str, document: dict[str, Any]) -> str:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in document["rows"]:
        groups.setdefault(row["op"], []).append(row)
    drawn = []
    for op, rows in sorted(groups.items()):
        spilled = sum(row["spills"] > 0 for row in rows)
        label = f"{len(rows)} compiled, {spilled} spill" if spilled else f"{len(rows)} compiled"
        drawn.append(Row(op, [row["registers"] for row in rows], label))
    return dots(f"{name}: registers", "registers of a thread; each dot is a case", drawn)


def _ceilings(name: str, document: dict[str, Any]) -> str:
    parts = []
    for row in document["rows"]:
        unit = "TB/s" if row["ceiling"] == "copy" else "TFLOP/s"
        rates = [row["work"] / ms / 1e9 for ms in row["samples_ms"]]
        label = f"{statistics.median(rates):.4g} {unit}"
        title = f"{name}: {row['ceiling']}"
        parts.append(
            dots(title, f"{unit}; each dot is a round", [Row(row["ceiling"], rates, label)])
        )
    return "\n\n".join(parts)


def _profile(name: str, document: dict[str, Any]) -> str:
    parts = []
    for row in document["rows"]:
        kernels = sorted(row["kernels"], key=lambda kernel: -kernel["us"])
        busy = sum(kernel["us"] for kernel in kernels) / 1e3
        drawn = [
            Row(kernel["kernel"], [kernel["us"]], f"{kernel['launches']:.0f} ×", _ours(kernel))
            for kernel in kernels[:MOST]
        ]
        parts.append(
            f"**{row['backend']}**: a step takes {row['step_ms']:.2f} ms, its {len(kernels)}"
            f" kernels {busy:.2f} ms. The {len(drawn)} longest:"
        )
        parts.append(bars(f"{name}: kernels of {row['backend']}", f"µs a step; {BLUE}", drawn))
    return "\n\n".join(parts)


def _verify(name: str, document: dict[str, Any]) -> str:
    groups: dict[str, list[float]] = {}
    for row in document["rows"]:
        for _, error, allowed in row["errors"]:
            groups.setdefault(row["kernel"], []).append(error / allowed if allowed else 0.0)
    drawn = [
        Row(kernel, shares, f"{len(shares)} outputs, at most {max(shares):.0%}")
        for kernel, shares in sorted(groups.items())
    ]
    return dots(f"{name}: errors", "error / allowed error", drawn, mark=1)


def _batching(name: str, document: dict[str, Any]) -> str:
    groups: dict[str, list[float]] = {}
    for row in document["compared"]:
        groups.setdefault(row["scheduler"], []).append(row["errors"]["batch"] / row["allowed"])
    drawn = [
        Row(scheduler, shares, f"{len(shares)} requests, at most {max(shares):.2f}")
        for scheduler, shares in sorted(groups.items())
    ]
    told = (
        f"{len(document['compared'])} of {document['requests']} requests were compared."
        " [What is allowed](../batching.md#measured)"
    )
    axis = "error / what the budget allows; each dot is a request"
    return told + "\n\n" + dots(f"{name}: errors", axis, drawn, log=True, mark=1)


def _run(name: str, document: dict[str, Any]) -> str:
    parts = [row for row in document["rows"] if "part" in row]
    drawn = [Row(row["part"], [row["seconds"]], f"{row['seconds']:.0f} s") for row in parts]
    return bars(f"{name}: seconds", "seconds", drawn)


def _mutants(name: str, document: dict[str, Any]) -> str:
    rows = document["rows"]
    found = sum(row["test"] is not None for row in rows)
    cells = [(row["mutant"], row["file"], row["test"] or "nothing", row["seconds"]) for row in rows]
    told = f"{found} of the {len(rows)} planted faults are found."
    return told + "\n\n" + table(("fault", "in", "found by", "seconds"), cells, words=3)


KINDS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "fastdiff.batching-check/1": _batching,
    "fastdiff.bench/1": _bench,
    "fastdiff.mutants/1": _mutants,
    "fastdiff.graph/1": _graph,
    "fastdiff.roofline/1": _roofline,
    "fastdiff.static/1": _compiled,
    "fastdiff.cpu/1": _choices,
    # files that are older than their schema, by their names
    "trust": _trust,
    "ceilings": _ceilings,
    "profile": _profile,
    "verify": _verify,
    "run": _run,
}
