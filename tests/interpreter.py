"""Triton 3.6's interpreter beside numpy 2.4 and later."""

from importlib import metadata

OLDEST = (3, 6)


def mend() -> None:
    """Let it take an array of one number as an index, which numpy itself no longer turns into one.

    Triton 3.7 does so itself. Kernels that are compiled have nothing to do with it.
    """
    version = tuple(map(int, metadata.version("triton").split(".")[:2]))
    if version > OLDEST:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
