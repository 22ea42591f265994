"""The kernels of a pipeline, compiled before its first picture needs them.

What a picture of the pipeline's own size asks of a GPU is planned on tensors without memory; what
Triton's cache does not hold of it comes from a folder of `fastdiff warm`, or is compiled on all
cores, while the caller goes on. The first call of a network waits for it. Nothing here is needed
for a right picture: a kernel that is missing is compiled by Triton at its first launch.
"""

import threading
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fastdiff.compiler.controlnets import StepControlNet
from fastdiff.compiler.steps import StepUNet
from fastdiff.errors import UserError
from fastdiff.kernels.jobs import job_of
from fastdiff.kernels.pool import compile_jobs
from fastdiff.kernels.shipped import Shipped, differences, install
from fastdiff.models import Decoder, Encoder
from fastdiff.runtime.planned import Run, coding, control, guided_steps, kernels_of, step
from fastdiff.runtime.planned import without_memory

TOKENS = 77
"""Of a prompt, which CLIP's text encoders fill up."""


def runs_of(networks: Iterable[Any], side: int, factor: int, upcast: bool) -> list[Run]:
    """What a picture with guidance asks of the compact networks that slots hold.

    Args:
        networks: `StepUNet`, `StepControlNet` or `adapters.Coder`; others ask for nothing of ours.
        side: of the latents.
        factor: pixels of a latent's side.
        upcast: whether diffusers turns the autoencoder into float32 to draw with it.
    """
    runs: list[Run] = []
    for network in networks:
        own = getattr(network, "network", network)
        sides = (side, side)
        if isinstance(network, StepUNet):
            bare = without_memory(own)
            runs += [step(bare, bare.conv_in.weight.dtype, sides, TOKENS), *guided_steps(bare, sides)]
        elif isinstance(network, StepControlNet):
            bare = without_memory(own)
            runs.append(control(bare, sides, TOKENS))
        elif isinstance(own, Decoder | Encoder):
            dtype = own.conv_in.weight.dtype
            if upcast and dtype == torch.float16:
                dtype = torch.float32
            bare = without_memory(own, dtype)
            pixels = 1 if isinstance(own, Decoder) else factor
            runs.append(coding(bare, dtype, (side * pixels, side * pixels)))
    return runs


class Ahead:
    """Kernels on their way to Triton's cache, from when it is made."""

    def __init__(self, runs: Sequence[Run], arch: int, shipped: Shipped | None = None) -> None:
        self.total = self.done = 0
        """Kernels to compile, and those that are."""
        self.said = ""
        """Where all of them came from, once they are there."""
        self.wrong: str | None = None
        """What kept some of them from being there, in a sentence."""
        self._runs, self._arch, self._shipped = runs, arch, shipped
        self._told = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="fastdiff-ahead", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when all are there; a bar on a terminal. Warns once of what went wrong."""
        if self._thread.is_alive():
            self._watch()
        self._thread.join()
        if self.wrong is not None and self._told.acquire(blocking=False):
            warnings.warn(f"fastdiff: {self.wrong}", RuntimeWarning, stacklevel=2)

    def _watch(self) -> None:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

        console = Console(stderr=True)
        if not console.is_terminal:
            return
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("compiling kernels", total=None)
            while self._thread.is_alive():
                progress.update(bar, completed=self.done, total=self.total or None)
                self._thread.join(0.1)

    def _work(self) -> None:
        try:
            self._fetch()
        except Exception as error:  # a picture needs none of this
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.wrong = f"no kernel is compiled ahead, each is at its first launch: {reason}"

    def _fetch(self) -> None:
        from fastdiff.kernels import cached

        jobs = [job_of(launch, self._arch) for launch in kernels_of(self._runs, self._arch)]
        missing = [job for job in jobs if not cached.holds(job)]
        parts = [f"{len(jobs) - len(missing)} in Triton's cache"]
        if missing and self._shipped is not None:
            before = len(missing)
            missing = self._unpack(self._shipped, missing)
            parts.append(f"{before - len(missing)} from {self._shipped.folder}")
        self.total = len(missing)
        failed = []
        if missing:
            for answer in compile_jobs(missing):
                self.done += 1
                if answer.error is not None:
                    failed.append(answer)
            parts.append(f"{len(missing) - len(failed)} compiled ahead")
        if failed:
            first = failed[0]
            self.wrong = (
                f"{len(failed)} of {len(jobs)} kernels could not be compiled ahead, and are at"
                f" their first launch; {first.job.kernel}: {first.error}"
            )
        self.said = f"{len(jobs)} kernels: {', '.join(parts)}"

    def _unpack(self, shipped: Shipped, missing: list[Any]) -> list[Any]:
        """Take what the folder has; what is still missing."""
        from fastdiff.kernels import cached

        reasons = differences(shipped, missing, self._arch)
        try:
            install(shipped, self._arch)
        except UserError as error:
            reasons.append(str(error))
        missing = [job for job in missing if not cached.holds(job)]
        if missing:
            why = "; ".join(reasons) or f"it was made for {shipped.of}"
            self.wrong = (
                f"{shipped.folder} lacks {len(missing)} kernels of this pipeline, which are"
                f" compiled: {why}"
            )
        return missing
