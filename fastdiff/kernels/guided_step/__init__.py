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
    table: Tensor,
    step: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    """One step of any scheduler that is linear in the samples, outputs and noise.

    With g, φ, a, d, s, b_0..b_M, c_1..c_M the row `table[step]`:

        ε  = ε_uncond + g (ε_text - ε_uncond)                   (two outputs a sample; else ε as is)
        ε ← φ ε · std(ε_text) / std(ε) + (1 - φ) ε              (φ ≠ 0; std over each sample)
        x' = a x + b_0 ε + Σ_h (b_h ε[i-h] + c_h x[i-h]) + d noise
        next input = s x', repeated for every copy that the network is asked for

    Args:
        model_output: [G·B, ...], G = 2 (unconditional first) or 1, the network's dtype.
        sample: [B, ...] float32 (float64 with the reference), replaced by x'.
        history: [2, M, B, ...] like sample: past outputs, past samples, in a ring (step % M);
            this step's are written into it. What a zero coefficient belongs to is never read.
        table: [steps, 6 + 2M], see `spec` for its columns.
        step: [1] int64 on the same device: the row, so that nothing is read back by the host.
        noise: [B, ...] like sample.

    Returns:
        Next input of the network, like model_output.

    Raises:
        ValueError: the table's width does not belong to the history's depth.

    Ho & Salimans, Classifier-Free Diffusion Guidance (2022); Lin et al. (2023) for φ.
    """
    width = HISTORY + 1 + 2 * history.shape[1]
    if table.shape[-1] != width:
        raise ValueError(
            f"guided_step: a history of depth {history.shape[1]} needs a table of {width} columns,"
            f" got {table.shape[-1]}"
        )
    following: Tensor = _op(model_output, sample, history, table, step, noise)
    return following
