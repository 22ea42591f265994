"""`concat` on a CPU."""

from torch import Tensor

from fastdiff.kernels.concat.spec import Arguments
from fastdiff.kernels.dispatch import NATIVE, NotNative, expects


def run(a: Arguments) -> Tensor:
    if NATIVE is None:  # any dtype, since it copies bytes
        raise NotNative("concat: its C++ kernel was not built; install with a C++ compiler")
    first, second = a.first.contiguous(), a.second.contiguous()
    pixels, left, right = first.shape[:-1], first.shape[-1], second.shape[-1]
    pictures = second.shape[0] if second.shape[0] * 2 == first.shape[0] else first.shape[0]
    expects("concat: second", second, first, (pictures, *pixels[1:], right))
    out = first.new_empty((*pixels, left + right))
    size = first.element_size()
    NATIVE.concat(
        first.data_ptr(),
        second.data_ptr(),
        (pixels.numel(), left * size, right * size, second.numel() // right),
        out.data_ptr(),
    )
    return out
