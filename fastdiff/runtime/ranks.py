"""Processes that draw a picture, or a batch of pictures, together: torch.distributed's ranks."""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastdiff.errors import UserError, first_line
from fastdiff.runtime import peers, tape

T = TypeVar("T")
TIMEOUT = timedelta(minutes=5)
"""How long a rank of `joined` waits for another one, which may still compile kernels."""

GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""torch's all-gather, by its name since torch 2.13 or its earlier one."""


class Lost(UserError):
    """Another rank no longer answers, or this one has left a picture in the middle."""


class Ranks:
    """The ranks of torch.distributed's default group, as this process sees them.

    Every rank must draw the same pictures in the same order.
    """

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        if "nccl" in dist.get_backend_config():
            peers.watch(TIMEOUT, self._lost)
        self._within = False

    def gathered(self, x: Tensor) -> Tensor:
        """[n, …] of every rank -> [ranks · n, …] on each, in the order of the ranks. It may be part
        of a recording."""
        out = x.new_empty((self.count * x.shape[0], *x.shape[1:]))
        tape.between(partial(self._gather, x, out))
        return out

    def _gather(self, x: Tensor, out: Tensor) -> None:
        with torch.no_grad():
            if x.device.type != "cpu":
                GATHER(out, x)
                return
            # as bytes: gloo does not add, so it need not know the dtype
            given, made = x.contiguous().view(torch.uint8), out.view(torch.uint8)
            self._asked(lambda: GATHER(made, given))

    def first(self, x: Tensor) -> None:
        """Overwrite `x` by the first rank's."""
        memory = x.detach().contiguous()
        told = memory.view(torch.uint8) if x.device.type == "cpu" else memory
        self._asked(lambda: dist.broadcast(told, 0))
        if memory.data_ptr() != x.data_ptr():
            x.copy_(memory)

    def told(self, value: T) -> list[T]:
        """What each rank passes, on every rank; any value that can be pickled."""
        every: list[Any] = [None] * self.count
        self._asked(lambda: dist.all_gather_object(every, value))
        return every

    def agree(self, told: Mapping[str, Any]) -> None:
        """UserError unless all ranks pass the same values, by their name in the sentence."""
        every = self.told(dict(told))
        for rank, other in enumerate(every):
            for name, value in every[0].items():
                if other.get(name) != value:
                    raise UserError(
                        f"rank {rank} draws with {name} {other.get(name)}, rank 0 with {value};"
                        " make the same call on every rank"
                    )

    def begin(self) -> None:
        """Begin a loop that the ranks share. A rank that leaves it before `end` is out of step with
        the others, which wait for it.

        Raises Lost if that has happened.
        """
        if self._within:
            raise Lost(
                f"rank {self.rank} left an earlier picture in the middle, so the ranks are out of"
                " step; start all of them again"
            )
        self._within = True

    def end(self) -> bool:
        """The loop ended, if there is one; returns whether there was."""
        was, self._within = self._within, False
        return was

    def _asked(self, call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError as error:
            raise Lost(f"{self._lost} ({first_line(error)})") from error

    @property
    def _lost(self) -> str:
        return (
            f"rank {self.rank} of {self.count} no longer hears from the others: one of them ended,"
            " or did not answer in time; see its own message, then start all of them again"
        )


def present() -> bool:
    """Whether torch.distributed has a process group here."""
    return dist.is_available() and dist.is_initialized()


def launched() -> int:
    """How many ranks torchrun, or another launcher that speaks its language, started; 1 without."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def joined(device: str) -> tuple[Ranks, str]:
    """Join the process group of a launcher, by NCCL on GPUs and gloo on CPUs.

    Returns:
        The ranks, and this one's device: "cuda" becomes its own GPU.
    """
    on_gpu = device.startswith("cuda")
    if on_gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    return Ranks(), device
