"""A folder without room for a file."""

import resource
import subprocess
from contextlib import contextmanager


@contextmanager
def small_disk(folder, size):
    """In this block `folder` has no room for `size` bytes: it is a small tmpfs or, if none can
    be mounted, the size of files is limited. Yields the text of the error."""
    mount = ("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    if subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield "No space left on device"
        finally:
            subprocess.run(("umount", folder), check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield "File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
