"""How the workers of a Ray cluster share what it has."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdiff.errors import UserError, first_line

LOCAL = "local"
"""The address of a cluster that this process starts, and ends with itself."""


@dataclass(frozen=True)
class Workers:
    """Workers, and what each has."""

    count: int
    gpus: float
    cpus: int
    """CPUs that each computes with, where it has no GPU."""

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return "cuda" if self.gpus else "cpu"

    @property
    def needs(self) -> dict[str, Any]:
        """What Ray must have free to start one: its `num_gpus` or `num_cpus`."""
        return {"num_gpus": self.gpus} if self.gpus else {"num_cpus": self.cpus}


def join(ray: Any, address: str) -> None:
    """Join the cluster at `address`, or start one for `LOCAL`; `ray`: the package.

    Raises UserError if none answers there, or if a local one does not start in the half minute that
    Ray gives its processes.
    """
    given = {"include_dashboard": False} if address == LOCAL else {}
    start = time.monotonic()
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **given)
    except Exception as error:  # of the network, of the address, of Ray's processes
        if address == LOCAL:
            seconds = time.monotonic() - start
            raise UserError(
                f"--ray {LOCAL}: Ray did not start within {seconds:.0f} s ({first_line(error)});"
                " run the command again when the machine is less busy, or start Ray by itself (ray"
                " start --head) and give auto"
            ) from error
        raise UserError(
            f"--ray {address}: no Ray answers there ({first_line(error)}); give {LOCAL}, auto, or"
            " the address of one that runs"
        ) from error


def workers_of(
    has: Mapping[str, float],
    address: str,
    device: str | None,
    count: int | None,
    gpus: float | None,
) -> Workers:
    """The workers of a cluster, as given on the command line.

    Args:
        has: the cluster's GPUs and CPUs, by Ray's names.
        device: --device.
        count: --workers; None: as many as the GPUs hold, or one for each CPU. Fewer than one for
            each CPU divide those of this machine; another machine of a larger cluster may have
            fewer, so there each has one.
        gpus: --gpus-per-worker; None: 1 where there are any.

    Raises UserError where the cluster has no room for them.
    """
    if gpus is None:
        gpus = 0.0 if device == "cpu" or not has.get("GPU") else 1.0
    if gpus > 1 and gpus != int(gpus):
        raise UserError(f"--gpus-per-worker is {gpus:g}; give a whole number above 1")
    on = "cuda" if gpus else "cpu"
    if device not in (None, on):
        raise UserError(
            f"--device is {device}, and each worker has {gpus:g} GPUs; with --ray give cpu, or cuda"
            " where there are GPUs"
        )
    room = int(has.get("GPU", 0) / gpus) if gpus else int(has.get("CPU", 1))
    asked = room if count is None else count
    if not 0 < asked <= room:
        each = f"{gpus:g} GPUs" if gpus else "a CPU"
        raise UserError(
            f"--workers is {asked}, each with {each}, and the cluster has room for {room}; give"
            " fewer workers, or other --gpus-per-worker"
        )
    return Workers(asked, gpus, room // asked if address == LOCAL and not gpus else 1)
