"""Occupancy against sums done by hand and against NVIDIA's own calculator; the roofline's ridge."""

import itertools
import subprocess
from pathlib import Path

import pytest
import triton

from fastdiff.kernels.occupancy import SMS, Occupancy, bound, occupancy

BY_HAND = {
    # 32 registers are 1024 a warp: 16 warps in each quarter's 16384, 64 in all, the maximum
    "everything fits": ((90, 4, 32, 0), 1.0, "warps"),
    # 33 are rounded up to 40: 12 warps in a quarter, 48 of 64
    "registers come in units": ((90, 4, 33, 0), 48 / 64, "registers"),
    # 255 are 8192 a warp: 2 warps in a quarter, 8 on the SM, one block of 8
    "all registers": ((80, 8, 255, 0), 8 / 64, "registers"),
    # 200 are 6400 a warp: 2 warps in each quarter's 16384, and not 10 in all 65536
    "a warp lives in one quarter": ((90, 1, 200, 0), 8 / 64, "registers"),
    # 64 KiB and 1 KiB for the system are 65 KiB: 3 blocks in 228 KiB
    "shared memory": ((90, 4, 32, 64 * 1024), 12 / 64, "shared memory"),
    # 56 KiB and 1 KiB for the system are 57 KiB: exactly 4 blocks in 228 KiB
    "the system's share fits": ((90, 4, 32, 56 * 1024), 16 / 64, "shared memory"),
    "the system's share does not": ((90, 4, 32, 56 * 1024 + 1), 12 / 64, "shared memory"),
    # a block may have at most 99 KiB
    "the largest block": ((120, 8, 32, 99 * 1024), 8 / 48, "shared memory"),
    "too large a block": ((120, 8, 32, 99 * 1024 + 1), 0.0, "shared memory"),
    # blocks of one warp: an SM takes at most 32, 24 or 16, however little they need
    "blocks of sm_90": ((90, 1, 32, 0), 32 / 64, "blocks"),
    "blocks of sm_89": ((89, 1, 32, 0), 24 / 48, "blocks"),
    "blocks of sm_86": ((86, 1, 32, 0), 16 / 48, "blocks"),
    # 48 warps are not a multiple of 32
    "warps that are left over": ((86, 32, 32, 0), 32 / 48, "warps"),
    # warps of 72 registers: 7 in each quarter, 28 on the SM, so no block of 32 warps fits
    "a block of too many registers": ((90, 32, 72, 0), 0.0, "registers"),
    # a block takes 256 of 512 columns
    "tensor memory": ((100, 4, 64, 0, 256), 8 / 64, "tensor memory"),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_occupancy_by_hand(name):
    arguments, share, limited_by = BY_HAND[name]
    assert occupancy(*arguments) == Occupancy(share, limited_by)


CALCULATOR = """
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
    int arch, max_warps, shared_kib, warps, registers, shared;
    while (std::scanf("%d %d %d %d %d %d", &arch, &max_warps, &shared_kib, &warps, &registers,
                      &shared) == 6) {
        cudaOccDeviceProp sm;
        sm.computeMajor = arch / 10;
        sm.computeMinor = arch % 10;
        sm.maxThreadsPerBlock = 1024;
        sm.maxThreadsPerMultiprocessor = 32 * max_warps;
        sm.regsPerBlock = sm.regsPerMultiprocessor = 65536;
        sm.warpSize = 32;
        sm.sharedMemPerBlock = 48 << 10;
        sm.sharedMemPerMultiprocessor = (size_t)shared_kib << 10;
        sm.sharedMemPerBlockOptin = (size_t)(shared_kib - 1) << 10;
        sm.reservedSharedMemPerBlock = 1 << 10;
        sm.numSms = 1;
        cudaOccFuncAttributes kernel;
        kernel.maxThreadsPerBlock = 1024;
        kernel.numRegs = registers;
        kernel.sharedSizeBytes = 0;
        kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        kernel.maxDynamicSharedSizeBytes = sm.sharedMemPerBlockOptin;
        cudaOccDeviceState state;
        state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
        cudaOccResult result;
        if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &sm, &kernel, &state, 32 * warps,
                                                    shared) != CUDA_OCC_SUCCESS)
            return 1;
        std::printf("%d\\n", result.activeBlocksPerMultiprocessor);
    }
}
"""


def test_nvidias_calculator_says_the_same(tmp_path):
    """Triton's wheel contains `cuda_occupancy.h` of the CUDA toolkit."""
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    source, program = tmp_path / "calculator.cpp", tmp_path / "calculator"
    source.write_text(CALCULATOR)
    subprocess.run(["c++", "-w", f"-I{include}", source, "-o", program], check=True)
    registers = (16, 31, 32, 33, 64, 72, 96, 128, 129, 168, 200, 255)
    shared = (0, 1, 4096, 10_000, 33_000, 49_152, 50_000, 80_000, 101_376, 101_377, 200_000)
    cases = list(itertools.product(SMS, (1, 2, 4, 7, 8, 12, 16, 32), registers, shared))
    asked = "\n".join(
        f"{arch} {SMS[arch].warps} {SMS[arch].shared} {warps} {number} {size}"
        for arch, warps, number, size in cases
    )
    done = subprocess.run([program], input=asked, capture_output=True, text=True, check=True)
    theirs = list(map(int, done.stdout.split()))
    ours = [round(occupancy(*case).share * SMS[case[0]].warps / case[1]) for case in cases]
    differ = [(case, a, b) for case, a, b in zip(cases, ours, theirs, strict=True) if a != b]
    assert not differ[:5]
    assert len(set(theirs)) > 10


def test_the_ridge_separates_memory_bound_from_compute_bound():
    """H100: 989.4 TFLOP/s over 3.35 TB/s are 295.3 FLOPs a byte."""
    assert bound(90, 295_000, 1000) == "memory"
    assert bound(90, 296_000, 1000) == "compute"
    assert bound(86, 76_000, 1000) == "compute"
    assert bound(90, 0, 1) == "memory"
