"""`attention` on a CPU."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.attention.spec import Arguments
from fastdiff.kernels.dispatch import NATIVE, NotNative, expects, native_dtype


def run(a: Arguments) -> Tensor:
    dtype, mask = native_dtype("attention", a.q), a.mask
    native_dtype("attention", a.k)
    if mask is not None and mask.dtype != a.q.dtype:
        raise NotNative(
            f"attention: got a mask of {mask.dtype}; the C++ kernel takes q's {a.q.dtype}"
        )
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (a.q, a.k, a.v))
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    expects("attention: k", k[0, 0, 0], q, (width,))
    expects("attention: v", v[0, 0, 0], q, (width,))
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
        1.0 / math.sqrt(width) if a.scale is None else a.scale,
        out.data_ptr(),
    )
    return out


def plain(a: Arguments) -> Tensor:
    """torch's attention, for arguments that `run` does not take."""
    q, k, v = (t.transpose(1, 2) for t in (a.q, a.k, a.v))
    mask = a.mask
    if mask is not None and q.dtype == torch.float64:
        mask = mask.double()  # torch would read a float32 mask's bytes as float64
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=a.scale)
    return out.transpose(1, 2).contiguous()
