"""The time of each block when its kernels are called one by one."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch

from fastdiff.kernels.observe import watching

_WARM_UPS = 2
_AHEAD = 100_000_000
"""Clock cycles, some 50 ms, for which a GPU waits while the host queues a whole step: so the GPU is
timed, not Python's launches."""


def time_blocks(
    runs: Iterable[Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """The milliseconds of each block in `runs`, by block: medians over `rounds`.

    Work outside of all blocks has the name "". If a block occurs in several runs, they are added.
    """
    times: defaultdict[str, float] = defaultdict(float)
    for run in runs:
        for _ in range(_WARM_UPS):
            _once(run, device)
        samples = [_once(run, device) for _ in range(rounds)]
        for block in samples[0]:
            times[block] += median(sample[block] for sample in samples)
    return dict(times)


def _once(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    borders: list[tuple[str, Any]] = []
    on_gpu = device.type == "cuda"

    def told(block: str) -> None:
        borders.append((block, _event() if on_gpu else time.perf_counter()))

    with torch.cuda.device(device) if on_gpu else nullcontext():
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda._sleep(_AHEAD)
        with torch.no_grad(), watching(told):
            told("")
            run()
            told("")
        if on_gpu:
            torch.cuda.synchronize()
    spent: defaultdict[str, float] = defaultdict(float)
    for (block, start), (_, end) in zip(borders, borders[1:], strict=False):
        spent[block] += start.elapsed_time(end) if on_gpu else 1e3 * (end - start)
    return spent


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
