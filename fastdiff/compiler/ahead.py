"""The kernels of a pipeline, compiled before its first picture needs them.

What a picture of the pipeline's own size asks of a GPU is planned on tensors without memory; what
Triton's cache does not hold of it comes from a folder of `fastdiff warm`, or is compiled on all
cores, while the caller goes on. The first call of a network waits for it. Nothing here is needed
for a right picture: a kernel that is missing is compiled by Triton at its first launch.
"""

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastdiff import installed
from fastdiff.compiler.asked import own_size
from fastdiff.errors import UserError
from fastdiff.families import Kind
from fastdiff.kernels.contract import Launch, architecture
from fastdiff.kernels.dispatch import interpreted
from fastdiff.kernels.jobs import job_of
from fastdiff.kernels.pool import compile_jobs
from fastdiff.kernels.shipped import Shipped, differences, install, read
from fastdiff.runtime.planned import Run, kernels_of

logger = logging.getLogger(__name__)


@dataclass
class Kernels:
    """Those of all slots of one `compile`."""

    target: Any
    """The pipeline or model, while it lives."""
    slots: Sequence[Any]
    shipped: Shipped | None
    ahead: "Ahead | None" = None
    _beginning: Any = field(default_factory=threading.Lock, repr=False)

    def begin(self) -> None:
        """Have them compiled, if the networks lie on an NVIDIA GPU and nothing has begun."""
        with self._beginning:
            target = self.target()
            taken = [(slot.kind, slot.network) for slot in self.slots if slot.network is not None]
            arch = max((_arch(slot.module) for slot in self.slots), default=0)
            if self.ahead is None and arch and target is not None and _triton():
                self.ahead = Ahead(partial(_plan, taken, target), arch, self.shipped)

    def wait(self) -> None:
        """Return when they are there."""
        if self.ahead is None:
            self.begin()
        if self.ahead is not None:
            self.ahead.wait()

    def __str__(self) -> str:
        if self.ahead is not None:
            return str(self.ahead)
        return "" if self.shipped is None else f"{self.shipped.folder} is for a GPU"


def kernels(target: Any, slots: Sequence[Any], warm: str | Path | None) -> Kernels:
    """Those of a target that was just compiled, begun where it lies on a GPU.

    Raises UserError where `warm` is no folder of `fastdiff warm`, or damaged.
    """
    if warm is not None and find_spec("triton") is None:
        how = installed.pip("gpu")
        raise UserError(f"Options.warm is {warm}, which needs Triton; {how}")
    made = Kernels(weakref.ref(target), slots, None if warm is None else read(Path(warm)))
    made.begin()
    return made


def _triton() -> bool:
    """Whether Triton is there, and compiles."""
    return find_spec("triton") is not None and not interpreted()


def _plan(taken: Sequence[tuple[Kind, Any]], target: Any) -> list[Run]:
    sizes = own_size(target)
    return [run for kind, network in taken for run in kind.planned(network, sizes)]


def _arch(module: Any) -> int:
    """Of the GPU that a module lies on; 0 for none."""
    first = next(module.parameters(), None)
    return 0 if first is None else architecture(first)


class Ahead:
    """Kernels on their way to Triton's cache, from when it is made."""

    def __init__(
        self, plan: Callable[[], list[Run]], arch: int, shipped: Shipped | None = None
    ) -> None:
        self.total = self.done = 0
        """Kernels to compile, and those that are."""
        self.said = "being planned"
        """Where all of them came from, or how many of them are there."""
        self.wrong: str | None = None
        """What kept some of them from being there, in a sentence."""
        self._arch, self._shipped = arch, shipped
        self._told = threading.Lock()
        self._thread = threading.Thread(
            target=self._work, args=(plan,), name="fastdiff-ahead", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when all are there; a bar on a terminal. Warns once of what went wrong."""
        if self._thread.is_alive():
            self._watch()
        self._thread.join()
        if self.wrong is not None and self._told.acquire(blocking=False):
            logger.warning("fastdiff: %s", self.wrong)

    def __str__(self) -> str:
        return self.said if self.wrong is None else f"{self.said}; {self.wrong}"

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

    def _work(self, plan: Callable[[], list[Run]]) -> None:
        try:
            self._fetch(kernels_of(plan(), self._arch))
        except Exception as error:  # a picture needs none of this
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.said = "compiled at their first launch"
            self.wrong = f"no kernel is compiled ahead, each is at its first launch: {reason}"

    def _fetch(self, launches: Sequence[Launch]) -> None:
        from fastdiff.kernels import cached

        jobs = [job_of(launch, self._arch) for launch in launches]
        missing = [job for job in jobs if not cached.holds(job)]
        parts = [f"{len(jobs) - len(missing)} in Triton's cache"]
        if missing and self._shipped is not None:
            before = len(missing)
            missing = self._unpack(self._shipped, missing)
            parts.append(f"{before - len(missing)} from {self._shipped.folder}")
        self.total = len(missing)
        self.said = f"{len(jobs)} kernels, {len(missing)} of them being compiled"
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
