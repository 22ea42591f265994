"""In tests, Triton kernels run in Triton's interpreter, on the CPU. Importing one reads the
variable below, so it is set first."""

import gc
import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


def pytest_sessionstart(session: pytest.Session) -> None:
    """Import the fixtures, but not in a process that only gives tests to xdist's workers: these
    start some seconds sooner.

    From here on garbage is collected less often: it took a tenth of all time, and only objects in
    reference cycles need it.
    """
    plugins = session.config.pluginmanager
    if not plugins.hasplugin("dsession"):
        gc.set_threshold(50_000, 10, 10)
        plugins.import_plugin("shared")
