"""The gated projection of a feed-forward network, and the table of who computes it."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.contract import on_gpu
from fastdiff.kernels.dispatch import implementation, register
from fastdiff.kernels.geglu import cpu
from fastdiff.kernels.geglu.spec import SPEC
from fastdiff.kernels.gelu_gate import gelu_gate

_op = register(SPEC, cpu=cpu.run, gpu="fastdiff.kernels.geglu.gpu", otherwise=cpu.plain)


@dataclass(frozen=True)
class Choice:
    """A row of the table: it applies where every bound holds; the first such row decides."""

    why: str
    run: str
    rows: tuple[int, int] = (0, 2**62)
    """Of x, the least and the most."""
    widths: tuple[int, int] = (0, 2**62)
    """Of x (D), the least and the most."""


CUDA_CHOICES = (
    Choice(
        "one kernel saves writing and reading both halves, 8 bytes an output in float16: at D ="
        " 1280 that pays from 77% of cuBLAS's rate on, and nothing is measured yet",
        "split",
    ),
)
"""Who computes GEGLU on an NVIDIA GPU: "triton" or "split". No row is measured yet; the figure is
of the bytes and FLOPs at 790 TFLOP/s."""


def choose(rows: int, width: int) -> Choice:
    """The first row of `CUDA_CHOICES` for x of so many rows and this width."""
    return next(
        choice
        for choice in CUDA_CHOICES
        if choice.rows[0] <= rows <= choice.rows[1]
        and choice.widths[0] <= width <= choice.widths[1]
    )


def geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None, impl: str = "auto") -> Tensor:
    """value · gelu(gate) of (value, gate) = x weightᵀ + bias, with gelu(g) = g · Φ(g), exact (erf).

    Args:
        x: [..., D], float32, bfloat16 or float16.
        weight: [2N, D] as `torch.nn.Linear` stores it, N rows of the value, then N of the gate. On
            a CPU our own loop runs (float32 and bfloat16) when its columns lie side by side
            (`weight.stride(0) == 1`, see `models.borrow`).
        bias: [2N].
        impl: "auto" (the CPU kernel, or what `CUDA_CHOICES` says), "cpu", "triton" (one kernel),
            "split" (torch's product, then `gelu_gate`) or "reference". What is asked for by name
            runs or raises.

    Returns:
        [..., N], contiguous, in x's dtype; sums are float32, and with "triton" also what is gated.

    Raises:
        ValueError: shapes or dtypes that do not fit together, strides that the kernel asked for
            does not take, or an unknown `impl`.

    Shazeer, GLU Variants Improve Transformer (2020); Hendrycks & Gimpel, GELUs (2016).
    """
    if weight.ndim != 2 or weight.shape[0] % 2 or weight.shape[1:] != x.shape[-1:]:
        raise ValueError(
            f"geglu: x {list(x.shape)}, weight {list(weight.shape)}; expected [..., D], [2N, D]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"geglu: bias is {list(bias.shape)}; expected {[weight.shape[0]]}")
    if not x.dtype == weight.dtype == (weight if bias is None else bias).dtype:
        raise ValueError(
            f"geglu: x is {x.dtype}, weight {weight.dtype}; all must be of one dtype, the bias too"
        )
    if impl == "auto" and on_gpu(x):
        impl = choose(x.numel() // max(x.shape[-1], 1), x.shape[-1]).run
    if impl == "split":
        return gelu_gate(F.linear(x, weight, bias))
    if impl == "auto" or (impl == "triton" and on_gpu(x)):
        out: Tensor = _op(x, weight, bias)
        return out
    named: Tensor = implementation("geglu", impl)(x, weight, bias)
    return named
