"""The tables of bench and counters, on stdout."""

import math
from statistics import median
from typing import Any

from rich.text import Text

from fastdiff import tables
from fastdiff.bench import counters
from fastdiff.bench.results import Result, Timed
from fastdiff.bench.stats import Ratio
from fastdiff.bench.tally import KINDS, total

COLUMNS = (
    "backend",
    "steps/s",
    "images/s",
    "× eager [95%]",
    "peak MiB",
    "prepare s",
    "PSNR dB",
    "SSIM",
    "max |Δ|",
    "step err / budget",
)


PARTS = ("backend", "text encoders", "denoising", "VAE", "VAE × eager [95%]")


LEGEND = (
    "steps/s: includes text encoding; images/s: includes the VAE, too; × eager: ratio of steps/s to"
    " eager's, and its 95% interval",
    "prepare s: time to prepare, with what the first picture takes longer than a later one; PSNR,"
    " SSIM, max |Δ|: the picture against eager's",
    "step err / budget: the largest error of one step against float64, and the allowed error (twice"
    " eager's own error plus one rounding); above it no speed is shown",
)


def show(result: Result, note: str | None = None) -> None:
    """Print `note`, the table and, below it, legends, machine, versions and command."""
    console = tables.printer()
    if note:
        console.print(Text(note, style="yellow"), soft_wrap=True)
    shown = [tables.Row(_cells(row), "red" if row.failed else "") for row in result.rows]
    tables.show(console, result.rows[0].case, COLUMNS, shown)
    _show_parts(console, result)
    for row in result.rows:
        if row.failed:
            line = f"{row.backend}: FAILED its receipt, so no speed is shown. {_errors(row)}"
            console.print(Text(line, style="bold red"))
        if row.unavailable:
            console.print(Text(f"{row.backend}: not run: {row.unavailable}", style="yellow"))
    tables.below(console, (*LEGEND, *_footer(result)))


def _show_parts(console: Any, result: Result) -> None:
    """Print each part's share of a picture, by the medians of its rounds."""
    rows = []
    for row in result.rows:
        if not row.decode_samples_ms:
            continue
        image, text, decode = (
            median(samples)
            for samples in (row.image_samples_ms, row.text_samples_ms, row.decode_samples_ms)
        )
        parts = (text, max(0.0, image - text - decode), decode)
        cells = (f"{part:.1f} ({part / image:.0%})" for part in parts)
        rows.append(tables.Row((row.backend, *cells, _ratio(row.decode_ratio_vs_eager))))
    if rows:
        tables.show(console, "the parts of a picture: ms and share of its time", PARTS, rows)


def show_counts(result: counters.Result) -> None:
    """Print the counts of a step and an image, a line each per backend, with a legend."""
    kinds = [
        kind
        for kind in KINDS
        if any(kind in work for row in result.rows for work in (row.counts.step, row.counts.image))
    ]
    on_gpu = any(row.counts.step_kernels is not None for row in result.rows)
    gpu = ["GPU kernels"] if on_gpu else []
    head = ("backend", "per", "launches", *gpu, "MB", "GFLOP", *kinds)
    rows = []
    for row in result.rows:
        counts = row.counts
        for per, work, kernels in (
            ("step", counts.step, counts.step_kernels),
            ("image", counts.image, counts.image_kernels),
        ):
            all_kinds = total(work)
            cells = (
                row.backend,
                per,
                str(all_kinds.launches),
                *([_number(kernels, "d")] if on_gpu else []),
                f"{all_kinds.bytes / 1e6:.1f}",
                f"{all_kinds.flops / 1e9:.2f}",
                *(str(work[kind].launches) if kind in work else "0" for kind in kinds),
            )
            rows.append(tables.Row(cells))
    console = tables.printer()
    tables.show(console, result.case, head, rows, left=("per",))
    names = ("fastdiff", "torch", "diffusers", "transformers")
    for line in (
        "step: what one more step adds; image: everything except the steps",
        "launches: dispatched ops that compute or move data; MB: all bytes that they read and"
        " write; GFLOP: products and convolutions",
        ", ".join(f"{name} {result.versions[name] or '–'}" for name in names)
        + f", commit {result.commit or '–'}",
        result.command,
    ):
        console.print(Text(line, style="dim"))


def _cells(row: Timed) -> list[str]:
    receipt = row.receipt
    if receipt is None:
        return [row.backend] + ["–"] * (len(COLUMNS) - 1)
    embeds = receipt.passed and math.isnan(receipt.psnr_db)  # a picture that is NaN never passes
    mib = None if row.peak_mem_bytes is None else row.peak_mem_bytes / 2**20
    return [
        row.backend,
        _number(row.steps_per_s, ".2f"),
        _number(row.images_per_s, ".3f"),
        _ratio(row.ratio_vs_eager),
        _number(mib, ".0f"),
        _number(row.prepare_s, ".1f"),
        _number(None if embeds else receipt.psnr_db, ".1f"),
        _number(None if embeds else receipt.ssim, ".5f"),
        _number(receipt.max_abs, ".1e"),
        f"{_number(receipt.err_vs_fp64, '.1e')} / {_number(receipt.budget, '.1e')}",
    ]


def _ratio(ratio: Ratio | None) -> str:
    return "–" if ratio is None else f"{ratio.median:.2f} [{ratio.lo:.2f}, {ratio.hi:.2f}]"


def _number(value: float | None, spec: str) -> str:
    if value is None:
        return "–"
    return "same" if value == math.inf else format(value, spec)


def _errors(row: Timed) -> str:
    receipt = row.receipt
    assert receipt is not None
    return (
        f"One step is {receipt.err_vs_fp64:.2e} from float64 (allowed {receipt.budget:.2e}, eager"
        f" {receipt.err_eager_vs_fp64:.2e}), the picture {receipt.picture_rms_vs_fp64:.2e} root"
        f" mean square (eager {receipt.picture_rms_eager_vs_fp64:.2e})."
    )


def _footer(result: Result) -> list[str]:
    machine, versions = result.machine, result.versions
    gpu: dict[str, Any] | None = machine["gpu"]
    cores, threads = machine["cores"], machine["threads"]
    where = f"{machine['cpu']}, {tables.plural(cores, 'core')}, {tables.plural(threads, 'thread')}"
    if gpu:
        where = f"{gpu['name']} (driver {gpu['driver']}, CUDA {gpu['cuda']}), {where}"
    names = ["fastdiff", "python", "torch", "diffusers", "transformers", "triton"]
    libraries = {"ort": ("onnxruntime", "onnxruntime-gpu"), "openvino": ("openvino",)}
    theirs = (name for row in result.rows for name in libraries.get(row.backend, ()))
    names += [name for name in theirs if versions.get(name)]
    rounds = max(len(row.samples_ms) for row in result.rows)
    return [
        f"{rounds} rounds; in each, every backend draws one picture, in random order",
        where,
        ", ".join(f"{name} {versions[name] or '–'}" for name in names)
        + f", commit {result.commit or '–'}",
        result.command,
    ]
