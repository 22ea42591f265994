"""The one thread that convolves for all, so that what cuDNN was searched for once stays chosen.

torch keeps cuDNN's plans by thread. Were every thread to search for itself, each would wait for it,
and pictures could differ in their last bits from thread to thread, or before and after a recording.
So one thread runs everything that convolves on a GPU: what is warmed up and captured, and what runs
without a recording. It is never alone with work: whoever asked waits for it, and holds what locks
there are.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import TypeVar

import torch

from fastdiff.kernels.conv2d import cudnn

T = TypeVar("T")

_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fastdiff-tactics")
_spent = 0.0


def allowed() -> bool:
    """Whether torch's settings let cuDNN choose by measuring."""
    return (
        torch.version.cuda is not None
        and torch.backends.cudnn.enabled
        and not torch.backends.cudnn.deterministic
        and not torch.are_deterministic_algorithms_enabled()
    )


def run(function: Callable[..., T], *args: object) -> T:
    """`function(*args)` in the thread that searches, as if in this one: on its device and stream,
    with its modes of autograd and context variables. `function` takes no lock that its caller might
    hold."""
    if cudnn.searches():
        return function(*args)
    stream, grad = torch.cuda.current_stream(), torch.is_grad_enabled()
    inference, context = torch.is_inference_mode_enabled(), copy_context()

    def there() -> T:
        global _spent
        known, start = len(cudnn.SEARCHED), time.perf_counter()
        with (
            torch.cuda.stream(stream),
            torch.inference_mode(inference),
            torch.set_grad_enabled(grad),
            cudnn.searching(),
        ):
            torch.cuda.current_stream().query()  # a new thread has no context for Triton till now
            result = function(*args)
        if len(cudnn.SEARCHED) > known:
            _spent += time.perf_counter() - start
        return result

    future = _THREAD.submit(context.run, there)
    try:
        return future.result()
    except BaseException:
        wait([future])  # interrupted: the locks of this thread hold for what runs there
        raise
    finally:
        del future  # an error in it would keep itself, and what is in its frames, alive


def described() -> str:
    """What `fastdiff.report` says of the search."""
    if not allowed():
        return "convolutions run by cuDNN's rule: torch is set to deterministic, or without cuDNN"
    if not cudnn.SEARCHED:
        return (
            "small convolutions run by the plans that cuDNN finds fastest when it first meets them"
        )
    return (
        f"{len(cudnn.SEARCHED)} small convolutions run by the plan that cuDNN found fastest; the"
        f" calls that searched took {_spent:.1f} s, once for this process"
    )
