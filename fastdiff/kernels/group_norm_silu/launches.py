"""Which launch `group_norm_silu` gets: a rule by sizes, and what else a tuner may try."""

import math
from dataclasses import dataclass, replace

import triton

from fastdiff.kernels.contract import INTERPRETED_TILE, power_parts
from fastdiff.kernels.occupancy import multiprocessors
from fastdiff.kernels.tuned import tunable


@dataclass(frozen=True)
class LaunchConfig:
    """Groups per program, rows per tile, slabs per sample, warps. Slabs: 0 if the program keeps its
    groups on chip, 1 if it reads them twice, more in two launches."""

    groups: int
    rows: int
    slabs: int
    num_warps: int


# least bytes of a row per program: a line of L1, or a sector of it, or a load, where only that fits
# on chip
SEGMENT, SECTOR, VECTOR = 128, 32, 16
# warps by the most elements of a tile that stays on chip: 32 to 80 per thread. 16 warps have too
# few registers each for 20480
ONE_PASS = {1024: 1, 2560: 2, 5120: 4, 20480: 8}
# 128 elements of half precision per thread just fit, but neither beside GELU, modulation or a
# second picture nor on sm_100 and sm_120
MOST, ROOMY = 32768, (0, 80, 86, 89, 90)
# elements of a tile of the two slab kernels, 128 rows of 80 channels: 20 KB are loaded while 20 KB
# are processed, so that one program fills an SM; the interpreter is faster with few large tiles
SLAB_TILE, INTERPRETED_SMS = 10240, 16
SLAB_ROWS = 32  # least rows of a slab
# A program reads its groups twice, in one launch, if there are 2 programs for 5 SMs: at 64 bytes a
# clock these already use L2's whole bandwidth (5.5 TB/s on an H100). Up to this many bytes of a
# slab, they wait less for loads than a second launch takes. Computed, not measured.
# Groups in two tiles would need separate kernels: more to compile for few launches less
READERS, READ_TWICE = (2, 5), 128 * 1024
# groups per segment for which the one-pass kernel and the slab kernels are compiled, unless there
# are more; the one-pass kernel needs 30 more registers for 16
GROUPS = {True: 4, False: 16}


def _groups_of_a_program(W: int, G: int, size: int, least: int = SEGMENT) -> int:
    """The fewest groups whose segments have `least` bytes and begin at a multiple of 16 bytes."""

    def key(groups: int) -> tuple[int, bool, int]:
        width = groups * W * size
        short = width < least
        return -math.gcd(width, 16), short, -groups if short else groups

    return min((n for n in range(1, G + 1) if G % n == 0), key=key)


@tunable("group_norm_silu")
def pick(
    B: int, L: int, W: int, G: int, size: int, arch: int, plain: bool = True, border: int = 0
) -> LaunchConfig:
    """The launch for B samples of L pixels in G groups of W channels of `size` bytes. plain: they
    have no modulation and no GELU. border: the channel with which a second picture begins, or 0."""
    rows = triton.next_power_of_2(L)
    for least in (SEGMENT, SECTOR, VECTOR):
        groups = _groups_of_a_program(W, G, size, least)
        width = sum(power_parts(groups * W, 16 // size))
        one_picture = border % (groups * W) == 0
        roomy = arch in ROOMY and size == 2 and plain and one_picture
        on_chip = ONE_PASS | ({MOST: 8} if roomy else {})
        for most, num_warps in on_chip.items():
            if rows * width <= most:
                return LaunchConfig(groups, rows, 0, num_warps)
    groups = _groups_of_a_program(W, G, size, SECTOR)
    enough, sms = READERS
    many = sms * B * G // groups >= enough * _multiprocessors(arch)
    one_tile = power_parts(groups * W, 16 // size)[1] == 0
    if many and one_tile and L * groups * W * size <= READ_TWICE:
        rows, num_warps = _tile(groups * W, size, arch)
        return LaunchConfig(groups, rows, 1, num_warps)
    return _in_slabs(B, L, W, G, size, arch)


def _multiprocessors(arch: int) -> int:
    return multiprocessors(arch) if arch else INTERPRETED_SMS


def _tile(segment: int, size: int, arch: int) -> tuple[int, int]:
    """Rows of a tile of `segment` channels in a loop over a slab, and warps."""
    parts = [part for part in power_parts(segment, 16 // size) if part]
    tile, num_warps = SLAB_TILE if arch else INTERPRETED_TILE, 8
    if not (aligned := segment * size % 16 == 0):
        tile //= 4  # each element has its address in registers
    rows = 1 << (max(1, tile // sum(parts)).bit_length() - 1)
    if aligned:
        num_warps = max(1, min(16, rows * min(parts) * size // 512))  # 16 bytes per thread
    return rows, num_warps


def _in_slabs(B: int, L: int, W: int, G: int, size: int, arch: int) -> LaunchConfig:
    """The launch in two passes."""
    groups = _groups_of_a_program(W, G, size)
    rows, num_warps = _tile(groups * W, size, arch)
    sms, segments = _multiprocessors(arch), B * G // groups
    once, twice = sms // segments, 2 * sms // segments
    # one program per SM, or two if those fill the SMs by a tenth better
    slabs = twice if 5 * twice > 11 * once else once
    return LaunchConfig(groups, rows, max(1, min(slabs, L // SLAB_ROWS)), num_warps)


def candidates(
    B: int, L: int, W: int, G: int, size: int, arch: int, plain: bool = True, border: int = 0
) -> tuple[LaunchConfig, ...]:
    """Launches for a tuner to try, the default first; some spill or do not fit an architecture."""
    slabs = _in_slabs(B, L, W, G, size, arch)
    found = [pick(B, L, W, G, size, arch, plain, border), slabs, replace(slabs, slabs=1)]
    width, rows = sum(power_parts(slabs.groups * W, 16 // size)), triton.next_power_of_2(L)
    if rows * width <= 2 * max(ONE_PASS):
        found += [LaunchConfig(slabs.groups, rows, 0, num_warps) for num_warps in (4, 8, 16)]
    for more in (1, 2, 4):  # programs per SM
        several = replace(slabs, slabs=min(more * slabs.slabs, L))
        found += [several, replace(several, rows=max(1, slabs.rows // 2), num_warps=4)]
    if G % (2 * slabs.groups) == 0:
        rows = max(1, slabs.rows // 2)
        found += [replace(slabs, groups=2 * slabs.groups, slabs=2 * slabs.slabs, rows=rows)]
    return tuple(dict.fromkeys(found))
