"""The kernels compile for NVIDIA's architectures, fit them, spill no registers and use their matrix
instructions.

The tests' own process runs kernels in Triton's interpreter, so a separate process compiles them.
"""

from dataclasses import replace
from functools import cache

import pytest

from fastdiff.kernels.inspect import SHARED_LIMIT, Compiled, table
from fastdiff.kernels.occupancy import SMS, occupancy

MAIN_CASES = (
    "sd15-64",
    "sd15-16",
    "sd15-64-cat",
    "vae-top",
    "sd15-64-self",
    "sd15-32-self",
    "sd15-16-self",
    "sdxl-64-self",
    "sd15-64-cross",
    "sdxl-32-cross",
    "sd3-512px",
    "sd15-32-part",
    "sdxl-cfg-multistep",
)
ARCHS = (80, 90, 120)
BLOCKS = {  # (op, case): blocks that an SM of an architecture is meant to hold, at least
    ("attention", "sd15-64-self"): {80: 3, 90: 2, 120: 3},
    ("attention", "sdxl-64-self"): {80: 2, 90: 2, 120: 2},
    ("attention", "sd15-32-self"): {80: 2, 90: 2, 120: 2},
    ("attention", "sdxl-32-cross"): {80: 3, 90: 5, 120: 3},
    ("joint_attention", "sd3-512px"): {80: 2, 90: 3, 120: 2},
}


@pytest.fixture(scope="module")
def rows_of(compiled):
    """rows_of(arch): the compiled launches of the main cases."""
    return cache(lambda arch: compiled([arch], cases=MAIN_CASES))


# compiling takes 15 s each, and CI runs `fastdiff inspect --models`
@pytest.fixture(params=[pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHS])
def arch(request):
    return request.param


def test_every_main_case_compiles(arch, rows_of):
    assert {row["case"] for row in rows_of(arch)} == set(MAIN_CASES)


def test_main_cases_are_without_fault(arch, rows_of):
    assert [fault for row in rows_of(arch) for fault in row["faults"]] == []
    assert all(row["registers"] <= 255 for row in rows_of(arch))


def test_attention_uses_the_matrix_instructions_of_its_architecture(arch, rows_of):
    used = {row["mma"] for row in rows_of(arch) if row["op"] == "attention"}
    assert used == {"wgmma" if arch == 90 else "mma.sync"}


def test_attention_holds_as_many_blocks_as_intended(arch, rows_of):
    held = {
        (row["op"], row["case"]): row["occupancy"] * SMS[arch].warps / row["num_warps"]
        for row in rows_of(arch)
    }
    for launch, blocks in BLOCKS.items():
        assert held[launch] >= blocks[arch] - 0.01, launch


def test_the_gate_keeps_enough_bytes_in_flight(arch, rows_of):
    """4.3 TB/s times 0.8 us over 132 SMs are 26 KiB an SM; a warp has 2 KiB in flight."""
    (gate,) = [row for row in rows_of(arch) if row["op"] == "gelu_gate"]
    assert gate["registers"] <= 48
    assert gate["occupancy"] * 48 * 2 >= 26  # 48 warps on sm_86, 89 and 120, 64 on the others


@pytest.mark.slow
def test_loads_of_40_wide_heads_are_pipelined(rows_of):
    """Without known alignment they are 2 bytes wide, too small for asynchronous copies."""
    row = next(row for row in rows_of(90) if row["case"] == "sd15-64-self")
    keys_and_values = 2 * 64 * 48 * 2
    assert row["shared"] >= row["num_stages"] * keys_and_values


@pytest.mark.slow
def test_full_size_cases_are_bound_by_compute_or_memory(rows_of):
    """The ridge is 295 FLOPs a byte. Self-attention of 4096 pixels does half as many FLOPs a byte
    as it has keys, 2048; cross-attention does as many as it has keys, 77."""
    bounds = {row["case"]: row["bound"] for row in rows_of(90)}
    assert bounds["sd15-64-self"] == bounds["sdxl-64-self"] == "compute"
    assert bounds["sd15-64-cross"] == bounds["sdxl-cfg-multistep"] == bounds["vae-top"] == "memory"


def test_each_launch_has_its_own_wanted_widths(arch, rows_of):
    """Attention's rows are whole vectors. The statistics of a norm are float32 and need no wide
    store, unless the launch also stores the sum of its inputs."""
    rows = rows_of(arch)
    widths = {(row["wants_load"], row["wants_store"]) for row in rows if row["op"] == "attention"}
    assert widths == {(16, 16)}
    statistics = [row for row in rows if row["kernel"] == "_statistics_kernel"]
    wide = {row["case"] for row in statistics if row["wants_store"]}
    assert wide == {"sd15-64-cat"}
    assert {row["case"] for row in statistics} > wide


def test_occupancy_follows_from_the_row(arch, rows_of):
    for row in rows_of(arch):
        again = occupancy(row["arch"], row["num_warps"], row["registers"], row["shared"])
        assert row["occupancy"] == round(again.share, 4) > 0
        assert row["limited_by"] == again.limited_by


GOOD = Compiled(
    op="attention",
    kernel="_flash_kernel",
    case="sd15-64-self",
    dtype="float16",
    arch=90,
    num_warps=8,
    num_stages=3,
    registers=168,
    spills=0,
    shared=65536,
    occupancy=0.25,
    limited_by="registers",
    load=16,
    store=16,
    mma="wgmma",
    wants_load=16,
    wants_store=16,
    wants_mma="wgmma",
    narrow=2,
    bound="compute",
)
BAD = {
    "spills 8 bytes per thread": {"spills": 8},
    "takes 233472 bytes of shared memory of 227 KiB": {"shared": 228 * 1024},
    "loads 8 bytes at once, not 16": {"load": 8},
    "stores 2 bytes at once, not 16": {"store": 2},
    "multiplies by mma.sync, not wgmma": {"mma": "mma.sync"},
    "multiplies by no matrix instruction, not wgmma": {"mma": ""},
}


@pytest.mark.parametrize("sentence", BAD)
def test_a_fault_is_a_sentence(sentence):
    assert GOOD.faults == replace(GOOD, load=32, wants_mma="", wants_store=0).faults == []
    where = "attention, _flash_kernel, sd15-64-self, float16, sm_90: "
    assert replace(GOOD, **BAD[sentence]).faults == [where + sentence]


def test_unknown_architecture_is_named():
    with pytest.raises(ValueError, match=r"unknown architectures \[75\]; known: "):
        table([75])


def test_interpreted_kernels_cannot_be_compiled():
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        table(list(SHARED_LIMIT)[:1])
