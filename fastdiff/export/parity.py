"""Verifies every exported file against torch in float64, at shapes it was not traced at."""

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.engines.ort import Session
from fastdiff.export import bisect, picture
from fastdiff.export.fault import Fault
from fastdiff.export.onnx import to_program
from fastdiff.export.parts import Part, draw
from fastdiff.export.picture import Run
from fastdiff.jsonable import finite
from fastdiff.kernels.contract import judge

SCHEMA = "fastdiff.parity/1"
RUNTIME = "ONNX Runtime on the CPU"
NOWHERE = (
    "no single operation; each is within its budget on the inputs it received, so their errors add "
    "up, or come from ONNX Runtime's fusions"
)
TIMESTEPS = (1.0, 499.5, 999.0)
LEAST_DB, LEAST_DB_HALF = 45.0, 30.0
"""The least PSNR of a whole picture, for full and half precision of the denoising network. It shows
that the files fit together; each one is verified by itself already."""
SEED = 1
COLUMNS = (
    *("network", "output", "worst of", "case", "max abs", "torch's", "allowed", "relative"),
    *("cosine", "verdict"),
)


@dataclass(frozen=True)
class Row:
    """One output at one shape: the file's largest error against float64, and its budget.

    torch_max_abs: the error of eager torch in the file's dtype on one thread, the worse of its two
    memory formats. allowed: twice that, plus twice the dtype's eps of the largest value.
    relative: max_abs divided by the largest value; cosine: between the whole output and the exact
    one.
    """

    part: str
    output: str
    case: str
    max_abs: float
    torch_max_abs: float
    allowed: float
    relative: float
    cosine: float

    @property
    def passed(self) -> bool:
        return self.max_abs <= self.allowed < math.inf  # if torch overflows, this proves nothing


@dataclass(frozen=True)
class Parity:
    """psnr_db: a whole picture with all networks in ONNX, against torch's; infinite if equal.

    faults: where each failed network departs from torch; None if no single operation does.
    """

    rows: tuple[Row, ...]
    psnr_db: float
    least_db: float = LEAST_DB
    faults: Mapping[str, Fault | None] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows) and self.psnr_db >= self.least_db


def verify(
    pipe: Any, parts: tuple[Part, ...], folder: Path, log: Callable[[str], object]
) -> Parity:
    """Compare every ONNX file of `folder`, run by ONNX Runtime on the CPU, with its torch source.

    UserError if ONNX Runtime cannot run a file: with bfloat16, for which it has no CPU convolution.
    """
    rows: list[Row] = []
    runs: dict[str, Run] = {}
    faults: dict[str, Fault | None] = {}
    for part in parts:
        log(f"{part.folder}: verifying")
        runs[part.folder] = run = Session(folder / part.file, torch.device("cpu"))
        rows += (own := verify_part(part, run))
        failed = {row.case for row in own if not row.passed}
        if failed:
            log(f"{part.folder}: out of budget, searching for the node")
            faults[part.folder] = _fault(part, folder / part.file, failed)
    log(f"drawing a picture of {picture.STEPS} steps, twice")
    half = any(part.dtype.itemsize < 4 for part in parts)
    least = LEAST_DB_HALF if half else LEAST_DB
    return Parity(tuple(rows), picture.psnr(pipe, parts, runs), least, faults)


@torch.no_grad()
def verify_part(part: Part, run: Run) -> list[Row]:
    """A row for each output at each of the part's cases, and at each timestep if it has one."""
    module = part.module if part.own is None else part.own
    exact_module = copy.deepcopy(module).double()
    channels_last: Any = copy.deepcopy(module)
    channels_last.to(memory_format=torch.channels_last)
    rows = []
    for case, drawn in cases(part):
        given = drawn.values()
        exact = exact_module(*(v.double() if v.is_floating_point() else v for v in given))
        with _one_thread():
            eager, other = module(*given), channels_last(*given)
        for port, *outputs in zip(part.outputs, run(drawn), eager, other, exact, strict=True):
            rows.append(_row(part.folder, port.name, case, *outputs))
    return rows


