"""`guided_step` on a CPU: our own loop, on float32 state."""

import torch
from torch import Tensor

from fastdiff.kernels.dispatch import NATIVE, NotNative, expects, native_dtype


def run(
    model_output: Tensor,
    sample: Tensor,
    history: Tensor,
    following: Tensor,
    table: Tensor,
    step: Tensor,
    noise: Tensor | None = None,
) -> None:
    dtype = native_dtype("guided_step", model_output)
    if sample.dtype != torch.float32:
        raise NotNative(
            f"guided_step: got samples of {sample.dtype}; the kernel in C++ takes torch.float32"
        )
    batch, depth = sample.shape[0], history.shape[1]
    copies = model_output.shape[0] // batch
    expects(
        "guided_step: model_output", model_output, model_output, (copies * batch, *sample.shape[1:])
    )
    expects("guided_step: sample", sample, sample, tuple(sample.shape))
    expects("guided_step: history", history, sample, (2, depth, *sample.shape))
    expects("guided_step: following", following, model_output, tuple(sample.shape))
    expects("guided_step: table", table, sample, tuple(table.shape))
    expects("guided_step: step", step, step, (1,))
    expects("guided_step: noise", noise, sample, tuple(sample.shape))
    NATIVE.guided_step(
        dtype,
        model_output.data_ptr(),
        table.data_ptr(),
        step.data_ptr(),
        0 if noise is None else noise.data_ptr(),
        (copies, batch, sample.numel() // batch, table.shape[1], depth),
        sample.data_ptr(),
        history.data_ptr(),
        following.data_ptr(),
    )
