"""A page for each kernel, from its spec, its docstrings and benchmarks/static/kernels.json."""

import ast
import inspect
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fastdiff.kernels.contract import Case, KernelSpec
from fastdiff.kernels.dispatch import Kernel, all_kernels

ROOT = Path(__file__).parents[1]
STATIC = ROOT / "benchmarks/static/kernels.json"
HALF = 2
"""Bytes of an element in float16 and bfloat16, in which GPUs draw."""
CASE = ("case", "sizes", "bytes", "FLOP", "FLOP per byte")
UNITS = ("", "k", "M", "G", "T")


def pages() -> dict[str, str]:
    """The pages' texts by name, the list of all kernels first."""
    static = json.loads(STATIC.read_text("utf-8"))
    kernels = dict(sorted(all_kernels().items()))
    made = {"kernels/index.md": _index(kernels, static)}
    for name, kernel in kernels.items():
        made[f"kernels/{name}.md"] = page(kernel, static)
    return made


def page(kernel: Kernel, static: dict[str, Any]) -> str:
    """The page of one kernel."""
    spec = kernel.spec
    return "\n\n".join(
        [
            f"# `{spec.name}`",
            _summary(spec.name),
            "## Arguments and result",
            f"::: fastdiff.kernels.{spec.name}.{spec.name}\n"
            "    options:\n      heading_level: 3\n      show_root_toc_entry: false",
            "## Mathematics in plain torch",
            "The reference, in float64, that every implementation is compared with:",
            f"```python\n{source(spec)}\n```",
            "## Who computes it",
            "\n".join(_implementations(kernel)),
            "## Cases",
            "What tests and `fastdiff inspect` run: sizes of models, then difficult ones. Bytes are"
            " the fewest that must be read and written with elements of 2 bytes, FLOPs count a"
            " multiply-add as two.",
            table(CASE, map(_case(spec), spec.cases), words=2),
            "## What the compiler makes of it",
            _static(spec, static),
        ]
    )


def source(spec: KernelSpec) -> str:
    """The formula's source, after the functions of its file that it calls."""
    module = sys.modules[spec.formula.__module__]
    names: list[str] = []
    _called(module, spec.formula.__name__, names)
    return "\n\n\n".join(inspect.getsource(getattr(module, name)).strip() for name in names)


