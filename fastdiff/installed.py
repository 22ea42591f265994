"""Installed versions, and the extra that installs each optional module."""

from collections.abc import Iterable
from importlib import metadata

EXTRAS = {
    "triton": "gpu",
    "diffusers": "diffusers",
    "transformers": "diffusers",
    "accelerate": "diffusers",
    "safetensors": "diffusers",
    "PIL": "diffusers",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "tensorrt": "trt",
    "tensorrt_rtx": "trt-rtx",
    "tritonclient": "triton-server",
    "jinja2": "report",
    "matplotlib": "report",
}
"""The extra of pyproject.toml that installs each module, by module name."""


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each distribution, by name; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
