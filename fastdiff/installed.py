"""Versions of what is installed, and which extra brings what is not."""

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
"""By module: the extra of pyproject.toml that has it."""


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """By distribution name; None for what is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
