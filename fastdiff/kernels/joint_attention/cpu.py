"""`joint_attention` on a CPU: one loop over the keys of both sequences, where they lie."""

import math
from typing import Any

from torch import Tensor

from fastdiff.kernels.attention import cpu
from fastdiff.kernels.dispatch import NATIVE, address, expects, native_dtype
from fastdiff.kernels.joint_attention.spec import reference


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor | None,
    text_k: Tensor,
    text_v: Tensor,
    scale: float | None = None,
    text_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = native_dtype("joint_attention", q)
    native_dtype("joint_attention", text_k)
    batch, _, heads, width = q.shape

    def sequence(
        q: Tensor | None, k: Tensor, v: Tensor, out: Tensor
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, int, int]:
        return (
            (0, 0, 0, 0) if q is None else (q.data_ptr(), *q.stride()[:3]),
            (k.data_ptr(), *k.stride()[:3]),
            (v.data_ptr(), *v.stride()[:3]),
            0 if q is None else q.shape[1],
            k.shape[1],
            out.data_ptr(),
        )

    states = {"q": q, "k": k, "v": v, "text_k": text_k, "text_v": text_v}
    states |= {} if text_q is None else {"text_q": text_q}
    for name, tensor in states.items():
        expects(f"joint_attention: {name}", tensor[0, 0], q, (heads, width))
    out = q.new_empty(q.shape)
    text_out = q.new_empty(0 if text_q is None else text_q.shape)
    NATIVE.joint_attention(
        dtype,
        sequence(q, k, v, out),
        sequence(text_q, text_k, text_v, text_out),
        address(text_bias),
        (batch, heads, width),
        1.0 / math.sqrt(width) if scale is None else scale,
    )
    return out, text_out


def plain(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """By torch's attention, for what `run` does not take."""
    return reference(*arguments, **options | {"attend": cpu.plain})
