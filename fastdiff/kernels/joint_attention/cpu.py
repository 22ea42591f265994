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
    scale = 1.0 / math.sqrt(width) if a.scale is None else a.scale
    own = a.text_bias is not None and a.text_bias.ndim == 2  # the loop takes one bias at a time
    for one in [slice(b, b + 1) for b in range(batch)] if own else [slice(None)]:
        bias = a.text_bias[one] if own and a.text_bias is not None else a.text_bias
        text_q = None if a.text_q is None else a.text_q[one]
        NATIVE.joint_attention(
            dtype,
            sequence(a.q[one], a.k[one], a.v[one], out[one]),
            sequence(text_q, a.text_k[one], a.text_v[one], text_out[one]),
            address(bias),
            (1 if own else batch, heads, width),
            scale,
        )
    return out, text_out


def plain(a: Arguments) -> tuple[Tensor, Tensor]:
    """torch's attention, for arguments that `run` does not take."""
    return formula(a, cpu.plain)
