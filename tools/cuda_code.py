"""Compiles the CUDA kernels for each architecture, without a GPU, and writes their figures.

    python tools/cuda_code.py benchmarks/static/cuda.json

Needs `nvcc` on the PATH, or the pip packages nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt,
nvidia-cuda-runtime and nvidia-cuda-cccl in this Python; reads the code with `cuobjdump` from
Triton's wheel.
"""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton

from fastdiff.kernels import sass

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "csrc" / "cuda" / "group_norm_silu.cu"
ARCHS = (80, 90, 100, 120)  # 86 and 89 run the code for 80
WHEEL = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "nvcc")
NAME = re.compile(r"15group_norm_siluI(f|6__half|13__nv_bfloat16)Li(\d+)E")
DTYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


def nvcc() -> str | None:
    """The path of a CUDA compiler: the one on the PATH, else the pip package's."""
    return shutil.which("nvcc") or (str(WHEEL) if WHEEL.exists() else None)


def version() -> str:
    """The version, such as "13.0.88"."""
    text = _output_of(nvcc() or "nvcc", "--version")
    return re.findall(r"V(\d+\.\d+\.\d+)", text)[0]


def rows(arch: int) -> list[dict[str, Any]]:
    """One row for each kernel in the source, compiled for sm_<arch>."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        options = ("-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}")
        _output_of(nvcc() or "nvcc", *options, "-o", str(cubin), str(SOURCE))
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass"]
        listing = _output_of(*command, str(cubin))
    usage, *kernels = listing.split("\t\tFunction : ")
    usages = dict(re.findall(r"Function (\w+):\s+(REG:.*)", usage))
    return [_row(arch, usages[code.split()[0]], code) for code in kernels]


def _row(arch: int, usage: str, listing: str) -> dict[str, Any]:
    """listing: the kernel's name and machine code. Of the loads the widest counts, since those of
    the weights are narrow; of the stores the narrowest."""
    (dtype, lanes) = NAME.findall(listing.split()[0])[0]
    code = sass.parse([usage], listing, [len(listing)])[0]
    return {
        "kernel": "group_norm_silu",
        "dtype": DTYPES[dtype],
        "lanes": int(lanes),
        "arch": arch,
        "registers": code.registers,
        "spills": code.spills,
        "load": code.load,
        "store": min(code.stores),
        "cluster": "UCGABAR_ARV" in listing and "UCGABAR_WAIT" in listing,
    }


def _output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(out: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = [row for some in pool.map(rows, ARCHS) for row in some]
    document = {"schema": "fastdiff.cuda/1", "nvcc": version(), "rows": found}
    Path(out).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
