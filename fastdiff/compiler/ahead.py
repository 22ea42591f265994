"""Compile a pipeline's kernels before its first picture needs them.

A picture of the pipeline's own size is planned on tensors without memory, which gives the kernels
it launches. Kernels that are missing in Triton's cache come from `fastdiff warm`, or are compiled
on all cores in the background; the first call of a network waits for them. Correctness does not
depend on this: Triton compiles a missing kernel at its first launch.
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
from fastdiff.compiler.own_size import own_size
from fastdiff.errors import UserError
from fastdiff.families import Kind
from fastdiff.kernels.contract import Launch, architecture
from fastdiff.kernels.dispatch import interpreted
from fastdiff.kernels.jobs import job_of
from fastdiff.kernels.pool import compile_jobs
from fastdiff.kernels.shipped import Shipped, differences, install, read
from fastdiff.runtime.planned import Run, kernels_of
from fastdiff.tables import plural

logger = logging.getLogger(__name__)


@dataclass
class Kernels:
    """The kernels of all slots of one `compile`."""

    target: Any
    """A weak reference to the pipeline or model."""
    slots: Sequence[Any]
    """Weak references: of these, every one keeps this."""
    shipped: Shipped | None
    ahead: "Ahead | None" = None
    _beginning: Any = field(default_factory=threading.Lock, repr=False)

    def begin(self) -> None:
        """Start compiling, if the networks are on an NVIDIA GPU and nothing has started yet."""
        with self._beginning:
            target = self.target()
            slots = [slot for kept in self.slots if (slot := kept()) is not None]
            taken = [(slot.kind, slot.network) for slot in slots if slot.network is not None]
            arch = max((_arch(slot.module) for slot in slots), default=0)
            if self.ahead is None and arch and target is not None and _triton():
                self.ahead = Ahead(partial(_plan, taken, target), arch, self.shipped)

    def wait(self) -> None:
        """Return when all kernels are ready."""
        if self.ahead is None:
            self.begin()
        if self.ahead is not None:
            self.ahead.wait()

    def __str__(self) -> str:
        if self.ahead is not None:
            return str(self.ahead)
        return "" if self.shipped is None else f"{self.shipped.folder} is for a GPU"


def kernels(target: Any, slots: Sequence[Any], warm: str | Path | None) -> Kernels:
    """The kernels of a target that was just compiled; starts compiling them if it is on a GPU.

    Raises UserError if `warm` is not a folder written by `fastdiff warm`, or is damaged.
    """
    if warm is not None and find_spec("triton") is None:
        how = installed.pip("gpu")
        raise UserError(f"Options.warm is {warm}, but Triton is missing: {how}")
    kept = [*map(weakref.ref, slots)]
    made = Kernels(weakref.ref(target), kept, None if warm is None else read(Path(warm)))
    made.begin()
    return made


def _triton() -> bool:
    """Whether Triton is installed and compiles, rather than interprets."""
    return find_spec("triton") is not None and not interpreted()


def _plan(taken: Sequence[tuple[Kind, Any]], target: Any) -> list[Run]:
    sizes = own_size(target)
    return [run for kind, network in taken for run in kind.planned(network, sizes)]


def _arch(module: Any) -> int:
    """The architecture of the GPU that a module is on; 0 if it is not on one."""
    first = next(module.parameters(), None)
    return 0 if first is None else architecture(first)


class Ahead:
    """Kernels that a thread is putting into Triton's cache; it starts at once."""

    def __init__(
        self, plan: Callable[[], list[Run]], arch: int, shipped: Shipped | None = None
    ) -> None:
        self.total = self.done = 0
        """How many kernels have to be compiled, and how many are."""
        self.said = "being planned"
        """The state in words: where the kernels came from, or how many are ready."""
        self.wrong: str | None = None
        """One sentence on why some kernels are not ready, if so."""
        self._arch, self._shipped = arch, shipped
        self._told = threading.Lock()
        self._thread = threading.Thread(
            target=self._work, args=(plan,), name="fastdiff-ahead", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until all kernels are ready, with a bar on a terminal. Warn once about a failure."""
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
        except Exception as error:  # a picture can be drawn without all this
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.said = "not compiled ahead"
            self.wrong = f"kernels are compiled only at their first launch: {reason}"

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
        self.said = f"{plural(len(jobs), 'kernel')}, {len(missing)} of them being compiled"
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
                f"{len(failed)} of {plural(len(jobs), 'kernel')} could not be compiled ahead of"
                f" their first launch; {first.job.kernel}: {first.error}"
            )
        self.said = f"{plural(len(jobs), 'kernel')}: {', '.join(parts)}"

    def _unpack(self, shipped: Shipped, missing: list[Any]) -> list[Any]:
        """Copy what the folder has into Triton's cache; return the jobs that are still missing."""
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
                f"{shipped.folder} lacks {plural(len(missing), 'kernel')} of this pipeline; now"
                f" compiled: {why}"
            )
        return missing
