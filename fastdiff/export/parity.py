"""The proof: every exported file against torch in float64, at shapes it was not traced at."""

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
    "no one operation, each being within its budget on the inputs it was given: their errors add "
    "up, or come only of what ONNX Runtime fuses"
)
TIMESTEPS = (1.0, 499.5, 999.0)
LEAST_DB, LEAST_DB_HALF = 45.0, 30.0
"""Of the whole picture, by the U-Net's dtype: that the files fit together, since each is judged by
itself already."""
SEED = 1
COLUMNS = (
    *("network", "output", "worst of", "case", "max abs", "torch's", "allowed", "relative"),
    *("cosine", "verdict"),
)


@dataclass(frozen=True)
class Row:
    """One output at one shape: the file's largest error against float64, and what it may be.

    torch_max_abs: of eager torch in the file's dtype on one thread, the worse of its two memory
    formats. allowed: twice that and twice the dtype's eps of the largest value.
    relative: max_abs by the largest value; cosine: of the whole output with the exact one.
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
        return self.max_abs <= self.allowed < math.inf  # where torch overflows, it proves nothing


@dataclass(frozen=True)
class Parity:
    """psnr_db: of a whole picture, all networks ONNX, against torch's; infinite where equal.

    faults: where a network that failed parts from torch; None where no one operation does.
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
    """Run every ONNX file of `folder` in ONNX Runtime on the CPU against the torch it came from.

    UserError where ONNX Runtime cannot run a file, as with bfloat16, which its CPU has no
    convolution for.
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
            log(f"{part.folder}: out of budget, looking for the node")
            faults[part.folder] = _fault(part, folder / part.file, failed)
    log(f"drawing a picture of {picture.STEPS} steps, twice")
    half = any(part.dtype.itemsize < 4 for part in parts)
    least = LEAST_DB_HALF if half else LEAST_DB
    return Parity(tuple(rows), picture.psnr(pipe, parts, runs), least, faults)


@torch.no_grad()
def verify_part(part: Part, run: Run) -> list[Row]:
    """A row for each output at each of the part's cases, and timesteps where it has them."""
    exact_module = copy.deepcopy(part.module).double()
    channels_last: Any = copy.deepcopy(part.module)
    channels_last.to(memory_format=torch.channels_last)
    rows = []
    for case, drawn in cases(part):
        given = drawn.values()
        exact = exact_module(*(v.double() if v.is_floating_point() else v for v in given))
        with _one_thread():
            eager, other = part.module(*given), channels_last(*given)
        for port, *outputs in zip(part.outputs, run(drawn), eager, other, exact, strict=True):
            rows.append(_row(part.folder, port.name, case, *outputs))
    return rows


def cases(part: Part) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What the part is verified at, by name: the same inputs each time."""
    generator = torch.Generator().manual_seed(SEED)
    for sizes in part.cases:
        drawn = {port.name: draw(port, sizes, part.net.config, generator) for port in part.inputs}
        name = "×".join(str(size) for size in sizes.values())
        if "timestep" not in drawn:
            yield name, drawn
            continue
        for step in TIMESTEPS:
            timestep = torch.full_like(drawn["timestep"], step)
            yield f"{name}, t={step:g}", drawn | {"timestep": timestep}


def _fault(part: Part, file: Path, failed: Collection[str]) -> Fault | None:
    """Found at the smallest of the cases that failed; exports the part once more."""
    inputs = min(
        (drawn for name, drawn in cases(part) if name in failed),
        key=lambda drawn: sum(value.numel() for value in drawn.values()),
    )
    return bisect.find(part, file, inputs, to_program(part, bisect.opset(file)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch adds up otherwise on every number of threads, and its error is what ours is held to."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def to_dict(parity: Parity) -> dict[str, Any]:
    """Schema `fastdiff.parity/1`; what is not finite as null."""
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
    """For each output its row nearest to, or furthest beyond, its budget; and of how many."""
    by_output: dict[tuple[str, str], list[Row]] = {}
    for row in parity.rows:
        by_output.setdefault((row.part, row.output), []).append(row)
    return [(max(rows, key=_strain), len(rows)) for rows in by_output.values()]


def to_markdown(parity: Parity) -> str:
    """The worst case of every output as a table, and what stands in its columns."""
    lines = [
        "# Parity",
        "",
        f"{RUNTIME}, which computes fp16 in float32 between casts. Each output at the case where",
        "it is nearest to its budget, or furthest beyond it. Errors are against torch in float64",
        "on the same inputs; *torch's* is eager torch in the file's dtype on one thread, the worse",
        "of its two memory formats; *allowed* is twice that and twice eps of the largest value.",
        "*Case* is batch×height×width(×tokens), or batch×tokens.",
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
    lines += ["", f"{drawn}: {_psnr_text(parity.psnr_db)}, of {parity.least_db:g} dB at least.", ""]
    for name, fault in parity.faults.items():
        lines += [f"{name} parts from torch at {fault or NOWHERE}.", ""]
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
