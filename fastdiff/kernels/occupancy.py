"""What a multiprocessor (SM) holds of a kernel, and whether memory or arithmetic bounds a case.

The limits are from the CUDA programming guide, "Compute Capabilities", tables 30 and 31; how they
are handed out is from NVIDIA's calculator (`cuda_occupancy.h`), against which the tests hold us.
https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/compute-capabilities.html
"""

from dataclasses import dataclass

REGISTERS = 64 * 1024
"""Registers of 32 bits on every SM since sm_80."""
PARTITIONS = 4
"""Each has a quarter of the registers; a warp lives in one of them."""
REGISTER_UNIT = 256
"""Registers are given to a warp in multiples of this."""
SHARED_UNIT = 128
"""Shared memory is given to a block in multiples of this, in bytes."""
SHARED_RESERVED = 1024
"""Shared memory that the system takes for each block, in bytes."""
TENSOR_COLUMNS = 512
"""Tensor memory of an SM of sm_100, in columns (PTX ISA, "Tensor Memory")."""


@dataclass(frozen=True)
class Sm:
    """What is resident on an SM at most, and the ridge of a GPU made of them."""

    number: int
    """Of SMs on that GPU."""
    warps: int
    blocks: int
    shared: int
    """KiB for all blocks together; one block may have 1 KiB less."""
    tflops: float
    """Dense float16 products summed in float32, in TFLOP/s."""
    bandwidth: float
    """Of its memory, in TB/s."""

    @property
    def ridge(self) -> float:
        """FLOPs for each byte of memory traffic at which both take equally long."""
        return self.tflops / self.bandwidth


# number, tflops and bandwidth by NVIDIA's data sheets and architecture white papers
SMS = {
    80: Sm(108, 64, 32, 164, tflops=312.0, bandwidth=2.039),  # A100 SXM 80 GB
    86: Sm(82, 48, 16, 100, tflops=71.0, bandwidth=0.936),  # GeForce RTX 3090
    89: Sm(128, 48, 24, 100, tflops=165.2, bandwidth=1.008),  # GeForce RTX 4090
    90: Sm(132, 64, 32, 228, tflops=989.4, bandwidth=3.35),  # H100 SXM
    100: Sm(148, 64, 32, 228, tflops=2250.0, bandwidth=8.0),  # B200
    120: Sm(170, 48, 24, 100, tflops=209.5, bandwidth=1.792),  # GeForce RTX 5090
}


def multiprocessors(arch: int) -> int:
    """SMs of the GPU in `SMS`; 128 for an architecture that is not there."""
    return SMS[arch].number if arch in SMS else 128


@dataclass(frozen=True)
class Occupancy:
    """How full an SM gets at most."""

    share: float
    """Resident warps of those that an SM can hold, 0 to 1; 0: a block does not fit."""
    limited_by: str
    """What runs out first; "warps" wherever nothing else keeps more warps out."""


def occupancy(
    arch: int, num_warps: int, registers: int, shared: int, tensor_columns: int = 0
) -> Occupancy:
    """The bound for blocks of `num_warps` warps.

    registers: for each thread. shared: bytes for each block. tensor_columns: for each block.
    """
    sm = SMS[arch]
    for_warp = _up(32 * registers, REGISTER_UNIT)
    for_block = _up(shared + SHARED_RESERVED, SHARED_UNIT)
    resident = REGISTERS // PARTITIONS // max(for_warp, 1) * PARTITIONS
    blocks = {
        "warps": sm.warps // num_warps,
        "blocks": sm.blocks,
        "registers": resident // num_warps,
        "shared memory": sm.shared * 1024 // for_block,
    }
    if tensor_columns:
        blocks["tensor memory"] = TENSOR_COLUMNS // tensor_columns
    limit = min(blocks, key=lambda name: blocks[name])  # the first of equals
    return Occupancy(blocks[limit] * num_warps / sm.warps, limit)


def bound(arch: int, flops: int, traffic: int) -> str:
    """ "compute" or "memory": what a case of so many FLOPs and bytes waits for at best, on the GPU
    of `SMS` and at the rate of float16."""
    return "compute" if flops > SMS[arch].ridge * traffic else "memory"


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
