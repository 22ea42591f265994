"""Installed versions, the extras that install what is missing, and the other project `fastdiff`."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "fastdiff-engine"
"""Our name to pip; `fastdiff` there is another project's, with the same import name."""
EXTRAS = {
    "triton": "gpu",
    "diffusers": "diffusers",
    "transformers": "diffusers",
    "accelerate": "diffusers",
    "safetensors": "diffusers",
    "PIL": "diffusers",
    "peft": "lora",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "tensorrt": "trt",
    "tensorrt_rtx": "trt-rtx",
    "tritonclient": "triton-server",
    "greenlet": "batching",
    "pyarrow": "bulk",
    "ray": "ray",
    "jinja2": "report",
    "matplotlib": "report",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
}
"""The extra of pyproject.toml that installs each module, by module name."""
BRINGS = {
    "diffusers": "fastdiff.compile and every command with a pipeline",
    "gpu": "the kernels for NVIDIA GPUs; inspect, graph, warm",
    "lora": "LoRA adapters",
    "batching": "fastdiff.batching",
    "report": "report --html",
    "bulk": "generate --prompts with a .parquet file",
    "ray": "generate --ray, serve --ray",
    "onnx": "export --onnx, bench --backends ort on a CPU",
    "onnx-gpu": "bench --backends ort on an NVIDIA GPU",
    "openvino": "bench --backends openvino",
    "trt-rtx": "export --trt for GeForce and RTX GPUs",
    "trt": "export --trt for every GPU from sm_75 on",
    "triton-server": "export --triton-repo",
    "serve": "serve",
}
"""What each extra for users is for."""


def pip(*extras: str) -> str:
    """The command that installs these extras."""
    return f"pip install '{DISTRIBUTION}[{','.join(extras)}]'"


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each distribution, by name; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


@dataclass(frozen=True)
class Need:
    """A package that fastdiff, or one of its extras, requires."""

    package: str
    """Its distribution name."""
    takes: str
    """The versions that work, as pip spells them: ">=2.11"."""
    found: str | None
    """The version that is installed; None if none is."""
    fits: bool
    """Whether the installed version works."""

    def __str__(self) -> str:
        """As pip spells it, followed by the installed version if that does not fit."""
        return f"{self.package}{self.takes}" + (f" (not {self.found})" if self.found else "")


def needs(extra: str = "") -> list[Need]:
    """The packages that an extra requires, or those that are always required. Empty if pip has not
    installed fastdiff, for example if its folder is on PYTHONPATH."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for asked in map(Requirement, lines):
        of_extra = asked.marker is not None and not asked.marker.evaluate({"extra": ""})
        wanted = asked.marker is None or asked.marker.evaluate({"extra": extra})
        if asked.name == DISTRIBUTION or not wanted or of_extra != bool(extra):
            continue
        version = versions([asked.name])[asked.name]
        fits = version is not None and asked.specifier.contains(version, prereleases=True)
        found.append(Need(asked.name, str(asked.specifier), version, fits))
    return found


def clash() -> str | None:
    """A sentence if the other project's `fastdiff` shares our folder, or has damaged it.

    pip installs one over the other without a warning, and uninstalling either removes shared files.
    """
    import fastdiff

    here = Path(__file__).parent
    ours = "compile" in getattr(fastdiff, "__all__", ())
    others = [
        f"{other.name} {other.version}"
        for other in metadata.distributions(name="fastdiff", path=[str(here.parent)])
        if any(here / "__init__.py" == Path(str(file.locate())) for file in other.files or ())
    ]
    if ours and not others:
        return None
    if not others:
        what = (
            "fastdiff/__init__.py is missing or not ours, which another project's fastdiff causes"
        )
    elif ours:
        what = f"{others[0]}, another project, is installed in our folder"
    else:
        what = f"{others[0]}, another project, has replaced our fastdiff/__init__.py"
    how = f"pip uninstall --yes fastdiff {DISTRIBUTION}, then install {DISTRIBUTION} again"
    return f"{what}; {how}"
