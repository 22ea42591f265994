"""`conv2d` by the plan that cuDNN measures to be fastest, in threads that allow the search.

cuDNN's heuristic picks a plan for a convolution without running any. For small pictures its plans
leave most of a large GPU idle: 8×8 pixels are few tiles, and only splitting the sum over channels
gives more of them. So for small convolutions, all plans are built and run once to find the fastest,
which takes longer than the picture.

torch caches the plan per thread, by the convolution and its flags. `deterministic` is one of these
flags; whether the plan was searched is not. So a plan chosen by the heuristic would prevent a later
search for the same call. The search asks for deterministic plans, which are cached separately from
those of eager convolutions, and which draw the same picture each time.
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
"""Convolutions with fewer than 2 output tiles of 128×128 per multiprocessor are searched. With two
waves of tiles a GPU is busy at least two thirds of the time. Not measured on a GPU yet."""

SEARCHED: dict[Any, None] = {}
"""The convolutions searched so far, in order."""
_THREAD = threading.local()


@contextmanager
def searching() -> Iterator[None]:
    """In this block, this thread's convolutions on a GPU use the plans that cuDNN finds fastest."""
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
    """The reference's result, by a searched plan if this thread allows it."""
    return around(_convolve if searches() else F.conv2d, a)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """As `torch.nn.functional.conv2d`, which runs if no search is needed."""
    if x.dtype not in DTYPES or x.numel() == 0 or _fills(x, weight, stride, padding):
        return F.conv2d(x, weight, bias, stride, padding)
    y: Tensor = torch.cudnn_convolution(
        x,
        weight,
        padding=(padding, padding),
        stride=(stride, stride),
        dilation=(1, 1),
        groups=1,
        # a search waits, which a capture forbids
        benchmark=not torch.cuda.is_current_stream_capturing(),
        deterministic=True,
        allow_tf32=torch.backends.cudnn.conv.fp32_precision == "tf32",  # type: ignore[attr-defined]
    )
    key = (x.device, x.dtype, x.shape, x.stride(), weight.shape, weight.stride(), stride, padding)
    SEARCHED[key] = None
    return y if bias is None else y.add_(bias[:, None, None])


def _fills(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Whether the output has enough tiles for the whole GPU."""
    rows, columns = ((side + 2 * padding - weight.shape[2]) // stride + 1 for side in x.shape[2:])
    tiles = -(-x.shape[0] * rows * columns // TILE) * -(-weight.shape[0] // TILE)
    processors: int = torch.cuda.get_device_properties(x.device).multi_processor_count
    return tiles >= WAVES * processors
