"""`joint_attention` on a CPU: one loop over the keys of both sequences, read in place."""

import math

from torch import Tensor

from fastdiff.kernels.attention import cpu
from fastdiff.kernels.dispatch import NATIVE, address, expects, native_dtype
from fastdiff.kernels.joint_attention.spec import Arguments, formula


def run(a: Arguments) -> tuple[Tensor, Tensor]:
    dtype = native_dtype("joint_attention", a.q)
    native_dtype("joint_attention", a.text_k)
    batch, _, heads, width = a.q.shape

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

    states = {"q": a.q, "k": a.k, "v": a.v, "text_k": a.text_k, "text_v": a.text_v}
    states |= {} if a.text_q is None else {"text_q": a.text_q}
    for name, tensor in states.items():
        expects(f"joint_attention: {name}", tensor[0, 0], a.q, (heads, width))
    out = a.q.new_empty(a.q.shape)
    text_out = a.q.new_empty(0 if a.text_q is None else a.text_q.shape)
    NATIVE.joint_attention(
        dtype,
        sequence(a.q, a.k, a.v, out),
        sequence(a.text_q, a.text_k, a.text_v, text_out),
        address(a.text_bias),
        (batch, heads, width),
        1.0 / math.sqrt(width) if a.scale is None else a.scale,
    )
    return out, text_out


def plain(a: Arguments) -> tuple[Tensor, Tensor]:
    """torch's attention, for arguments that `run` does not take."""
    return formula(a, cpu.plain)
