"""Reading machine code: single printed lines, and compiled Triton kernels of known load widths."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command import environment

from fastdiff.kernels.sass import parse

USAGE = " Function _k:\n  REG:40 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:560\n"
EXIT = "EXIT"


def printed(*lines):
    """What nvdisasm prints of a kernel's instructions, 16 bytes each."""
    return "".join(f"        /*{16 * n:04x}*/    {line} ;\n" for n, line in enumerate(lines))


def parsed(*lines):
    return parse([USAGE], printed(*lines, EXIT), [16 * (len(lines) + 1)])[0]


LINES = {
    "LDG.E R2, [R2.64]": (4, 0),
    "LDG.E.U8 R2, [R2.64]": (1, 0),
    "LDG.E.U16.CONSTANT R2, desc[UR4][R2.64]": (2, 0),
    "LDG.E.64 R2, desc[UR4][R2.64+0x80]": (8, 0),
    "@P0 LDG.E.128 R8, desc[UR4][R4.64]": (16, 0),
    "@!P3 LDG.E.ENL2.256 R8, R12, desc[UR4][R4.64]": (32, 0),
    "LDG.E.LTC128B R2, desc[UR4][R2.64]": (4, 0),
    "LDGSTS.E.BYPASS.LTC128B.128 [R9], desc[UR4][R4.64], P0": (16, 0),
    "LDGSTS.E.64 [R9+0x800], [R4.64]": (8, 0),
    "@P1 STG.E.U16 desc[UR4][R2.64], R7": (0, 2),
    "STG.E.STRONG.GPU desc[UR4][R2.64], R7": (0, 4),
    "@!UP0 UTMALDG.2D [UR8], [UR4], desc[UR6]": (16, 0),
    "UTMASTG.2D [UR8], [UR4]": (0, 16),
    "LDS.128 R4, [R2]": (0, 0),
    "STS.128 [R2], R4": (0, 0),
    "STL.64 [R1+0x10], R4": (0, 0),
    "LDC.64 R4, c[0x0][0x210]": (0, 0),
}


@pytest.mark.parametrize("line", LINES)
def test_width_of_one_instruction(line):
    code = parsed(line)
    assert (code.registers, code.spills) == (40, 24)
    assert (code.load, code.store) == LINES[line]


def test_the_width_is_that_of_the_widest_access_and_narrower_ones_are_counted():
    code = parsed(*LINES)
    assert (code.load, code.store) == (32, 16)
    assert code.loads == {1: 1, 2: 1, 4: 2, 8: 2, 16: 3, 32: 1}
    assert [code.narrower(width) for width in (1, 4, 16, 64)] == [0, 3, 8, 13]


def test_consecutive_kernels_are_parsed_separately():
    lines = ("LDG.E.64 R2, [R2.64]", EXIT, "STG.E [R2.64], R7", "STG.E.128 [R2.64], R4", EXIT)
    first, second = parse([USAGE, USAGE], printed(*lines), [32, 48])
    assert (first.loads, first.stores) == ({8: 1}, {})
    assert (second.loads, second.stores) == ({}, {4: 1, 16: 1})


def test_an_incomplete_listing_is_refused():
    with pytest.raises(RuntimeError, match="no resource usage"):
        parse([""], printed(EXIT), [16])
    with pytest.raises(RuntimeError, match="no complete kernel"):
        parse([USAGE], "", [16])
    with pytest.raises(RuntimeError, match="no complete kernel"):
        parse([USAGE, USAGE], printed(EXIT, "LDG.E R2, [R2.64]"), [16, 16])


ARCHS = (80, 90, 100)
SCRIPT = """
import dataclasses, json, sys
sys.path.insert(0, sys.argv[1])
from planted import PLANTED
from fastdiff.kernels.inspect import table
rows = table(map(int, sys.argv[2:]), ops=PLANTED)
json.dump([dataclasses.asdict(row) | {"faults": row.faults} for row in rows], sys.stdout)
"""


@pytest.fixture(scope="module")
def planted():
    """Rows of the kernels in `planted.py` by (op, arch), compiled by another process."""
    variables = environment()
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), *map(str, ARCHS)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {(row["op"], row["arch"]): row for row in json.loads(done.stdout)}


@pytest.mark.parametrize("arch", ARCHS)
def test_known_widths(planted, arch):
    widths = {op: (row["load"], row["store"]) for (op, a), row in planted.items() if a == arch}
    assert widths["contiguous"] == (16, 16)  # 8 numbers of a thread at a time
    assert widths["every third"] == (2, 2)  # one number at a time
    assert widths["gathered"] == (2, 16)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_planted_spill_is_seen(planted, arch):
    """A block of 512 numbers a thread cannot be kept in 255 registers; one of 128 can."""
    assert planted["spilled", arch]["spills"] >= 1024
    assert planted["kept", arch]["spills"] == 0
    assert 128 <= planted["kept", arch]["registers"] <= 255


def test_matrix_instruction_of_each_architecture(planted):
    found = {arch: planted["product", arch]["mma"] for arch in ARCHS}
    assert found == {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
    assert {planted["contiguous", arch]["mma"] for arch in ARCHS} == {""}


@pytest.mark.parametrize("arch", ARCHS)
def test_occupancy_and_bound_of_known_kernels(planted, arch):
    """Blocks of four warps with few registers fill an SM; those of one warp with many registers do
    not."""
    contiguous, kept = planted["contiguous", arch], planted["kept", arch]
    assert (contiguous["occupancy"], contiguous["limited_by"]) == (1.0, "warps")
    # up to 160 registers: 3 warps in a quarter of the SM
    assert (kept["occupancy"], kept["limited_by"]) == (12 / 64, "registers")
    assert planted["product", arch]["bound"] == "memory"  # 32 FLOPs a byte


@pytest.mark.parametrize("arch", ARCHS)
def test_each_planted_fault_is_reported(planted, arch):
    """The other kernels have none."""
    found_faults = {
        op: [f.split(": ")[1] for f in row["faults"]]
        for (op, a), row in planted.items()
        if a == arch
    }
    spills = planted["spilled", arch]["spills"]
    assert found_faults.pop("spilled") == [f"spills {spills} bytes per thread"]
    narrow = ["loads 2 bytes at once, not 16", "stores 2 bytes at once, not 16"]
    assert found_faults.pop("every third") == narrow
    assert found_faults.pop("gathered") == narrow[:1]
    assert not any(found_faults.values()), found_faults


def test_a_fault_names_the_launch(planted):
    where = "every third, _copy_kernel, only, float16, sm_90: "
    assert all(fault.startswith(where) for fault in planted["every third", 90]["faults"])
