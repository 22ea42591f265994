"""`qk_norm` on a CPU: one pass in C++."""

from torch import Tensor

from fastdiff.kernels.dispatch import NATIVE, address, native_dtype
from fastdiff.kernels.qk_norm.spec import Arguments, check


def run(a: Arguments) -> tuple[Tensor, Tensor]:
    check(a)
    dtype = native_dtype("qk_norm", a.q)
    q_out, k_out = a.q.new_empty(a.q.shape), a.k.new_empty(a.k.shape)
    NATIVE.qk_norm(
        dtype,
        (a.q.data_ptr(), *a.q.stride()[:3]),
        (a.k.data_ptr(), *a.k.stride()[:3]),
        address(a.q_weight),
        address(a.k_weight),
        address(a.cos),
        address(a.sin),
        a.q.shape,
        a.eps,
        q_out.data_ptr(),
        k_out.data_ptr(),
    )
    return q_out, k_out
