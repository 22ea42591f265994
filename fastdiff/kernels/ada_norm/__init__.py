"""A gated residual, LayerNorm or RMSNorm, and its modulation, in one pass over memory."""

from torch import Tensor

from fastdiff.kernels.ada_norm import cpu
from fastdiff.kernels.ada_norm.spec import SPEC
from fastdiff.kernels.dispatch import register

_op = register(SPEC, cpu=cpu.run, gpu="fastdiff.kernels.ada_norm.gpu")


def ada_norm(
    x: Tensor,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    rms: bool = False,
    limit: float = 0.0,
    later: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = (norm(t) · weight + bias) · (1 + scale) + shift with t = residual + gate · x.

    norm(t) = (t - mean) / sqrt(var + eps) over D, or t / sqrt(mean(t²) + eps) with `rms`. A term
    that is None is left out. Everything is computed in float32 and rounded once, the variance
    around the mean (never E[t²] - E[t]²). y is computed from the unrounded t.

    Args:
        x: [B, L, D], contiguous, float32, bfloat16 or float16; the others have the same dtype.
        eps: added to the variance or to the mean square.
        weight, bias: [D]; no bias with `rms`.
        scale, shift, gate: [B, D], one row for each sample, of any batch stride (slices of one
            projection of the time embedding).
        residual: [B, L, D], or [B / k, L, D] if k parts of the batch share it: sample b uses
            residual b % (B / k). Contiguous.
        rms: RMSNorm instead of LayerNorm.
        limit: t beyond ±limit becomes ±limit, if there is a residual; 0: no limit.
        later: [D], added to the returned t, but not to the t that is normalised: the bias of a
            layer whose product is then added to t in its memory.

    Returns:
        y [B, L, D] and t of the same shape, both contiguous; t is empty ([0]) without a residual.

    Raises:
        ValueError: shapes, dtypes, devices or strides other than these; a gate, or `later`, without
            a residual; a bias with `rms`.

    Ba et al., Layer Normalization (2016); Zhang & Sennrich, Root Mean Square Layer Normalization
    (2019); Peebles & Xie, Scalable Diffusion Models with Transformers (2022) for the modulation.
    """
    y, total = _op(x, eps, weight, bias, scale, shift, gate, residual, rms, limit, later)
    return y, total
