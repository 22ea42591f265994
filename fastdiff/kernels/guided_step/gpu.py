"""Triton implementation of `guided_step`: one launch, whatever the scheduler. Dynamic thresholding
takes one more, since the quantile of a whole sample must be known first.

The step and its row of coefficients are read on the device, so a graph can replay the launch.
Guidance rescale needs standard deviations over a sample. If the row asks for it, each program
computes them over its whole sample (a few reads of L2) instead of waiting for the others.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastdiff.kernels.contract import Launch, Launcher
from fastdiff.kernels.guided_step import spec
from fastdiff.kernels.guided_step.spec import Arguments
from fastdiff.kernels.guided_step.tiles import clean_bits, deviation_ratio, guided_output, placed
from fastdiff.kernels.tuned import tunable

# a kernel may read only globals that are constexpr
GUIDANCE, RESCALE = tl.constexpr(spec.GUIDANCE), tl.constexpr(spec.RESCALE)
PERTURBED, LEARNED = tl.constexpr(spec.PERTURBED), tl.constexpr(spec.LEARNED)
SAMPLE, NOISE = tl.constexpr(spec.SAMPLE), tl.constexpr(spec.NOISE)
NEXT_SCALE, HISTORY = tl.constexpr(spec.NEXT_SCALE), tl.constexpr(spec.HISTORY)
CLIP_SAMPLE, CLIP_OUTPUT = tl.constexpr(spec.CLIP_SAMPLE), tl.constexpr(spec.CLIP_OUTPUT)
LIMIT, CEILING = tl.constexpr(spec.LIMIT), tl.constexpr(spec.CEILING)
QUANTILE = tl.constexpr(spec.QUANTILE)
KEPT_ORIGINAL, KEPT_NOISE = tl.constexpr(spec.KEPT_ORIGINAL), tl.constexpr(spec.KEPT_NOISE)


@triton.jit
def _limits_kernel(
    output_ptr, table_ptr, step_ptr, E, columns, sample_ptr, limits_ptr,
    COPIES: tl.constexpr, EACH: tl.constexpr, WIDE: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Each program finds a quantile of one sample, bit by bit: it counts what is at most a bound,
    and halves the range of the bounds."""
    picture = tl.program_id(0).to(tl.int64)
    all = tl.num_programs(0).to(tl.int64) * E
    copy = all if WIDE == 0 else 2 * all
    output_ptr += picture * E if WIDE == 0 else 2 * picture * E
    sample_ptr += picture * E
    if EACH:
        step_ptr += picture
    step = tl.load(step_ptr).to(tl.int64)
    if EACH:  # noqa: SIM102 (the kernel language knows no other way)
        if step < 0:  # an empty place
            return
    row = table_ptr + step * columns
    guidance = tl.load(row + GUIDANCE)
    perturbed = 0.0
    if COPIES == 3:
        perturbed = tl.load(row + PERTURBED)
    factor = 1.0
    if COPIES > 1:
        rescale = tl.load(row + RESCALE)
        if rescale != 0:
            ratio = deviation_ratio(output_ptr, copy, E, guidance, perturbed, REDUCE, COPIES, WIDE)
            factor = rescale * ratio + (1 - rescale)
    position = tl.load(row + QUANTILE).to(tl.float64) * (E - 1)
    rank = position.to(tl.int32)
    least, most = 0, tl.full((), 0x7F800000, tl.int32)  # infinity
    for _ in range(31):
        bound = least + (most - least) // 2
        count = tl.zeros((REDUCE,), tl.int32)
        for start in range(0, E, REDUCE):
            offsets = start + tl.arange(0, REDUCE)
            inside = offsets < E
            bits = clean_bits(
                output_ptr, copy, sample_ptr, row, factor, offsets, inside, guidance, perturbed,
                COPIES, WIDE,
            )  # fmt: skip
            count += (inside & (bits <= bound)).to(tl.int32)
        enough = tl.sum(count, 0) > rank
        most = tl.where(enough, bound, most)
        least = tl.where(enough, least, bound + 1)
    count = tl.zeros((REDUCE,), tl.int32)
    above = tl.full((REDUCE,), 0x7FFFFFFF, tl.int32)
    largest = tl.zeros((REDUCE,), tl.int32)
    for start in range(0, E, REDUCE):
        offsets = start + tl.arange(0, REDUCE)
        inside = offsets < E
        bits = clean_bits(
            output_ptr, copy, sample_ptr, row, factor, offsets, inside, guidance, perturbed,
            COPIES, WIDE,
        )  # fmt: skip
        count += (inside & (bits <= most)).to(tl.int32)
        above = tl.minimum(above, tl.where(inside & (bits > most), bits, 0x7FFFFFFF))
        largest = tl.maximum(largest, tl.where(inside, bits, 0))
    value = most.to(tl.float32, bitcast=True)
    following = tl.where(tl.sum(count, 0) > rank + 1, most, tl.min(above, 0))
    between = (position - rank).to(tl.float32)
    if between > 0:
        value += between * (following.to(tl.float32, bitcast=True) - value)
    limit = tl.minimum(tl.maximum(value, tl.load(row + LIMIT)), tl.load(row + CEILING))
    limit = tl.where(tl.max(largest, 0) > 0x7F800000, float("nan"), limit)
    tl.store(limits_ptr + picture, limit)


