"""`guided_step` on a CPU: our own kernel, on float32 state."""

import torch

from fastdiff.kernels.dispatch import NATIVE, NotNative, address, expects, native_dtype
from fastdiff.kernels.guided_step.spec import Arguments

EXTRA = "guided_step: noise, mask, original or original_noise"


def run(a: Arguments) -> None:
    dtype = native_dtype("guided_step", a.model_output)
    if a.sample.dtype != torch.float32:
        raise NotNative(
            f"guided_step: got samples of {a.sample.dtype}; the C++ kernel takes torch.float32"
        )
    batch, depth = a.sample.shape[0], a.history.shape[1]
    copies, width = a.model_output.shape[0] // batch, a.sample.shape[-1]
    wide = a.model_output.shape[-1] == 2 * width
    expects(
        "guided_step: model_output",
        a.model_output,
        a.model_output,
        (copies * batch, *a.sample.shape[1:-1], width * (1 + wide)),
    )
    expects("guided_step: sample", a.sample, a.sample, tuple(a.sample.shape))
    expects("guided_step: history", a.history, a.sample, (2, depth, *a.sample.shape))
    expects("guided_step: following", a.following, a.model_output, tuple(a.sample.shape))
    expects("guided_step: table", a.table, a.sample, tuple(a.table.shape))
    expects("guided_step: step", a.step, a.step, (a.step.numel(),))
    extra = (a.noise, a.mask, a.original, a.original_noise)
    for tensor in extra:
        expects(EXTRA, tensor, a.sample, tuple(a.sample.shape))
    expects("guided_step: limits", a.limits, a.sample, (batch,))
    if not all(given.is_contiguous() for given in (a.model_output, a.sample, a.following, a.table)):
        raise ValueError("guided_step: all tensors must be contiguous")
    sizes = (copies, batch, a.sample.numel() // batch, a.table.shape[1])
    NATIVE.guided_step(
        dtype,
        a.model_output.data_ptr(),
        a.table.data_ptr(),
        a.step.data_ptr(),
        tuple(map(address, extra)),
        (*sizes, depth, a.step.numel(), width * wide),
        a.sample.data_ptr(),
        a.history.data_ptr(),
        a.following.data_ptr(),
        address(a.limits),
    )
