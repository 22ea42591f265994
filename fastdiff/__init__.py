"""fastdiff makes diffusers pipelines fast without changing what they draw.

>>> import fastdiff
>>> pipe = fastdiff.compile(pipe)      # in place; returns the same object
>>> print(fastdiff.report(pipe))       # what runs fast, what runs eagerly, and why
>>> print(fastdiff.roofline(pipe))     # the least time each block can take on a GPU
>>> fastdiff.restore(pipe)             # undo compile

If something runs slower than it could, such as a call that runs eagerly, the logger "fastdiff" says
so once for each reason, at level WARNING; unless you add a handler, Python prints it to stderr.

Names are imported on first use, so ``fastdiff --help`` does not import torch.
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


if not TYPE_CHECKING:  # otherwise type checkers would see every name as Any

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
        return getattr(import_module(_HOME[name]), name)
