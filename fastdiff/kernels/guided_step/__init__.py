"""Everything after the network in one launch: guidance, scheduler step, the next input."""

import torch
from torch import Tensor

from fastdiff.kernels.dispatch import register
from fastdiff.kernels.guided_step import cpu
from fastdiff.kernels.guided_step.spec import HISTORY, SPEC

_op = register(SPEC, cpu=cpu.run, gpu="fastdiff.kernels.guided_step.gpu")


def guided_step(
    model_output: Tensor,
    sample: Tensor,
    history: Tensor,
    following: Tensor,
    table: Tensor,
    step: Tensor,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    original: Tensor | None = None,
    original_noise: Tensor | None = None,
    limits: Tensor | None = None,
) -> None:
    """One step of any scheduler that is linear in the samples, outputs and noise, or that clips its
    estimate of the clean picture.

    With g, φ, w, a, d, k, s, p, q, r, t, h, u, v, b_0..b_M, c_1..c_M from the row `table[step]`, or
    from a row for each sample:

        ε  = ε_1 + g (ε_2 - ε_1)                                (with two or three outputs)
        ε ← ε + w (ε_2 - ε_3)                                   (with three)
        ε ← φ ε · std(ε_2) / std(ε) + (1 - φ) ε                 (φ ≠ 0; std over each sample)
        x' = a x + b_0 ε + Σ_h (b_h ε[i-h] + c_h x[i-h]) + d exp(k y) noise + clip(p x + q ε, ±r)
        x' ← m x' + (1 - m) (u original + v original_noise)     (with a mask m)
        next input = s x'

    ε_1 is unconditional, ε_2 conditioned on the text, ε_3 perturbed (perturbed-attention and
    skip-layer guidance). Perturbed guidance of scale w without classifier-free guidance has the
    outputs text and perturbed, and g = -w. y, if there is one, is the network's output for the
    variance, from ε_2, or from ε_1 if that is the only output.

    With `limits` the clip is dynamic thresholding: a limit R, the h-quantile of |p x + q ε| over
    each sample, but at least r and at most t, and clip(p x + q ε, ±R) · r / R.

    Args:
        model_output: [G·B, ..., C or 2C], G = 1, 2 or 3, the network's dtype. The last C of 2C are
            y; they are not read where k is 0.
        sample: [B, ..., C] float32 (float64 with the reference), overwritten by x'.
        history: [2, M, B, ..., C] like sample: past outputs and past samples, each in a ring
            (step % M, by sample), into which this step's are written. Entries with a zero
            coefficient are not read.
        following: [B, ..., C] in model_output's dtype, overwritten by the network's next input.
        table: [steps, 16 + 2M] like sample; see `spec` for its columns.
        step: [1] or [B] int64 on the same device: the row's index, or that of each sample, so that
            the host reads nothing back. Of several, one below 0 marks an empty place: nothing of
            its sample is read or written.
        noise: like sample.
        mask: like sample; 1 where the step's result is taken (inpainting).
        original, original_noise: like sample, both or none; without them, x is kept where the mask
            is 0.
        limits: [B] like sample, overwritten by R, for tables that threshold; where r is 0, nothing
            is clipped.

    Raises:
        ValueError: the table's width does not match the history's depth, there are not one to three
            outputs per sample, their channels are not C or 2C, `step` is neither one index nor one
            for each sample, or one of `original` and `original_noise` is given without the other or
            without a mask.

    Ho & Salimans, Classifier-Free Diffusion Guidance (2022); Lin et al. (2023) for φ; Ahn et al.
    (2024) for w; Nichol & Dhariwal (2021) for k; Saharia et al. (2022) for the thresholding.
    """
    width = HISTORY + 1 + 2 * history.shape[1]
    if table.shape[-1] != width:
        raise ValueError(
            f"guided_step: a history of depth {history.shape[1]} needs a table of {width} columns,"
            f" got {table.shape[-1]}"
        )
    copies = model_output.shape[0] / max(1, sample.shape[0])
    if copies not in (1, 2, 3):
        raise ValueError(f"guided_step: {copies:g} model outputs per sample; expected 1, 2 or 3")
    channels = sample.shape[-1]
    if model_output.shape[-1] not in (channels, 2 * channels):
        raise ValueError(
            f"guided_step: model outputs of {model_output.shape[-1]} channels for samples of"
            f" {channels}; expected as many, or twice as many"
        )
    if step.shape not in ((1,), sample.shape[:1]) or step.dtype != torch.int64:
        raise ValueError(
            f"guided_step: step is {step.dtype} {list(step.shape)}; expected int64, [1] or"
            f" [{sample.shape[0]}]"
        )
    if (original is None) != (original_noise is None) or (mask is None and original is not None):
        raise ValueError(
            "guided_step: expected a mask, original and original_noise, a mask alone, or none"
        )
    _op(
        *(model_output, sample, history, following, table, step),
        *(noise, mask, original, original_noise, limits),
    )
