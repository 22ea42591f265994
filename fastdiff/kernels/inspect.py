"""What the Triton kernels become on each NVIDIA architecture, found by compiling without a GPU.

`table()` compiles every launch of every kernel's cases and reads the machine code with the
`cuobjdump` of Triton's own wheel. Nothing here says how fast a kernel is.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastdiff.kernels import sass
from fastdiff.kernels.contract import FP_FUSION, Case, KernelSpec, Launch
from fastdiff.kernels.dispatch import all_kernels
from fastdiff.kernels.occupancy import SMS, bound, occupancy

SHARED_LIMIT = {arch: sm.shared - 1 for arch, sm in SMS.items()}
"""Shared memory a block may use, in KiB, by architecture."""

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
    occupancy: float
    """Warps that can be resident on an SM, of those that it holds at most: 0 to 1."""
    limited_by: str
    """What keeps `occupancy` from being more: "registers", "shared memory", "tensor memory",
    "blocks" or "warps"."""
    load: int
    """Bytes of a thread's widest load from global memory; 16 for a bulk copy, 0 for none."""
    store: int
    """Bytes of a thread's widest store to global memory; 16 for a bulk copy, 0 for none."""
    mma: str
    """The matrix instruction, "" where there is none."""
    bound: str
    """"memory" or "compute": what the whole case would wait for on a GPU at its roofline."""

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_LIMIT[self.arch] * 1024


def table(
    archs: Iterable[int] | None = None,
    dtypes: Iterable[torch.dtype] = (torch.float16,),
    cases: Iterable[str] | None = None,
    ops: Iterable[str] | None = None,
    log: Callable[[str], object] = lambda line: None,
) -> list[Row]:
    """Compile each distinct launch of the kernels' cases for each architecture (default: all).

    `cases` and `ops` narrow to those named. Raises ValueError for an architecture that is not known
    and in a process that imported the kernels for Triton's interpreter.
    """
    archs = tuple(SMS if archs is None else archs)
    if unknown := set(archs) - set(SMS):
        raise ValueError(f"unknown architectures {sorted(unknown)}; known: {list(SMS)}")
    wanted = None if cases is None else frozenset(cases)
    rows = []
    with ThreadPoolExecutor(2) as pool:  # half of the time goes by in other processes
        for arch in archs:
            log(f"sm_{arch}: compiling")
            seen = set()
            for spec, case, dtype, launch in _launches(arch, tuple(dtypes), ops):
                source = _source(launch)
                key = (source.hash(), launch.num_warps, launch.num_stages)
                if key in seen or (wanted is not None and case.name not in wanted):
                    continue
                seen.add(key)
                rows.append(pool.submit(_row, spec, case, dtype, arch, launch, source))
    return [row.result() for row in rows]


def _launches(
    arch: int, dtypes: tuple[torch.dtype, ...], ops: Iterable[str] | None
) -> Iterator[tuple[KernelSpec, Case, torch.dtype, Launch]]:
    """Plans of every case, made on fake tensors."""
    kernels = all_kernels()
    for kernel in kernels.values() if ops is None else [kernels[op] for op in ops]:
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
    code = sass.read(compiled.asm["cubin"], triton.knobs.nvidia.cuobjdump.path)
    made = compiled.metadata  # its warps are more than the launch's where they are specialised
    columns = getattr(made, "tmem_size", None) or 0
    fills = occupancy(arch, made.num_warps, code.registers, made.shared, columns)
    return Row(
        op=spec.name,
        kernel=launch.kernel.__name__,
        case=case.name,
        dtype=str(dtype).removeprefix("torch."),
        arch=arch,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        registers=code.registers,
        spills=code.spills,
        shared=made.shared,
        occupancy=round(fills.share, 4),
        limited_by=fills.limited_by,
        load=code.load,
        store=code.store,
        mma=next((name for name in MMA if name in compiled.asm["ptx"]), ""),
        bound=bound(arch, spec.flops(case), spec.bytes(case, dtype.itemsize)),
    )
