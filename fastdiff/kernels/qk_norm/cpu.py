"""`qk_norm` on a CPU: in C++ if there is no rotation."""

from torch import Tensor

from fastdiff.kernels.dispatch import NATIVE, NotNative, address, native_dtype
from fastdiff.kernels.qk_norm.spec import Arguments, check


def run(a: Arguments) -> tuple[Tensor, Tensor]:
    check(a)
    dtype = native_dtype("qk_norm", a.q)
    if a.cos is not None:
        raise NotNative("qk_norm: got cos and sin; the C++ kernel takes no rotation")
    q_out, k_out = a.q.new_empty(a.q.shape), a.k.new_empty(a.k.shape)
    NATIVE.qk_norm(
        dtype,
        (a.q.data_ptr(), *a.q.stride()[:3]),
        (a.k.data_ptr(), *a.k.stride()[:3]),
        address(a.q_weight),
        address(a.k_weight),
        a.q.shape,
        a.eps,
        q_out.data_ptr(),
        k_out.data_ptr(),
    )
    return q_out, k_out
