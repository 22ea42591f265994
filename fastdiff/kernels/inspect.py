"""The compiled Triton kernels for each NVIDIA architecture, without a GPU.

`table()` compiles every launch of every kernel's cases and reads the machine code with the tools of
Triton's own wheel. A row also holds what its launch should become, and `faults` names the
differences. Nothing here measures speed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
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
from fastdiff.kernels.dispatch import Kernel, all_kernels
from fastdiff.kernels.occupancy import SMS, bound, occupancy
from fastdiff.kernels.planned import specialised

SHARED_LIMIT = {arch: sm.shared - 1 for arch, sm in SMS.items()}
"""The shared memory that a block may use, in KiB, by architecture."""

MMA = ("wgmma", "tcgen05.mma", "mma.sync")
"""PTX's matrix instructions, newest first except for sm_100's."""
MMA_OF = {90: "wgmma", 100: "tcgen05.mma"}
"""The instruction that half-precision products should become; mma.sync on other architectures."""
DOT = "tt.dot"
"""A product in Triton's own first intermediate code."""
THREADS = 2

Planned = tuple[KernelSpec, Case, torch.dtype, Launch]


@dataclass(frozen=True)
class Compiled:
    """One compiled launch."""

    op: str
    kernel: str
    case: str
    """The first case with this launch."""
    dtype: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    """Per thread; at most 255."""
    spills: int
    """Bytes of local memory and stack per thread; should be 0."""
    shared: int
    """Bytes per block."""
    occupancy: float
    """The warps that can be resident on an SM, as a share of its maximum: 0 to 1."""
    limited_by: str
    """What limits `occupancy`: "registers", "shared memory", "tensor memory", "blocks" or
    "warps"."""
    load: int
    """Bytes of a thread's widest load from global memory; 16 for a bulk copy, 0 without loads."""
    store: int
    """Bytes of a thread's widest store to global memory; 16 for a bulk copy, 0 without stores."""
    mma: str
    """The matrix instruction; "" if there is none."""
    wants_load: int
    """The least that `load` should be: `Launch.vector`."""
    wants_store: int
    """The least that `store` should be; 0 if no output has the case's dtype, as with statistics."""
    wants_mma: str
    """What `mma` should be; "" if there are no products, or in float32."""
    narrow: int
    """How many loads and stores are narrower than `wants_load`. Loads of weights, rows and masks
    may be narrow, so this number is only compared with the accepted table: it reveals activations
    whose loads become narrow, which the widest load does not show."""
    bound: str
    """"memory" or "compute": what limits the whole case on a GPU at its roofline."""

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_LIMIT[self.arch] * 1024

    @property
    def faults(self) -> list[str]:
        """Faults that are never accepted, one sentence each."""
        limit = SHARED_LIMIT[self.arch]
        wrong = {
            f"spills {self.spills} bytes per thread": self.spills > 0,
            f"takes {self.shared} bytes of shared memory of {limit} KiB": not self.fits,
            f"loads {self.load} bytes at once, not {self.wants_load}": self.load < self.wants_load,
            f"stores {self.store} bytes at once, not {self.wants_store}": (
                self.store < self.wants_store
            ),
            f"multiplies by {self.mma or 'no matrix instruction'}, not {self.wants_mma}": (
                self.wants_mma not in ("", self.mma)
            ),
        }
        where = f"{self.op}, {self.kernel}, {self.case}, {self.dtype}, sm_{self.arch}"
        return [f"{where}: {what}" for what, is_so in wrong.items() if is_so]


def table(
    archs: Iterable[int] | None = None,
    dtypes: Iterable[torch.dtype] = (torch.float16,),
    cases: Iterable[str] | None = None,
    ops: Iterable[str] | None = None,
    log: Callable[[str], object] = lambda line: None,
) -> list[Compiled]:
    """Compile each distinct launch of the kernels' cases for each architecture (default: all).

    `cases` and `ops` restrict this to the named ones. Raises ValueError for an unknown
    architecture, and in a process that imported the kernels for Triton's interpreter.
    """
    archs = tuple(SMS if archs is None else archs)
    if unknown := set(archs) - set(SMS):
        raise ValueError(f"unknown architectures {sorted(unknown)}; known: {list(SMS)}")
    wanted = None if cases is None else frozenset(cases)
    rows: list[Compiled] = []
    for arch in archs:
        log(f"sm_{arch}: compiling")
        distinct: dict[tuple[str, int, int], Planned] = {}
        for spec, case, dtype, launch in launches(arch, tuple(dtypes), ops):
            if wanted is not None and case.name not in wanted:
                continue
            source = _source(launch)
            key = (source.hash(), launch.num_warps, launch.num_stages)
            distinct.setdefault(key, (spec, case, dtype, launch))
        rows += compiled(arch, list(distinct.values()))
    return rows


