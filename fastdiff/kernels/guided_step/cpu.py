"""`guided_step` on a CPU: our own kernel, on float32 state."""

import torch

from fastdiff.kernels.dispatch import NATIVE, NotNative, expects, native_dtype
from fastdiff.kernels.guided_step.spec import Arguments


def run(a: Arguments) -> None:
    dtype = native_dtype("guided_step", a.model_output)
    if a.sample.dtype != torch.float32:
        raise NotNative(
            f"guided_step: got samples of {a.sample.dtype}; the C++ kernel takes torch.float32"
        )
    batch, depth = a.sample.shape[0], a.history.shape[1]
    copies = a.model_output.shape[0] // batch
    expects(
        "guided_step: model_output",
        a.model_output,
        a.model_output,
        (copies * batch, *a.sample.shape[1:]),
    )
    expects("guided_step: sample", a.sample, a.sample, tuple(a.sample.shape))
    expects("guided_step: history", a.history, a.sample, (2, depth, *a.sample.shape))
    expects("guided_step: following", a.following, a.model_output, tuple(a.sample.shape))
    expects("guided_step: table", a.table, a.sample, tuple(a.table.shape))
    expects("guided_step: step", a.step, a.step, (1,))
    expects("guided_step: noise", a.noise, a.sample, tuple(a.sample.shape))
    NATIVE.guided_step(
        dtype,
        a.model_output.data_ptr(),
        a.table.data_ptr(),
        a.step.data_ptr(),
        0 if a.noise is None else a.noise.data_ptr(),
        (copies, batch, a.sample.numel() // batch, a.table.shape[1], depth),
        a.sample.data_ptr(),
        a.history.data_ptr(),
        a.following.data_ptr(),
    )
