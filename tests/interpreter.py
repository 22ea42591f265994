"""Triton's interpreter: 3.6's beside numpy 2.4 and later, and any in a tenth of its time."""

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


def hasten() -> None:
    """Patch triton.language once for each set of its modules that a kernel's file sees.

    The interpreter patches it again at each call of a device function, which is nine tenths of its
    time, and takes the patches back, which nobody needs in a process that compiles no kernel.
    """
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def once(function):
        modules = {getattr(value, "__name__", "") for value in function.__globals__.values()}
        key = frozenset(modules & {"triton.language", "triton.language.core"})
        if key not in patched:
            patched.add(key)
            patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = once
