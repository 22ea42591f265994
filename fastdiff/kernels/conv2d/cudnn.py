"""`conv2d` by the plan that cuDNN measures to be fastest, in threads that let it search.

cuDNN's rule of thumb takes one plan for a convolution without running any. It leaves most of a
large GPU idle where pictures are small: 8×8 pixels are few tiles, and only splitting the sum over
the channels makes more of them. So the small ones are measured, once: all plans for them are built
and run, which takes longer than the picture.

torch keeps the plan by thread, and by the convolution with its flags: `deterministic` is one of
them, whether it searched is none. So a plan that the rule chose hides the search from the same call
later. The search asks for deterministic plans, which are kept apart from those that eager
convolutions leave behind, and which give the same picture twice.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.kernels.conv2d.spec import Arguments, around

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILE, WAVES = 128, 2
"""What makes fewer than 2 tiles of 128×128 numbers for each multiprocessor is searched. Until a GPU
has measured: one with two waves of tiles is busy for two thirds of the time at least."""

SEARCHED: dict[Any, None] = {}
"""The convolutions that were searched so far, in order."""
_THREAD = threading.local()


@contextmanager
def searching() -> Iterator[None]:
    """Within it this thread's convolutions on a GPU run by the plans that cuDNN finds fastest."""
    before = searches()
    _THREAD.searches = True
    try:
        yield
    finally:
        _THREAD.searches = before


def searches() -> bool:
    """Whether this thread is within `searching`."""
    return getattr(_THREAD, "searches", False)


def run(a: Arguments) -> Tensor:
    """What the reference computes, by a plan that was searched where this thread lets it."""
    return around(_convolve if searches() else F.conv2d, a)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """As `torch.nn.functional.conv2d`, to whom it leaves what needs no search."""
    if x.dtype not in DTYPES or x.numel() == 0 or _fills(x, weight, stride, padding):
        return F.conv2d(x, weight, bias, stride, padding)
    y: Tensor = torch.cudnn_convolution(
        x,
        weight,
        padding=(padding, padding),
        stride=(stride, stride),
        dilation=(1, 1),
        groups=1,
        benchmark=not torch.cuda.is_current_stream_capturing(),  # a search would wait
        deterministic=True,
        allow_tf32=torch.backends.cudnn.conv.fp32_precision == "tf32",  # type: ignore[attr-defined]
    )
    key = (x.device, x.dtype, x.shape, x.stride(), weight.shape, weight.stride(), stride, padding)
    SEARCHED[key] = None
    return y if bias is None else y.add_(bias[:, None, None])


def _fills(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Whether the output has tiles for all of the GPU."""
    rows, columns = ((side + 2 * padding - weight.shape[2]) // stride + 1 for side in x.shape[2:])
    tiles = -(-x.shape[0] * rows * columns // TILE) * -(-weight.shape[0] // TILE)
    processors: int = torch.cuda.get_device_properties(x.device).multi_processor_count
    return tiles >= WAVES * processors
