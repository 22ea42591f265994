"""What both Triton kernels of `guided_step` compute of a sample's elements."""

import triton
import triton.language as tl

from fastdiff.kernels.guided_step import spec

# a kernel may read only globals that are constexpr
CLIP_SAMPLE, CLIP_OUTPUT = tl.constexpr(spec.CLIP_SAMPLE), tl.constexpr(spec.CLIP_OUTPUT)


@triton.jit
def placed(offsets, WIDE: tl.constexpr):
    """Where the network's outputs for a sample's elements are. WIDE: the sample's channels, if the
    network gives twice as many."""
    if WIDE == 0:
        return offsets
    return offsets + offsets // WIDE * WIDE


@triton.jit
def guided_output(
    output_ptr, copy, offsets, inside, guidance, perturbed, COPIES: tl.constexpr, WIDE: tl.constexpr
):
    """The guided output and its text part, both fp32; without guidance, the output twice."""
    at = placed(offsets, WIDE)
    output = tl.load(output_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if COPIES == 1:
        return output, output
    text = tl.load(output_ptr + copy + at, mask=inside, other=0.0).to(tl.float32)
    output += guidance * (text - output)
    if COPIES == 3:
        used = tl.where(perturbed != 0, inside, False)
        third = tl.load(output_ptr + 2 * copy + at, mask=used, other=0.0).to(tl.float32)
        output += perturbed * (text - third)
    return output, text


@triton.jit
def deviation_ratio(
    output_ptr, copy, E, guidance, perturbed,
    REDUCE: tl.constexpr, COPIES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """std(text) / std(guided) over the E elements of a sample, each in two passes."""
    guided_sum = tl.zeros((REDUCE,), tl.float32)
    text_sum = tl.zeros((REDUCE,), tl.float32)
    for start in range(0, E, REDUCE):
        offsets = start + tl.arange(0, REDUCE)
        guided, text = guided_output(
            output_ptr, copy, offsets, offsets < E, guidance, perturbed, COPIES, WIDE
        )
        guided_sum += guided
        text_sum += text
    guided_mean = tl.sum(guided_sum, 0) / E
    text_mean = tl.sum(text_sum, 0) / E
    guided_sum = tl.zeros((REDUCE,), tl.float32)
    text_sum = tl.zeros((REDUCE,), tl.float32)
    for start in range(0, E, REDUCE):
        offsets = start + tl.arange(0, REDUCE)
        inside = offsets < E
        guided, text = guided_output(
            output_ptr, copy, offsets, inside, guidance, perturbed, COPIES, WIDE
        )
        guided = tl.where(inside, guided - guided_mean, 0.0)
        text = tl.where(inside, text - text_mean, 0.0)
        guided_sum += guided * guided
        text_sum += text * text
    return tl.sqrt_rn(tl.sum(text_sum, 0)) / tl.sqrt_rn(tl.sum(guided_sum, 0))


@triton.jit
def clean_bits(
    output_ptr, copy, sample_ptr, row, factor, offsets, inside, guidance, perturbed,
    COPIES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The estimates of the clean picture, without signs, as integers of the same order."""
    output, _ = guided_output(output_ptr, copy, offsets, inside, guidance, perturbed, COPIES, WIDE)
    sample = tl.load(sample_ptr + offsets, mask=inside, other=0.0)
    clean = tl.load(row + CLIP_SAMPLE) * sample + tl.load(row + CLIP_OUTPUT) * (factor * output)
    return clean.to(tl.int32, bitcast=True) & 0x7FFFFFFF
