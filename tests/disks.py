"""Places that take no file."""

import resource
import subprocess
from contextlib import contextmanager


@contextmanager
def small_disk(folder, size):
    """Nowhere in `folder` can `size` bytes be written: a small tmpfs, else a limit on files."""
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
