"""How many warps of a kernel fit on a multiprocessor (SM), and what bounds a case.

The limits are from the CUDA programming guide, "Compute Capabilities", tables 30 and 31. The
allocation rules are from NVIDIA's calculator (`cuda_occupancy.h`), which the tests compare with.
https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/compute-capabilities.html
"""

from dataclasses import dataclass

REGISTERS = 64 * 1024
"""32-bit registers per SM, since sm_80."""
PARTITIONS = 4
"""Partitions of an SM, each with a quarter of the registers; a warp stays in one of them."""
REGISTER_UNIT = 256
"""A warp's registers are allocated in multiples of this."""
SHARED_UNIT = 128
"""A block's shared memory is allocated in multiples of this, in bytes."""
SHARED_RESERVED = 1024
"""Shared memory that the system reserves per block, in bytes."""
TENSOR_COLUMNS = 512
"""Tensor memory of an SM of sm_100, in columns (PTX ISA, "Tensor Memory")."""


@dataclass(frozen=True)
class Sm:
    """The limits of an SM, and the peak rates of a GPU with such SMs."""

    number: int
    """How many SMs that GPU has."""
    warps: int
    blocks: int
    shared: int
    """KiB for all blocks together; one block may use 1 KiB less."""
    tflops: float
    """Dense float16 products summed in float32, in TFLOP/s."""
    bandwidth: float
    """The GPU memory's bandwidth, in TB/s."""

    @property
    def ridge(self) -> float:
        """FLOPs per byte of memory traffic at which both take equally long."""
        return self.tflops / self.bandwidth


# number, tflops and bandwidth are from NVIDIA's data sheets and architecture white papers
SMS = {
    80: Sm(108, 64, 32, 164, tflops=312.0, bandwidth=2.039),  # A100 SXM 80 GB
    86: Sm(82, 48, 16, 100, tflops=71.0, bandwidth=0.936),  # GeForce RTX 3090
    89: Sm(128, 48, 24, 100, tflops=165.2, bandwidth=1.008),  # GeForce RTX 4090
    90: Sm(132, 64, 32, 228, tflops=989.4, bandwidth=3.35),  # H100 SXM
    100: Sm(148, 64, 32, 228, tflops=2250.0, bandwidth=8.0),  # B200
    120: Sm(170, 48, 24, 100, tflops=209.5, bandwidth=1.792),  # GeForce RTX 5090
}


def multiprocessors(arch: int) -> int:
    """The number of SMs of the GPU in `SMS`; 128 for an unknown architecture."""
    return SMS[arch].number if arch in SMS else 128


@dataclass(frozen=True)
class Occupancy:
    """How full an SM can get."""

    share: float
    """Resident warps as a share of an SM's maximum, 0 to 1; 0: a block does not fit."""
    limited_by: str
    """The limit that is reached first; "warps" if no other limit comes before it."""


def occupancy(
    arch: int, num_warps: int, registers: int, shared: int, tensor_columns: int = 0
) -> Occupancy:
    """The occupancy for blocks of `num_warps` warps.

    registers: per thread. shared: bytes per block. tensor_columns: per block.
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
    """ "compute" or "memory": the bound of a case with these FLOPs and bytes of traffic on the GPU
    in `SMS`, at float16's rate."""
    return "compute" if flops > SMS[arch].ridge * traffic else "memory"


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
