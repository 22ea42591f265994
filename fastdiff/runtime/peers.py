"""Ends this process when another rank has died, even while it waits for a GPU.

A collective that was recorded in a CUDA graph has no timeout, and nothing in Python runs while the
host waits for the graph. So another thread listens, on CPU sockets.
"""

import atexit
import os
import sys
import threading
from datetime import timedelta

import torch.distributed as dist

SECONDS = 1.0
"""Seconds between two messages that show that a rank is alive."""
_watching: threading.Thread | None = None


def watch(timeout: timedelta, sentence: str) -> None:
    """Watch the other ranks of the default group until one of them ends, all ranks at once.

    If one dies, or says nothing for `timeout`, print `sentence` and exit with 2.
    """
    global _watching
    if _watching is not None:
        return
    group = dist.new_group(backend="gloo", timeout=timeout)
    leaving = threading.Event()

    def listen() -> None:
        while True:
            every = [False] * dist.get_world_size(group)
            mine = leaving.is_set()
            try:
                dist.all_gather_object(every, mine, group=group)
            except RuntimeError:
                if not leaving.is_set():
                    sys.stderr.write(f"fastdiff: {sentence}\n")
                    sys.stderr.flush()
                    os._exit(2)
                return
            if any(every):
                return
            leaving.wait(SECONDS)

    def leave() -> None:
        leaving.set()
        if _watching is not None:
            _watching.join(2 * SECONDS)

    _watching = threading.Thread(target=listen, name="fastdiff-peers", daemon=True)
    _watching.start()
    atexit.register(leave)