def cases(part: Part) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The inputs at which the part is verified, by name: the same each time."""
    generator = torch.Generator().manual_seed(SEED)
    for sizes in part.cases:
        drawn = {port.name: draw(port, sizes, part.net.config, generator) for port in part.inputs}
        name = "×".join(str(size) for size in sizes.values())
        if "timestep" not in drawn:
            yield name, drawn
            continue
        for step in TIMESTEPS:
            timestep = torch.full_like(drawn["timestep"], step * part.unit)
            yield f"{name}, t={step:g}", drawn | {"timestep": timestep}


def _fault(part: Part, file: Path, failed: Collection[str]) -> Fault | None:
    """The fault, found at the smallest failed case; exports the part once more."""
    inputs = min(
        (drawn for name, drawn in cases(part) if name in failed),
        key=lambda drawn: sum(value.numel() for value in drawn.values()),
    )
    return bisect.find(part, file, inputs, to_program(part, bisect.opset(file)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch's sums depend on the number of threads, and its error sets our budget."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def to_dict(parity: Parity) -> dict[str, Any]:
    """Schema `fastdiff.parity/1`; non-finite values become null."""
    document = {
        "schema": SCHEMA,
        "runtime": RUNTIME,
        "passed": parity.passed,
        "psnr_db": parity.psnr_db,
        "least_psnr_db": parity.least_db,
        "picture": {"prompt": picture.PROMPT, "steps": picture.STEPS, "seed": 0},
        "rows": [asdict(row) | {"passed": row.passed} for row in parity.rows],
        "faults": {
            name: None if fault is None else asdict(fault) for name, fault in parity.faults.items()
        },
    }
    told: dict[str, Any] = finite(document)
    return told


def worst(parity: Parity) -> list[tuple[Row, int]]:
    """For each output, the row nearest to or furthest beyond its budget, and its row count."""
    by_output: dict[tuple[str, str], list[Row]] = {}
    for row in parity.rows:
        by_output.setdefault((row.part, row.output), []).append(row)
    return [(max(rows, key=_strain), len(rows)) for rows in by_output.values()]


def to_markdown(parity: Parity) -> str:
    """A table of every output's worst case, with a legend."""
    lines = [
        "# Parity",
        "",
        f"{RUNTIME}, which computes fp16 in float32 between casts. Each output is shown at the",
        "case nearest to its budget, or furthest beyond it. Errors are against torch in float64 on",
        "the same inputs. *torch's* is eager torch in the file's dtype on one thread, the worse of",
        "its two memory formats; *allowed* is twice that plus twice eps times the largest value.",
        "*Case* is batch×height×width(×tokens), or batch×tokens; packed latents have one number of",
        "tokens for height×width.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for row, count in worst(parity):
        cells = (
            *(row.part, row.output, str(count), row.case),
            *(f"{error:.2e}" for error in (row.max_abs, row.torch_max_abs, row.allowed)),
            *(f"{row.relative:.1e}", f"{row.cosine:.9f}", "ok" if row.passed else "**FAILED**"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    drawn = f"A picture of {picture.STEPS} steps, every network ONNX, against torch"
    needed = f"at least {parity.least_db:g} dB is required"
    lines += ["", f"{drawn}: {_psnr_text(parity.psnr_db)}; {needed}.", ""]
    for name, fault in parity.faults.items():
        lines += [f"{name} departs from torch at {fault or NOWHERE}.", ""]
    return "\n".join(lines)


def _psnr_text(psnr_db: float) -> str:
    if math.isfinite(psnr_db):
        return f"{psnr_db:.0f} dB PSNR"
    return "the same" if psnr_db > 0 else "not finite"


def _strain(row: Row) -> float:
    return row.max_abs / row.allowed if row.allowed else row.max_abs


def _row(
    part: str, name: str, case: str, got: Tensor, eager: Tensor, other: Tensor, exact: Tensor
) -> Row:
    if got.shape != exact.shape:
        got = torch.full_like(eager, math.nan)
    verdict = max(
        (judge(name, got, torchs, exact) for torchs in (eager, other)), key=lambda v: v.eager_error
    )
    ours, truth = got.double().flatten(), exact.flatten()
    largest = float(truth.abs().max())
    return Row(
        part=part,
        output=name,
        case=case,
        max_abs=verdict.error,
        torch_max_abs=verdict.eager_error,
        allowed=verdict.allowed,
        relative=verdict.error / largest if largest else verdict.error,
        cosine=float(torch.nn.functional.cosine_similarity(ours, truth, dim=0)),
    )