def compiled(arch: int, plans: Sequence[Planned]) -> list[Compiled]:
    """A row for each launch, compiled for one architecture."""
    with ThreadPoolExecutor(THREADS) as pool:
        made = list(pool.map(lambda planned: _compile(arch, planned[3]), plans))
    tools = triton.knobs.nvidia
    cubins = [kernel.asm["cubin"] for kernel in made]
    codes = sass.read(cubins, arch, tools.cuobjdump.path, tools.nvdisasm.path)
    return [
        _row(spec, case, dtype, arch, launch, kernel, code)
        for (spec, case, dtype, launch), kernel, code in zip(plans, made, codes, strict=True)
    ]


def launches(
    arch: int, dtypes: Iterable[torch.dtype], ops: Iterable[str] | None
) -> Iterator[Planned]:
    """The launches of every case."""
    kernels = all_kernels()
    for kernel in kernels.values() if ops is None else [kernels[op] for op in ops]:
        if "triton" in kernel.implementations:
            for case, dtype in product(kernel.spec.cases, dtypes):
                for launch in planned(kernel, case, dtype, arch):
                    yield kernel.spec, case, dtype, launch


def planned(kernel: Kernel, case: Case, dtype: torch.dtype, arch: int) -> tuple[Launch, ...]:
    """The launches of one case on an architecture, planned on fake tensors."""
    launcher: Any = kernel.implementations["triton"]()
    with FakeTensorMode():
        inputs = kernel.spec.inputs(case, dtype, torch.device("cpu"), torch.Generator())
        starts: tuple[Launch, ...] = launcher.plan(arch, **inputs)[0]
    return starts


def _source(launch: Launch) -> ASTSource:
    """The kernel, with its arguments specialised as by Triton's launcher."""
    if not isinstance(launch.kernel, JITFunction):
        raise ValueError(
            "the kernels were imported for Triton's interpreter and cannot be compiled; "
            "start a process without TRITON_INTERPRET"
        )
    types, constants, divisible = specialised(launch)
    names = launch.kernel.arg_names
    if missing := set(names) ^ (set(types) | set(constants)):
        raise ValueError(f"{launch.kernel.__name__}: arguments {sorted(missing)} do not match")
    return ASTSource(
        launch.kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )


def _compile(arch: int, launch: Launch) -> Any:
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": FP_FUSION,
    }
    return triton.compile(_source(launch), target=GPUTarget("cuda", arch, 32), options=options)


def _row(
    spec: KernelSpec,
    case: Case,
    dtype: torch.dtype,
    arch: int,
    launch: Launch,
    kernel: Any,
    code: sass.Code,
) -> Compiled:
    made = kernel.metadata  # specialised warps count here, not in the launch
    columns = getattr(made, "tmem_size", None) or 0
    fills = occupancy(arch, made.num_warps, code.registers, made.shared, columns)
    multiplies = DOT in kernel.asm["ttir"] and dtype.itemsize == 2
    return Compiled(
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
        mma=next((name for name in MMA if name in kernel.asm["ptx"]), ""),
        wants_load=launch.vector,
        wants_store=launch.vector if _writes(launch, dtype) else 0,
        wants_mma=MMA_OF.get(arch, "mma.sync") if multiplies else "",
        narrow=code.narrower(launch.vector),
        bound=bound(arch, spec.flops(case), spec.bytes(case, dtype.itemsize)),
    )


def _writes(launch: Launch, dtype: torch.dtype) -> bool:
    """Whether an output has the dtype. Outputs are the tensors after the last integer, except one
    that is also an input, which stands for an absent one."""
    values = list(launch.arguments.values())
    last = max((at for at, value in enumerate(values) if type(value) is int), default=-1)
    inputs = {id(value) for value in values[:last]}
    outputs = [value for value in values[last + 1 :] if id(value) not in inputs]
    return any(isinstance(value, Tensor) and value.dtype == dtype for value in outputs)
