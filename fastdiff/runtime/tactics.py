"""One thread runs all convolutions on a GPU, so that each search of cuDNN's plans is made once.

torch keeps cuDNN's plans per thread. If every thread searched for itself, each would wait for its
own search, and pictures could differ in their last bits between threads, or before and after a
recording. So one thread runs everything that convolves on a GPU: warm-up, capture, and unrecorded
calls. The caller always waits for it, holding whatever locks it has.
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
    """Whether torch's settings let cuDNN choose plans by measuring them."""
    return (
        torch.version.cuda is not None
        and torch.backends.cudnn.enabled
        and not torch.backends.cudnn.deterministic
        and not torch.are_deterministic_algorithms_enabled()
    )


def run(function: Callable[..., T], *args: object) -> T:
    """`function(*args)` in the tactics thread, with this thread's device, stream, autograd modes
    and context variables. `function` must not take a lock that its caller may hold."""
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
            # gives a new thread the CUDA context that Triton needs
            torch.cuda.current_stream().query()
            result = function(*args)
        if len(cudnn.SEARCHED) > known:
            _spent += time.perf_counter() - start
        return result

    future = _THREAD.submit(context.run, there)
    try:
        return future.result()
    except BaseException:
        wait([future])  # interrupted: keep this thread's locks until the function has ended
        raise
    finally:
        del future  # else an error would keep itself and its frames alive


def described() -> str:
    """The report's sentence on the search."""
    if not allowed():
        return "convolutions use cuDNN's heuristic: torch is set to deterministic, or has no cuDNN"
    if not cudnn.SEARCHED:
        return "small convolutions use the plan that cuDNN measures as fastest when each first runs"
    return (
        f"{len(cudnn.SEARCHED)} small convolutions use the plan that cuDNN found fastest; the"
        f" calls that searched took {_spent:.1f} s, once for this process"
    )
