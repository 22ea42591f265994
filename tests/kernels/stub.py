"""A driver for Triton that starts no kernel, and notes which ones Triton compiles. It is for
separate processes, whose kernels do not run in the interpreter."""

from types import SimpleNamespace

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Stub:
    """Stands in for a GPU of an architecture. `started`: the names of the kernels that it got;
    `compiled`: the names of those that Triton compiled."""

    def __init__(self, arch):
        self.arch = arch
        self.started = []
        self.compiled = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, code, shared, device: (1, 1, 32, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )
        driver.set_active(self)
        knobs.compilation.listener = self._listen

    def _listen(self, *, src, cache_hit, **others):
        if not cache_hit:
            self.compiled.append(src.name)

    def launcher_cls(self, src, metadata):
        return lambda *arguments: self.started.append(src.name)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)
