"""Reports the progress of a build, and ends it on Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Watch(Protocol):
    """Receives a build's progress; phases may be nested, and each step completes a part of one."""

    def start(self, phase: str, parent: str | None, steps: int) -> None: ...

    def step(self, phase: str) -> None: ...

    def finish(self, phase: str) -> None: ...


def monitor(trt: Any, watch: Watch) -> Any:
    """A progress monitor that reports to `watch`, and ends the build once it is `cancelled`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.cancelled = False

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            watch.start(phase, parent, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            watch.step(phase)
            return not self.cancelled

        def phase_finish(self, phase: str) -> None:
            watch.finish(phase)

    return Monitor()


@contextmanager
def interruptible(progress: Any) -> Iterator[None]:
    """Make Ctrl-C end the build at its next step: no exception may pass through the library."""
    main = threading.current_thread() is threading.main_thread()
    # None: a handler in C
    if not main or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield
        return

    def cancel(*_: object) -> None:
        progress.cancelled = True

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if progress.cancelled:
        raise KeyboardInterrupt