@triton.jit
def _guided_step_kernel(
    output_ptr, table_ptr, step_ptr, noise_ptr, mask_ptr, original_ptr, original_noise_ptr,
    limits_ptr, E, columns, sample_ptr, history_ptr, next_ptr,
    COPIES: tl.constexpr, DEPTH: tl.constexpr, EACH: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Each program updates BLOCK of the E elements of one sample. EACH: whether every sample is at
    its own step. WIDE as in `placed`."""
    first = tl.program_id(1).to(tl.int64) * E
    all = tl.num_programs(1).to(tl.int64) * E  # elements of a whole batch
    copy = all if WIDE == 0 else 2 * all
    output_ptr += first if WIDE == 0 else 2 * first
    if EACH:
        step_ptr += tl.program_id(1)
    step = tl.load(step_ptr).to(tl.int64)
    if EACH:  # noqa: SIM102 (the kernel language knows no other way)
        if step < 0:  # an empty place
            return
    row = table_ptr + step * columns
    guidance = tl.load(row + GUIDANCE)
    perturbed = 0.0
    if COPIES == 3:
        perturbed = tl.load(row + PERTURBED)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < E
    output, _ = guided_output(output_ptr, copy, offsets, inside, guidance, perturbed, COPIES, WIDE)
    if COPIES > 1:
        rescale = tl.load(row + RESCALE)
        if rescale != 0:
            ratio = deviation_ratio(output_ptr, copy, E, guidance, perturbed, REDUCE, COPIES, WIDE)
            output = rescale * (output * ratio) + (1 - rescale) * output
    own = first + offsets
    sample = tl.load(sample_ptr + own, mask=inside, other=0.0)
    result = tl.load(row + SAMPLE) * sample + tl.load(row + HISTORY) * output
    limit = tl.load(row + LIMIT)
    if limit != 0:
        clean = tl.load(row + CLIP_SAMPLE) * sample + tl.load(row + CLIP_OUTPUT) * output
        if limits_ptr is None:
            result += tl.clamp(clean, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        else:
            most = tl.load(limits_ptr + tl.program_id(1))
            clean = tl.clamp(clean, -most, most, propagate_nan=tl.PropagateNan.ALL)
            result += clean * (limit / most)
    for h in tl.static_range(1, DEPTH + 1):
        slot = (step - h + DEPTH) % DEPTH
        b = tl.load(row + HISTORY + h)
        c = tl.load(row + HISTORY + DEPTH + h)
        # entries with a zero coefficient may not be written yet, so mask them
        outputs = history_ptr + slot * all + own
        result += b * tl.load(outputs, mask=tl.where(b != 0, inside, False), other=0.0)
        result += c * tl.load(
            outputs + DEPTH * all, mask=tl.where(c != 0, inside, False), other=0.0
        )
    if noise_ptr is not None:
        factor = tl.load(row + NOISE)
        if WIDE != 0:
            learned = tl.load(row + LEARNED)
            text = output_ptr + (copy if COPIES > 1 else 0)
            variance = tl.load(
                text + placed(offsets, WIDE) + WIDE,
                mask=tl.where(learned != 0, inside, False),
                other=0.0,
            )
            factor = factor * tl.exp(learned * variance.to(tl.float32))
        result += factor * tl.load(noise_ptr + own, mask=inside, other=0.0)
    if mask_ptr is not None:
        kept = sample
        if original_ptr is not None:
            kept = tl.load(row + KEPT_ORIGINAL) * tl.load(
                original_ptr + own, mask=inside, other=0.0
            )
            kept += tl.load(row + KEPT_NOISE) * tl.load(
                original_noise_ptr + own, mask=inside, other=0.0
            )
        mask = tl.load(mask_ptr + own, mask=inside, other=0.0)
        result = mask * result + (1 - mask) * kept
    if DEPTH > 0:
        slot = step % DEPTH
        tl.store(history_ptr + slot * all + own, output, mask=inside)
        tl.store(history_ptr + (DEPTH + slot) * all + own, sample, mask=inside)
    tl.store(sample_ptr + own, result, mask=inside)
    following = tl.load(row + NEXT_SCALE) * result
    tl.store(next_ptr + own, following, mask=inside)


@dataclass(frozen=True)
class LaunchConfig:
    """Elements per program, elements that a pass of the reduction reads at once, warps."""

    block: int
    reduce: int
    num_warps: int


# (largest sample in elements, config): enough programs to hide L2's latency, and at least eight
# elements per thread, 16 bytes in half precision
CONFIGS = (
    (4096, LaunchConfig(256, 512, 1)),
    (65536, LaunchConfig(1024, 4096, 4)),
    (2**62, LaunchConfig(2048, 4096, 8)),
)
MOST = 16384
"""Elements that the launch which finds the limits of thresholding reads at once, at 32 a thread;
one program reads a whole sample, again and again."""
ALIGNED = 16  # elements: Triton only checks whether a size is a multiple of this


@tunable("guided_step")
def pick(E: int, arch: int) -> LaunchConfig:
    """The launch for samples of E elements; not measured, the same for all architectures."""
    return next(config for most, config in CONFIGS if most >= E)


def candidates(E: int, arch: int) -> tuple[LaunchConfig, ...]:
    """Launches for a tuner to try: block sizes, with one or two 16-byte vectors per thread."""
    offered = [
        LaunchConfig(block, 512 * (block // 32 // each), block // 32 // each)
        for block in (256, 512, 1024, 2048, 4096)
        for each in (8, 16)  # elements per thread
    ]
    return tuple(config for config in offered if config.block < 2 * E and config.num_warps <= 16)


def plan(arch: int, a: Arguments) -> tuple[tuple[Launch, ...], None]:
    """The launch; sample, history and the next input are written in place."""
    for name, tensor in (("sample", a.sample), ("history", a.history), ("table", a.table)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"guided_step: {name} is {tensor.dtype}; the kernel takes float32")
    extra = (a.noise, a.mask, a.original, a.original_noise, a.limits)
    tensors = (a.model_output, a.sample, a.history, a.following, a.table, *extra)
    if not all(t is None or t.is_contiguous() for t in tensors):
        raise ValueError("guided_step: all tensors must be contiguous")
    batch, copies, depth = (
        a.sample.shape[0],
        a.model_output.shape[0] // a.sample.shape[0],
        a.history.shape[1],
    )
    elements, width = a.sample.numel() // batch, a.sample.shape[-1]
    config = pick(elements, arch)
    arguments = {
        "output_ptr": a.model_output,
        "table_ptr": a.table,
        "step_ptr": a.step,
        "noise_ptr": a.noise,
        "mask_ptr": a.mask,
        "original_ptr": a.original,
        "original_noise_ptr": a.original_noise,
        "limits_ptr": a.limits,
        "E": elements,
        "columns": a.table.shape[1],
        "sample_ptr": a.sample,
        "history_ptr": a.history,
        "next_ptr": a.following,
    }
    constants = {
        "COPIES": copies,
        "DEPTH": depth,
        "EACH": a.step.numel() > 1,
        "WIDE": width if a.model_output.shape[-1] == 2 * width else 0,
        "BLOCK": config.block,
        "REDUCE": config.reduce,
    }
    grid = (triton.cdiv(elements, config.block), batch)
    vector = 16 if elements % ALIGNED == 0 else a.model_output.element_size()
    launch = Launch(
        _guided_step_kernel, arguments, constants, grid, config.num_warps, vector=vector
    )
    if a.limits is None:
        return (launch,), None
    names = ("output_ptr", "table_ptr", "step_ptr", "E", "columns", "sample_ptr", "limits_ptr")
    shared = {name: constants[name] for name in ("COPIES", "EACH", "WIDE")}
    block = min(MOST, triton.next_power_of_2(elements))
    limits = Launch(
        _limits_kernel,
        {name: arguments[name] for name in names},
        shared | {"REDUCE": block},
        (batch,),
        max(1, block // 1024),
        vector=vector,
    )
    return (limits, launch), None


run = Launcher(Arguments, plan)
