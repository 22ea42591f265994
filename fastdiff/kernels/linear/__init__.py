"""Matrix product with its activation and residual in the epilogue."""

from torch import Tensor

from fastdiff.kernels.dispatch import register
from fastdiff.kernels.linear import cpu
from fastdiff.kernels.linear.spec import ACTIVATIONS, SPEC, library

_op = register(SPEC, cpu=cpu.run, library=library)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    act: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """act(x weightᵀ + bias) + residual.

    Args:
        x: [..., D], float32 or bfloat16 for our own kernel, any float for torch's.
        weight: [N, D] as in `torch.nn.Linear`, of any strides. On a CPU our own kernel runs if the
            columns are adjacent in memory (`weight.stride(0) == 1`, see `models.borrow`).
        bias: [N].
        act: "none", "silu", "gelu" (y · Φ(y), exact) or "gelu_tanh" (its tanh approximation, which
            a GPU computes in the product's own launch). Gated activations are in `geglu`.
        residual: of the output's shape, contiguous, added last; or with half as many pictures if
            the halves of guidance share it.

    Returns:
        [..., N], contiguous, in x's dtype; sums are float32.

    Raises:
        ValueError: `act` is not one of these.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"linear: act is {act!r}; it must be one of {', '.join(ACTIVATIONS)}")
    y: Tensor = _op(x, weight, bias, act, residual)
    return y
