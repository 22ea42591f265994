"""Patches Triton's interpreter: Triton 3.6's works with numpy 2.4 and later, and any version's is
ten times as fast."""

from importlib import metadata

OLDEST = (3, 6)


def mend() -> None:
    """Let the interpreter use an array of one number as an index, which numpy no longer does.

    Triton 3.7 does so itself. Compiled kernels do not need it.
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

    The interpreter patches it and undoes the patch at each call of a device function, which takes
    nine tenths of its time. A process that compiles no kernel does not need it undone.
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
