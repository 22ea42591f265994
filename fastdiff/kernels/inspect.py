"""What the Triton kernels become on each NVIDIA architecture, found by compiling without a GPU.

`table()` compiles every launch of every kernel's cases and reads registers, spills and shared
memory with the `cuobjdump` of Triton's own wheel. Nothing here says how fast a kernel is.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from fastdiff.kernels.contract import FP_FUSION, Case, KernelSpec, Launch
from fastdiff.kernels.dispatch import all_kernels

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory a block may use, in KiB, by architecture (CUDA C programming guide)."""

MMA = ("wgmma", "tcgen05.mma", "mma.sync")
"""Matrix instructions of PTX, the newest first but for sm_100's."""

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Row:
    """One compiled launch."""

    op: str
    kernel: str
    case: str
    """The first case that is launched this way."""
    dtype: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    """For each thread; 255 at most."""
    spills: int
    """Bytes of local memory and stack for each thread; 0 is what we want."""
    shared: int
    """Bytes for each block."""
    mma: str
    """The matrix instruction, "" where there is none."""

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_LIMIT[self.arch] * 1024


def table(
    archs: Iterable[int] | None = None,
    dtypes: Iterable[torch.dtype] = (torch.float16,),
    cases: Iterable[str] | None = None,
) -> list[Row]:
    """Compile each distinct launch of the kernels' cases for each architecture (default: all).

    `cases` narrows to the named ones. Raises ValueError for an architecture that is not known and
    in a process that imported the kernels for Triton's interpreter.
    """
    archs = tuple(SHARED_LIMIT if archs is None else archs)
    if unknown := set(archs) - set(SHARED_LIMIT):
        raise ValueError(f"unknown architectures {sorted(unknown)}; known: {list(SHARED_LIMIT)}")
    wanted = None if cases is None else frozenset(cases)
    rows = []
    for arch in archs:
        seen = set()
        for spec, case, dtype, launch in _launches(arch, tuple(dtypes)):
            source = _source(launch)
            key = (source.hash(), launch.num_warps, launch.num_stages)
            if key in seen or (wanted is not None and case.name not in wanted):
                continue
            seen.add(key)
            rows.append(_row(spec, case, dtype, arch, launch, source))
    return rows


def _launches(
    arch: int, dtypes: tuple[torch.dtype, ...]
) -> Iterator[tuple[KernelSpec, Case, torch.dtype, Launch]]:
    """Plans of every case, made on fake tensors."""
    for kernel in all_kernels().values():
        if "triton" not in kernel.implementations:
            continue
        launcher: Any = kernel.implementations["triton"]()
        for case in kernel.spec.cases:
            for dtype in dtypes:
                with FakeTensorMode():
                    generator = torch.Generator()
                    inputs = kernel.spec.inputs(case, dtype, torch.device("cpu"), generator)
                    launches, _ = launcher.plan(arch, **inputs)
                for launch in launches:
                    yield kernel.spec, case, dtype, launch


def _source(launch: Launch) -> ASTSource:
    """The kernel with its arguments specialised as Triton's launcher does."""
    if not isinstance(launch.kernel, JITFunction):
        raise ValueError(
            "the kernels were imported for Triton's interpreter and cannot be compiled; "
            "start a process without TRITON_INTERPRET"
        )
    types: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    divisible = set()
    for name, value in launch.arguments.items():
        if value is None or (type(value) is int and value == 1):
            constants[name] = value
        elif isinstance(value, Tensor):
            types[name] = TYPES[value.dtype]
            # allocations are aligned, so only the offset into one counts
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.add(name)
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.add(name)
    names = launch.kernel.arg_names
    if missing := set(names) ^ (set(types) | set(constants)):
        raise ValueError(f"{launch.kernel.__name__}: arguments {sorted(missing)} do not match")
    return ASTSource(
        launch.kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )


def _row(
    spec: KernelSpec, case: Case, dtype: torch.dtype, arch: int, launch: Launch, source: ASTSource
) -> Row:
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": FP_FUSION,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills = _resources(compiled)
    return Row(
        op=spec.name,
        kernel=launch.kernel.__name__,
        case=case.name,
        dtype=str(dtype).removeprefix("torch."),
        arch=arch,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        mma=next((name for name in MMA if name in compiled.asm["ptx"]), ""),
    )


def _resources(compiled: CompiledKernel) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, of each thread."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", str(cubin)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text[-200:]!r}")
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local
