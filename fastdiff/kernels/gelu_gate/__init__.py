"""The gate of a feed-forward network, applied to a projection that holds both of its halves."""

from torch import Tensor

from fastdiff.kernels.dispatch import implementation, register
from fastdiff.kernels.gelu_gate import cpu
from fastdiff.kernels.gelu_gate.spec import ACTIVATIONS, SPEC
from fastdiff.kernels.where import on_gpu

_op = register(SPEC, cpu=cpu.run, gpu="fastdiff.kernels.gelu_gate.gpu")


def gelu_gate(
    h: Tensor, bias: Tensor | None = None, impl: str = "auto", act: str = "gelu"
) -> Tensor:
    """value · act(gate) of (value, gate) = h + bias.

    Args:
        h: [..., 2N], float32, bfloat16 or float16: the first N columns are the value, the others
            the gate, as in diffusers' GEGLU. On a GPU its rows may have any one stride.
        bias: [2N], contiguous, in h's dtype.
        act: "gelu": gelu(g) = g · Φ(g), exact (erf); "silu": g / (1 + exp(-g)); "silu_first": the
            same, and the gate is the first half.
        impl: "auto" (by h's device), "cpu", "triton" or "reference". If you name an
            implementation, it runs or raises.

    Returns:
        [..., N], contiguous, in h's dtype; on a GPU the arithmetic is float32.

    Raises:
        ValueError: h has an odd width, the bias does not fit, the Triton implementation does not
            take h's strides, or `act` or `impl` is unknown.

    Shazeer, GLU Variants Improve Transformer (2020); Hendrycks & Gimpel, GELUs (2016).
    """
    if h.shape[-1] % 2:
        raise ValueError(f"gelu_gate: h is {list(h.shape)}; expected [..., 2N]")
    if bias is not None and (bias.shape != h.shape[-1:] or bias.dtype != h.dtype):
        raise ValueError(
            f"gelu_gate: bias is {bias.dtype} {list(bias.shape)}; expected {h.dtype}"
            f" [{h.shape[-1]}]"
        )
    if act not in ACTIVATIONS:
        raise ValueError(f"gelu_gate: act is {act!r}; it must be gelu, silu or silu_first")
    if impl == "auto" or (impl == "triton" and on_gpu(h)):
        out: Tensor = _op(h, bias, act)
        return out
    named: Tensor = implementation("gelu_gate", impl)(h, bias, act)
    return named
