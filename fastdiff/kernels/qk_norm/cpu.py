"""`qk_norm` on a CPU: in C++ without a rotation."""

from torch import Tensor

from fastdiff.kernels.dispatch import NATIVE, NotNative, address, native_dtype
from fastdiff.kernels.qk_norm.spec import check


def run(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check(q, k, q_weight, k_weight, cos, sin)
    dtype = native_dtype("qk_norm", q)
    if cos is not None:
        raise NotNative("qk_norm: got cos and sin; the kernel in C++ takes no rotation")
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    NATIVE.qk_norm(
        dtype,
        (q.data_ptr(), *q.stride()[:3]),
        (k.data_ptr(), *k.stride()[:3]),
        address(q_weight),
        address(k_weight),
        q.shape,
        eps,
        q_out.data_ptr(),
        k_out.data_ptr(),
    )
    return q_out, k_out
