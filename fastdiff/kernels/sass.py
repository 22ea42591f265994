"""What a kernel's machine code (SASS) says of itself, read with NVIDIA's `cuobjdump`."""

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LOADS = ("LDG", "LDGSTS", "UTMALDG")
"""Loads from global memory: into registers, into shared memory, by a bulk copy (TMA)."""
STORES = ("STG", "UTMASTG", "UTMAREDG")

WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
"""Bytes that a thread moves, by the instruction's modifier; 4 without one."""
BULK = 16
"""Stands for a bulk copy, which no thread takes part in: as good as a thread's widest."""

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)((?:\.\w+)*)", re.M)
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Code:
    """Of one kernel."""

    registers: int
    """For each thread."""
    spills: int
    """Bytes of stack and local memory for each thread."""
    load: int
    """Bytes of the widest load from global memory, for each thread; 0: there is none."""
    store: int
    """Bytes of the widest store to global memory, for each thread; 0: there is none."""


def read(cubin: bytes, cuobjdump: str) -> Code:
    """Disassemble a cubin of one kernel with the tool at the path `cuobjdump`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [cuobjdump, "--dump-resource-usage", "--dump-sass", str(path)]
        return parse(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parse(text: str) -> Code:
    """What `cuobjdump --dump-resource-usage --dump-sass` printed of one kernel."""
    usage = USAGE.search(text)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text[-200:]!r}")
    registers, stack, local = map(int, usage.groups())
    code = [(name, parts.split(".")) for name, parts in INSTRUCTION.findall(text)]
    if not any(name == "EXIT" for name, _ in code):
        raise RuntimeError(f"cuobjdump printed no code: {text[-200:]!r}")
    return Code(registers, stack + local, _widest(code, LOADS), _widest(code, STORES))


def _widest(code: Iterable[tuple[str, list[str]]], names: tuple[str, ...]) -> int:
    return max((_width(name, parts) for name, parts in code if name in names), default=0)


def _width(name: str, modifiers: list[str]) -> int:
    """LDG.E.64.CONSTANT -> 8; the 128 of LTC128B is a hint to the cache, not a width."""
    if name.startswith("UTMA"):
        return BULK
    return next((WIDTHS[part] for part in modifiers if part in WIDTHS), 4)
