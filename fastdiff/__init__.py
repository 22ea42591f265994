"""fastdiff makes diffusers pipelines fast without changing what they draw.

>>> import fastdiff
>>> pipe = fastdiff.compile(pipe)      # in place; the same object comes back
>>> print(fastdiff.report(pipe))       # what runs fast, what runs eagerly, and why
>>> print(fastdiff.roofline(pipe))     # what each block costs a GPU at least
>>> fastdiff.restore(pipe)             # as if nothing had happened

Names are resolved when they are first used, so that ``fastdiff --help`` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff.bench.roofline import roofline
    from fastdiff.compiler import Options, compile, report, restore
    from fastdiff.demo import load_demo

__version__ = "0.1.0"
__all__ = ["Options", "__version__", "compile", "load_demo", "report", "restore", "roofline"]

_HOME = {
    "Options": "fastdiff.compiler",
    "compile": "fastdiff.compiler",
    "load_demo": "fastdiff.demo",
    "report": "fastdiff.compiler",
    "restore": "fastdiff.compiler",
    "roofline": "fastdiff.bench.roofline",
}


if not TYPE_CHECKING:  # or every name would have a type: Any

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
        return getattr(import_module(_HOME[name]), name)
