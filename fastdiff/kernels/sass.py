"""Reads a kernel's machine code (SASS) with the tools of Triton's wheel.

`nvdisasm` takes one file at a time, and a third of a second to start but only a hundredth per
kernel. So the code of many kernels is joined and disassembled at once (53 kernels: 0.8 s, not 17).
"""

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

LOADS = ("LDG", "LDGSTS", "UTMALDG")
"""Loads from global memory: into registers, into shared memory, by a bulk copy (TMA)."""
STORES = ("STG", "UTMASTG", "UTMAREDG")

WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
"""Bytes per thread, by the instruction's modifier; 4 without one."""
BULK = 16
"""The width counted for a bulk copy, which is not done by threads: a thread's widest."""

INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)((?:\.\w+)*)", re.M
)
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
SECTION = struct.Struct("<IIQQQQIIQQ")
"""A section header of a 64-bit ELF file: name, …; offset and size are fifth and sixth."""


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel."""

    registers: int
    """Per thread."""
    spills: int
    """Bytes of stack and local memory per thread."""
    loads: Mapping[int, int]
    """Instructions that load from global memory, by width in bytes per thread."""
    stores: Mapping[int, int]
    """The same for stores to global memory."""

    @property
    def load(self) -> int:
        """The widest load; 0 if there is none."""
        return max(self.loads, default=0)

    @property
    def store(self) -> int:
        return max(self.stores, default=0)

    def narrower(self, width: int) -> int:
        """How many loads and stores move less than `width` bytes at once."""
        both = (*self.loads.items(), *self.stores.items())
        return sum(count for wide, count in both if wide < width)


def read(cubins: Sequence[bytes], arch: int, cuobjdump: str, nvdisasm: str) -> list[Code]:
    """Disassemble cubins of one architecture, one kernel each, with the tools at these paths."""
    if not cubins:
        return []
    target = f"SM{arch}{'a' if arch >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel")
        usages = []
        for cubin in cubins:
            path.write_bytes(cubin)
            usages.append(_output_of(cuobjdump, "--dump-resource-usage", str(path)))
        texts = [text_of(cubin) for cubin in cubins]
        path.write_bytes(b"".join(texts))
        listing = _output_of(nvdisasm, "--binary", target, "--no-dataflow", str(path))
    return parse(usages, listing, list(map(len, texts)))


def parse(usages: Sequence[str], listing: str, sizes: Sequence[int]) -> list[Code]:
    """Parse what the tools printed for joined kernels with these sizes of code in bytes."""
    ends = list(accumulate(sizes))
    codes: list[list[tuple[str, list[str]]]] = [[] for _ in sizes]
    at = 0
    for address, name, modifiers in INSTRUCTION.findall(listing):
        while int(address, 16) >= ends[at]:
            at += 1
        codes[at].append((name, modifiers.split(".")))
    return [_code(usage, code) for usage, code in zip(usages, codes, strict=True)]


def text_of(cubin: bytes) -> bytes:
    """The machine code in a cubin of one kernel: its section `.text.<kernel>`."""
    start, size, count, names = (
        *struct.unpack_from("<Q", cubin, 40),
        *struct.unpack_from("<3H", cubin, 58),
    )
    sections = [SECTION.unpack_from(cubin, start + size * i) for i in range(count)]
    texts = [
        cubin[offset : offset + length]
        for name, _, _, _, offset, length, *_ in sections
        if cubin.startswith(b".text.", sections[names][4] + name)
    ]
    if len(texts) != 1:
        raise RuntimeError(f"a cubin has {len(texts)} kernels; expected one")
    return texts[0]


def _output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _code(usage: str, code: Sequence[tuple[str, list[str]]]) -> Code:
    found = USAGE.search(usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[-200:]!r}")
    registers, stack, local = map(int, found.groups())
    if not any(name == "EXIT" for name, _ in code):
        raise RuntimeError(f"nvdisasm printed no complete kernel: {code[-3:]}")
    return Code(
        registers, stack + local, Counter(_widths(code, LOADS)), Counter(_widths(code, STORES))
    )


def _widths(code: Sequence[tuple[str, list[str]]], names: tuple[str, ...]) -> Iterator[int]:
    return (_width(name, parts) for name, parts in code if name in names)


def _width(name: str, modifiers: list[str]) -> int:
    """LDG.E.64.CONSTANT -> 8; the 128 in LTC128B is a cache hint, not a width."""
    if name.startswith("UTMA"):
        return BULK
    return next((WIDTHS[part] for part in modifiers if part in WIDTHS), 4)
