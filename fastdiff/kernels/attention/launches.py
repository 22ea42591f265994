"""Which launch `attention` gets, and `joint_attention` its tiles: rules by sizes, and what else a
tuner may try."""

from dataclasses import dataclass
from itertools import product

from fastdiff.kernels.contract import power_parts
from fastdiff.kernels.tuned import tunable


@dataclass(frozen=True)
class LaunchConfig:
    """Queries per tile, keys per block (0: all stay on chip), warps, pipeline stages, columns of a
    program (0: a head's)."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    columns: int = 0


# (kind of architecture, or a small one; widest head; LaunchConfig); comments: blocks per SM, by
# registers
FLASH = (
    # sm_90, 100. Two blocks: one multiplies while the other exponentiates. 128 queries, so 64 bytes
    # from L2 serve 8192 FLOPs. At width 64, 4 warps take 8.2 instructions per score, 8 take 9.7
    ("largest", 64, 128, 64, 4, 3),
    # width 80: two blocks, one with a partial block of keys; 4 warps spill
    ("largest", 128, 128, 64, 8, 3),
    ("largest", 256, 128, 64, 8, 2),  # one block
    ("largest", 512, 64, 16, 8, 2),  # a VAE's single head, 64 x 512 accumulators; 32 keys spill
    # sm_80, 86, 89 and 120 (a block has 99 KiB of shared memory): two or three blocks
    ("large", 80, 64, 64, 4, 3),
    ("large", 128, 128, 64, 8, 3),  # one block, as in the next row
    ("large", 256, 128, 32, 8, 2),
    ("large", 512, 64, 32, 8, 2),
    ("small", 64, 64, 64, 4, 3),  # with 2 stages the block with masked keys spills
    ("small", 80, 64, 64, 4, 2),  # with 3 stages only one block fits shared memory
    ("small", 96, 128, 32, 8, 3),
    ("sm_120", 128, 64, 32, 8, 3),  # with 2 stages Triton 3.6 spills 8 bytes
    ("small", 128, 64, 32, 8, 2),  # with 4 warps, or 128 queries, the block with masked keys spills
    ("small", 256, 64, 16, 4, 2),
    ("small", 512, 32, 16, 4, 1),
    ("fp32", 64, 32, 16, 4, 1),  # dots are fused multiply-adds in registers
    ("fp32", 160, 16, 16, 4, 1),
    ("fp32", 512, 16, 16, 8, 1),
    ("interpreted", 512, 256, 128, 1, 1),  # its time is per operation, whatever the size
)
"""Chosen by their compiled code; nothing is measured yet."""
KINDS = {0: "interpreted", 80: "large", 90: "largest", 100: "largest"}  # all others are small
SHARED = {"largest": 227, "large": 163, "small": 99}  # KiB per block
# fp32 values of scores and result per thread; nearly all configurations above this spill
ACCUMULATORS = 128
# the most keys to keep on chip, and KiB of K and V: four prompts, or two if mma.sync needs
# registers
ON_CHIP = {"largest": (320, 96), "large": (128, 64), "small": (160, 48), "interpreted": (320, 96)}
PROMPT_KEYS = 128  # up to here 4 warps do 64 queries at a time; beyond, 8 warps
PROMPT_PROGRAMS = 528  # four per SM of an H100
WIDE, WIDE_KEYS, COLUMNS = 256, 256, 64
"""Programs share the columns of heads wider than this if they have so few keys."""


def stream(K: int, size: int, arch: int) -> LaunchConfig:
    """The row of `FLASH` for heads K wide, `size` bytes per element. ValueError beyond 512."""
    kind = "fp32" if size == 4 and arch else KINDS.get(arch, "small")
    own = f"sm_{arch}" if kind == "small" else kind
    for row_kind, widest, *config in FLASH:
        if row_kind in (kind, own) and widest >= K:
            return LaunchConfig(*config)
    raise ValueError(f"attention: heads are {K} wide; the kernel takes at most 512")


def streams(K: int, size: int, arch: int) -> tuple[LaunchConfig, ...]:
    """Launches for a tuner to try, `stream`'s first: those that fit a block."""
    own, kind, width = stream(K, size, arch), KINDS.get(arch, "small"), sum(power_parts(K, 16))
    if size == 4 or not arch:
        return (own,)
    return (own,) + tuple(
        config
        for queries, keys, warps, stages in product((128, 64), (128, 64, 32), (4, 8), (2, 3))
        if (config := LaunchConfig(queries, keys, warps, stages)) != own
        and queries * (width + keys) <= ACCUMULATORS * 32 * warps
        and queries >= 16 * warps
        and size * width * (queries + 2 * keys * stages) <= SHARED[kind] * 1024
    )


def is_wide(K: int, Lk: int) -> bool:
    """Whether programs share the columns of heads K wide, in half precision."""
    return K > WIDE and K % COLUMNS == 0 and Lk <= WIDE_KEYS


@tunable("attention")
def pick(Lk: int, K: int, size: int, arch: int) -> LaunchConfig:
    """The launch for Lk keys of heads K wide, `size` bytes per element. ValueError beyond 512."""
    kind = KINDS.get(arch, "small")
    if size < 4 and is_wide(K, Lk):
        return LaunchConfig(64, 0, 8, 2, COLUMNS)
    keys, (most_keys, most_kib) = sum(power_parts(Lk, 16)), ON_CHIP[kind]
    kib = 2 * keys * sum(power_parts(K, 16)) * size / 1024
    if size < 4 and keys <= most_keys and kib <= most_kib:
        # heads 160 wide spill 16 bytes in 4 warps on sm_120
        if keys > PROMPT_KEYS or (kind == "small" and K > 128):
            return LaunchConfig(64, 0, 8, 1)
        # on sm_100 4 warps spill 24 bytes with a mask
        return LaunchConfig(128, 0, 8, 1) if arch == 100 else LaunchConfig(64, 0, 4, 1)
    return stream(K, size, arch)


def candidates(Lk: int, K: int, size: int, arch: int) -> tuple[LaunchConfig, ...]:
    """Launches for a tuner to try, `pick`'s first."""
    own = pick(Lk, K, size, arch)
    if own.columns:
        return own, stream(K, size, arch)
    if own.keys:
        return streams(K, size, arch)
    others = (LaunchConfig(128, 0, 8, 1), LaunchConfig(64, 0, 4, 1), stream(K, size, arch))
    return tuple(dict.fromkeys((own, *others))) if arch else (own,)
