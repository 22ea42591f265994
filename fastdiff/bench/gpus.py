"""Peak rates of GPUs: their makers' figures, and rates reported from real ones.

Products are dense (datasheets often give the rate with half of the weights zero, twice as much) and
accumulate in float32, as torch's do; GeForce cards are twice as fast if they accumulate in float16.
"""

from dataclasses import dataclass

import torch

from fastdiff.errors import UserError

_HOPPER = "NVIDIA H100 Tensor Core GPU datasheet, its rates with sparsity halved"
_ADA = "NVIDIA Ada GPU Architecture whitepaper v2.01, appendix"


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Rates: 1e12 FLOP/s and 1e12 bytes/s; memory: 1e9 bytes."""

    name: str
    """The name for `--gpu`."""
    device: str
    """The name that `torch.cuda.get_device_name` returns."""
    arch: str
    tflops_fp16: float
    """float16 and bfloat16 products on tensor cores."""
    tflops_fp32: float
    """float32 products on tensor cores (TF32), the fastest mode that torch may choose."""
    bandwidth: float
    memory: int
    source: str
    reported_tflops: float | None = None
    """From a large bfloat16 matrix product; no samples were kept."""
    reported_bandwidth: float | None = None
    """From a large copy, reads and writes together; no samples were kept."""
    reported_source: str | None = None

    def rate(self, dtype: torch.dtype) -> float:
        """Peak FLOP/s of products in a dtype: as reported, else as specified."""
        if dtype == torch.float32:
            return 1e12 * self.tflops_fp32
        return 1e12 * (self.reported_tflops or self.tflops_fp16)

    @property
    def bytes_per_s(self) -> float:
        """Device memory bandwidth: as reported, else as specified."""
        return 1e12 * (self.reported_bandwidth or self.bandwidth)


_ALL = (
    Gpu(
        *("h200", "NVIDIA H200", "sm_90", 989.4, 494.7, 4.8, 141),
        "NVIDIA H200 Tensor Core GPU datasheet, its rates with sparsity halved",
        reported_tflops=790.0,
        reported_bandwidth=4.3,
        reported_source="a large bfloat16 product and a copy on an H200, rounded, no samples kept",
    ),
    Gpu("h100", "NVIDIA H100 80GB HBM3", "sm_90", 989.4, 494.7, 3.35, 80, _HOPPER),
    Gpu("h100-pcie", "NVIDIA H100 PCIe", "sm_90", 756.0, 378.0, 2.0, 80, _HOPPER),
    Gpu(
        *("b200", "NVIDIA B200", "sm_100", 2250.0, 1100.0, 8.0, 180),
        "NVIDIA Blackwell datasheet, HGX B200, its rates with sparsity halved",
    ),
    Gpu(
        *("a100-80", "NVIDIA A100-SXM4-80GB", "sm_80", 312.0, 156.0, 2.039, 80),
        "NVIDIA A100 Tensor Core GPU datasheet",
    ),
    Gpu("l40s", "NVIDIA L40S", "sm_89", 362.05, 183.0, 0.864, 48, "NVIDIA L40S datasheet"),
    Gpu(
        *("l4", "NVIDIA L4", "sm_89", 121.0, 60.0, 0.3, 24),
        "NVIDIA L4 datasheet, its rates with sparsity halved",
    ),
    Gpu(
        *("rtx5090", "NVIDIA GeForce RTX 5090", "sm_120", 209.5, 104.8, 1.792, 32),
        "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix",
    ),
    Gpu("rtx4090", "NVIDIA GeForce RTX 4090", "sm_89", 165.2, 82.6, 1.008, 24, _ADA),
    Gpu(
        *("rtx3090", "NVIDIA GeForce RTX 3090", "sm_86", 71.0, 35.6, 0.936, 24),
        "NVIDIA Ampere GA102 GPU Architecture whitepaper v2, appendix",
    ),
)
GPUS = {gpu.name: gpu for gpu in _ALL}


def gpu_named(name: str) -> Gpu:
    """The GPU called `name`; UserError, which lists all names, if there is none."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu is {name!r}; choose one of {', '.join(GPUS)}")
    return GPUS[name.lower()]


def gpu_called(device: str) -> Gpu | None:
    """The GPU with torch's name `device`; None if unknown (a laptop GPU has another name)."""
    return next((gpu for gpu in _ALL if gpu.device == device), None)


def gpu_here() -> Gpu | None:
    """torch's first GPU; None if there is none or it is unknown."""
    return gpu_called(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None