def _called(module: ModuleType, name: str, names: list[str]) -> None:
    """Add `name`, a function of `module`, to `names`, after the functions that it calls."""
    function = getattr(module, name)
    for node in ast.walk(ast.parse(inspect.getsource(function))):
        other = getattr(module, node.id, None) if isinstance(node, ast.Name) else None
        if (
            inspect.isfunction(other)
            and other.__module__ == module.__name__
            and other.__name__ not in (*names, name)
        ):
            _called(module, other.__name__, names)
    names.append(name)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], words: int = 1) -> str:
    """A Markdown table whose first columns, this many, hold words, and the others numbers."""
    lines = [head, (*["---"] * words, *["---:"] * (len(head) - words)), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def amount(number: float) -> str:
    """Three digits and a unit: 1559e9 -> "1.56 T"."""
    for unit in UNITS:
        if number < 999.5 or unit == UNITS[-1]:
            return f"{number:.3g} {unit}".strip()
        number /= 1000
    raise AssertionError


def _summary(name: str) -> str:
    text = inspect.getdoc(sys.modules[f"fastdiff.kernels.{name}"]) or ""
    return text.split("\n\n")[0]


def _case(spec: KernelSpec) -> Any:
    def row(case: Case) -> tuple[str, ...]:
        sizes = ", ".join(f"{name} {value}" for name, value in case.sizes.items())
        moved, flops = spec.bytes(case, HALF), spec.flops(case)
        return case.name, sizes, amount(moved), amount(flops), amount(flops / moved)

    return row


def _implementations(kernel: Kernel) -> Iterable[str]:
    module = sys.modules[f"fastdiff.kernels.{kernel.spec.name}"]
    folder = Path(str(module.__file__)).parent
    native = "_C" in (folder / "cpu.py").read_text() or "NATIVE" in (folder / "cpu.py").read_text()
    own = "our loops in C++" if native else "plain torch"
    if kernel.spec.work is not None:
        own += ", or torch's library where a committed table says that it is faster"
    yield f"- **CPU**: {own}."
    if "triton" in kernel.implementations:
        yield "- **NVIDIA GPU**: our Triton kernel."
    else:
        yield "- **NVIDIA GPU**: torch and NVIDIA's libraries; there is no Triton kernel."
    others = set(kernel.implementations) - {"reference", "cpu", "triton"}
    for other in sorted(others):
        yield f"- **`{other}`**: built and tested, but run only if it is requested by name."
    choices: Sequence[Any] = getattr(module, "CUDA_CHOICES", ())
    if choices:
        yield ""
        yield "On a GPU the first row that fits decides:"
        yield ""
        yield table(("runs", "heads", "keys", "why"), map(_choice, choices), words=4)


def _choice(choice: Any) -> tuple[str, ...]:
    widths = ", ".join(map(str, choice.widths)) or (f"over {choice.over}" if choice.over else "any")
    keys = f"at most {choice.max_keys}" if choice.max_keys else "any"
    return f"`{choice.run}`", widths, keys, choice.why


def _static(spec: KernelSpec, static: dict[str, Any]) -> str:
    rows = [row for row in static["rows"] if row["op"] == spec.name]
    if not rows:
        return "Nothing: a library computes it on a GPU."
    head = ("kernel, case", "type", "sm", "warps", "stages", "registers", "spilled", "shared")
    head += ("occupancy", "load", "store")
    return (
        f"Compiled by Triton {static['versions']['triton']} at commit {static['commit']}, without"
        " a GPU: registers per thread, bytes of shared memory per block, the share of a"
        " multiprocessor's warps that fit at once, and the bytes that the widest load and store"
        " move. CI fails if a kernel spills or one of these numbers gets worse.\n\n"
        + table(head, map(_compiled, rows))
    )


def _compiled(row: dict[str, Any]) -> tuple[object, ...]:
    return (
        f"`{row['kernel']}`, {row['case']}",
        row["dtype"],
        row["arch"],
        *(row[name] for name in ("num_warps", "num_stages", "registers", "spills", "shared")),
        f"{row['occupancy']:.0%}",
        row["load"],
        row["store"],
    )


def _index(kernels: dict[str, Kernel], static: dict[str, Any]) -> str:
    def row(kernel: Kernel) -> tuple[str, ...]:
        name = kernel.spec.name
        own = "Triton" if "triton" in kernel.implementations else "libraries"
        lines = sum(line["op"] == name for line in static["rows"])
        summary = _summary(name)
        return f"[`{name}`]({name}.md)", summary, own, str(len(kernel.spec.cases)), str(lines)

    head = ("kernel", "what it does", "on a GPU", "cases", "compiled")
    return "\n\n".join(
        [
            "# Kernels",
            f"{len(kernels)} fused operations. Each is a folder of `fastdiff/kernels/` with a"
            " contract, `spec.py`, from which its tests, `fastdiff inspect` and its page are made.",
            table(head, map(row, kernels.values()), words=3),
            "**The error budget.** An implementation passes a case if its largest error against"
            " the same mathematics in float64 is at most twice that of plain torch in the kernel's"
            " own type, plus twice that type's epsilon times the largest value. Memory is filled"
            " with NaN first, so a read before a write is detected.",
            "**Sizes.** B pictures, Y rows, X columns, C channels, G groups; L tokens (Lq queries,"
            " Lk keys), H heads, K columns of a head; D and N columns of a matrix.",
            "[Add a kernel](../add-a-kernel.md)",
        ]
    )
