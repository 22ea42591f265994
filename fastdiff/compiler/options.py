"""What `fastdiff.compile` may be told."""

from dataclasses import dataclass
from pathlib import Path

FASTDIFF = "fastdiff"
"""The backend that computes with kernels of our own."""
BACKENDS = (FASTDIFF, "ort", "tensorrt")
LOOP = "loop"
"""The denoising loop's name beside the components'."""


@dataclass(frozen=True)
class Options:
    """Choices of `fastdiff.compile`. Every default is lossless."""

    ignore: tuple[str, ...] = ()
    """Components to leave as they are, e.g. ("vae",), or ("loop",) for diffusers' own denoising
    loop around our networks. Gains nothing; costs their speed."""
    backend: str = FASTDIFF
    """Who computes the U-Net: "fastdiff", "ort" (ONNX Runtime) or "tensorrt" (either flavour)."""
    engines: str | Path | None = None
    """Folder that `fastdiff export` wrote for this pipeline. Without one "ort" exports the U-Net
    first, which takes minutes; "tensorrt" needs one."""
    ort_graphs: bool = False
    """Whether ONNX Runtime keeps a CUDA graph for every shape. Gains launches at small sizes, costs
    memory."""
