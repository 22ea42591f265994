"""The machine that numbers were measured on. No host name, no path: results may be published."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import fastdiff
from fastdiff import installed

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "triton",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13",
)


def machine() -> dict[str, Any]:
    """Processor, cores and threads in use, memory in bytes, and the GPU if there is one."""
    import torch

    facts: dict[str, Any] = {
        "os": platform.system() + " " + platform.machine(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": None,
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": gpu.name,
            "arch": f"sm_{gpu.major}{gpu.minor}",
            "memory_bytes": gpu.total_memory,
            "driver": driver(),
            "cuda": torch.version.cuda,
        }
    return facts


def versions() -> dict[str, str | None]:
    """Versions of all packages that affect results, and of Python; None if not installed."""
    own = {
        "fastdiff": fastdiff.__version__,
        "fastdiff._C": "built" if native()["isa"] else None,
        "python": platform.python_version(),
    }
    return own | installed.versions(PACKAGES)


def commit() -> str | None:
    """The git commit of this checkout, with "-dirty" if edited; None for an installed package.

    FASTDIFF_COMMIT overrides it, for a copy of a checkout on another machine.
    """
    if told := os.environ.get("FASTDIFF_COMMIT"):
        return told
    root = Path(fastdiff.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    return _ask("git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*")


def driver() -> str | None:
    """The NVIDIA driver's version."""
    return _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


def cpu_model() -> str:
    """The processor's name as Linux reports it, else the architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def native() -> dict[str, str | None]:
    """The C++ kernels: the instruction set in use, or why there are none and what to do."""
    try:
        from fastdiff.kernels.dispatch import NATIVE, NOT_BUILT
    except ImportError as error:
        return {"isa": None, "note": f"built, but does not load: {error}"}
    if NATIVE is None:
        return {"isa": None, "note": NOT_BUILT}
    return {"isa": f"{NATIVE.isa()}, threads: {NATIVE.thread_runtime()}", "note": None}


def _ask(*command: str) -> str | None:
    """The first line that a command prints; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or [None])[0]  # type: ignore[list-item]
