"""Everything after the network in one launch: guidance, scheduler step, the next input."""

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
) -> None:
    """One step of any scheduler that is linear in the samples, outputs and noise, or that clips its
    estimate of the clean picture.

    With g, φ, a, d, s, p, q, r, b_0..b_M, c_1..c_M from the row `table[step]`:

        ε  = ε_uncond + g (ε_text - ε_uncond)                   (with two outputs per sample)
        ε ← φ ε · std(ε_text) / std(ε) + (1 - φ) ε              (φ ≠ 0; std over each sample)
        x' = a x + b_0 ε + Σ_h (b_h ε[i-h] + c_h x[i-h]) + d noise + clip(p x + q ε, ±r)
        next input = s x'

    Args:
        model_output: [G·B, ...], G = 2 (unconditional first) or 1, the network's dtype.
        sample: [B, ...] float32 (float64 with the reference), overwritten by x'.
        history: [2, M, B, ...] like sample: past outputs and past samples, each in a ring
            (step % M), into which this step's are written. Entries with a zero coefficient are not
            read.
        following: [B, ...] in model_output's dtype, overwritten by the network's next input.
        table: [steps, 9 + 2M] like sample; see `spec` for its columns.
        step: [1] int64 on the same device: the row's index, so that the host reads nothing back.
        noise: [B, ...] like sample.

    Raises:
        ValueError: the table's width does not match the history's depth, or there are neither one
            nor two outputs per sample.

    Ho & Salimans, Classifier-Free Diffusion Guidance (2022); Lin et al. (2023) for φ.
    """
    width = HISTORY + 1 + 2 * history.shape[1]
    if table.shape[-1] != width:
        raise ValueError(
            f"guided_step: a history of depth {history.shape[1]} needs a table of {width} columns,"
            f" got {table.shape[-1]}"
        )
    copies = model_output.shape[0] / max(1, sample.shape[0])
    if copies not in (1, 2):
        raise ValueError(f"guided_step: {copies:g} model outputs per sample; expected 1 or 2")
    _op(model_output, sample, history, following, table, step, noise)
