"""What `fastdiff.compile` may be told."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

from fastdiff.errors import UserError

FASTDIFF = "fastdiff"
"""The backend that computes with kernels of our own."""
BACKENDS = (FASTDIFF, "ort", "openvino", "tensorrt")
TILINGS = ("auto", "exact")
LOOP = "loop"
"""The denoising loop's name beside the components'."""


@dataclass(frozen=True)
class Options:
    """Choices of `fastdiff.compile`. Every default is lossless.

    Raises ValueError where one is none of those offered, or two contradict each other.
    """

    ignore: tuple[str, ...] = ()
    """Parts to leave as they are, as `report` names them or the component that they belong to: e.g.
    ("vae",), ("vae.decoder",), or ("loop",) for diffusers' own denoising loop around our networks.
    Gains nothing; costs their speed."""
    backend: str = FASTDIFF
    """Who computes the network that the loop repeats: "fastdiff", "ort" (ONNX Runtime),
    "openvino" (on a CPU) or "tensorrt" (either flavour)."""
    engines: str | Path | None = None
    """Folder that `fastdiff export` wrote for this pipeline. Without one "ort" and "openvino"
    export the network first, which takes minutes; "tensorrt" needs one."""
    ort_graphs: bool = False
    """Whether ONNX Runtime keeps a CUDA graph for every shape. Gains launches at small sizes, costs
    memory."""
    warm: str | Path | None = None
    """Folder that `fastdiff warm` wrote: its kernels are not compiled on this machine. What it does
    not have for this pipeline, GPU or Triton is compiled, with a warning."""
    tactics: bool = True
    """Whether cuDNN measures its plans for a convolution that is too small to fill a GPU, when it
    first meets it. Gains speed where pictures are small, costs time once a process (the report says
    how much). Not done where torch is set to deterministic algorithms."""
    vae_tiling: str = "auto"
    """How an autoencoder decodes what takes much memory. "auto": in one piece, and where a GPU's
    memory is short in strips, exactly: the same picture up to rounding. "exact": in strips whenever
    its pictures would take more than 1 GiB; they take that much then, or a quarter if that is more,
    for up to 30% more time. diffusers' own `enable_tiling`, which changes the picture, goes before
    both."""

    def __post_init__(self) -> None:
        if not isinstance(self.ignore, list | tuple | set | frozenset) or not all(
            isinstance(name, str) for name in self.ignore
        ):
            raise UserError(
                f'Options.ignore is {self.ignore!r}; give a tuple of names, as ("vae",)'
            )
        object.__setattr__(self, "ignore", tuple(self.ignore))
        if self.backend not in BACKENDS:
            raise UserError(f"Options.backend is {self.backend!r}; choose {', '.join(BACKENDS)}")
        if not isinstance(self.engines, str | Path | None) or self.engines == "":
            raise UserError(
                f"Options.engines is {self.engines!r}; give the folder that fastdiff export wrote"
            )
        if not isinstance(self.ort_graphs, bool):
            raise UserError(f"Options.ort_graphs is {self.ort_graphs!r}; give True or False")
        if not isinstance(self.tactics, bool):
            raise UserError(f"Options.tactics is {self.tactics!r}; give True or False")
        if not isinstance(self.warm, str | Path | None) or self.warm == "":
            raise UserError(
                f"Options.warm is {self.warm!r}; give the folder that fastdiff warm wrote"
            )
        if self.vae_tiling not in TILINGS:
            raise UserError(
                f"Options.vae_tiling is {self.vae_tiling!r}; choose {', '.join(TILINGS)}"
            )
        if self.backend == FASTDIFF and self.engines is not None:
            raise UserError(f"Options.engines is {self.engines}, which needs a backend to run it")
        if self.ort_graphs and self.backend != "ort":
            raise UserError(f'Options.ort_graphs goes with the backend "ort"; got {self.backend!r}')


class Keywords(TypedDict, total=False):
    """The fields of `Options`, for who reads `compile`'s types."""

    ignore: tuple[str, ...]
    backend: str
    engines: str | Path | None
    ort_graphs: bool
    warm: str | Path | None
    tactics: bool
    vae_tiling: str


def chosen(options: Options | None, keywords: Mapping[str, Any]) -> Options:
    """The options that a caller gave as one object or as keywords; UserError for anything else."""
    names = ", ".join(field.name for field in fields(Options))
    if options is None:
        for name in keywords:
            if name not in names.split(", "):
                raise UserError(f"compile knows no {name!r}; its options are {names}")
        return Options(**keywords)
    if not isinstance(options, Options):
        raise UserError(
            f"compile's options are a {type(options).__name__}; give fastdiff.Options(...), or"
            f" keywords: {names}"
        )
    if keywords:
        raise UserError(f"compile was given options and the keyword {min(keywords)}; give one")
    return options
