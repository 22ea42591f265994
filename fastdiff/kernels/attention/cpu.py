"""`attention` on a CPU."""

import math

from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.dispatch import NATIVE, NotNative, expects, native_dtype


def run(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    dtype = native_dtype("attention", q)
    native_dtype("attention", k)
    if mask is not None and mask.dtype != q.dtype:
        raise NotNative(
            f"attention: got a mask of {mask.dtype}; the kernel in C++ takes q's {q.dtype}"
        )
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    for name, tensor in {"k": k, "v": v}.items():
        expects(f"attention: {name}", tensor[0, 0, 0], q, (width,))
    out = q.new_empty(q.shape)
    mask_at: tuple[int, ...] = (0, 0, 0, 0, 0)
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
        mask_at = (mask.data_ptr(), *mask.stride())
    NATIVE.attention(
        dtype,
        (q.data_ptr(), *q.stride()[:3]),
        (k.data_ptr(), *k.stride()[:3]),
        (v.data_ptr(), *v.stride()[:3]),
        mask_at,
        (batch, heads, queries, keys, width),
        1.0 / math.sqrt(width) if scale is None else scale,
        out.data_ptr(),
    )
    return out


def plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """torch's, for what `run` does not take."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2).contiguous()
