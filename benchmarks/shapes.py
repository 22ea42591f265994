"""The sizes of full models for our Triton kernels, which are too slow for the interpreter.

SD1.5 at 512x512, SDXL, SD3-medium, SD3.5-medium and SD3.5-large at 1024x1024 with two samples
(guidance); FLUX, and the VAE of SD1.5 and SDXL, with one picture. Ops whose spec already has
full-size cases of models (`guided_step`) use those.
"""

from fastdiff.bench.kernels import MODELS
from fastdiff.kernels.contract import Case
from fastdiff.kernels.dispatch import Kernel, all_kernels

_ATTENTION = (
    Case("sd15-64-self", B=2, Lq=4096, Lk=4096, H=8, K=40),
    Case("sd15-32-self", B=2, Lq=1024, Lk=1024, H=8, K=80),
    Case("sd15-16-self", B=2, Lq=256, Lk=256, H=8, K=160),
    Case("sd15-8-self", B=2, Lq=64, Lk=64, H=8, K=160),
    Case("sdxl-64-self", B=2, Lq=4096, Lk=4096, H=10, K=64),
    Case("sdxl-32-self", B=2, Lq=1024, Lk=1024, H=20, K=64),
    Case("sd15-64-cross", B=2, Lq=4096, Lk=77, H=8, K=40),
    Case("sd15-32-cross", B=2, Lq=1024, Lk=77, H=8, K=80),
    Case("sd15-16-cross", B=2, Lq=256, Lk=77, H=8, K=160),
    Case("sdxl-64-cross", B=2, Lq=4096, Lk=77, H=10, K=64),
    Case("sdxl-32-cross", B=2, Lq=1024, Lk=77, H=20, K=64),
    Case("flux-1024px", B=1, Lq=4608, Lk=4608, H=24, K=128),
    Case("vae-64-self", B=1, Lq=4096, Lk=4096, H=1, K=512),
)
_GROUP_NORM_SILU = (
    Case("sd15-64", B=2, Y=64, X=64, C=320, G=32, row=True),
    Case("sd15-64-cat", B=2, Y=64, X=64, C=640, C2=320, G=32),
    Case("sd15-32", B=2, Y=32, X=32, C=640, G=32, row=True),
    Case("sd15-16", B=2, Y=16, X=16, C=1280, G=32, row=True),
    Case("sd15-8-cat", B=2, Y=8, X=8, C=1280, C2=1280, G=32),
    Case("sdxl-128", B=2, Y=128, X=128, C=320, G=32, row=True),
    Case("sdxl-128-cat", B=2, Y=128, X=128, C=640, C2=320, G=32),
    Case("sdxl-64", B=2, Y=64, X=64, C=640, G=32, row=True),
    Case("sdxl-32", B=2, Y=32, X=32, C=1280, G=32, row=True),
    Case("vae-512-mid", B=1, Y=256, X=256, C=512, G=32, eps=1e-6),
    Case("vae-512-top", B=1, Y=512, X=512, C=128, G=32, eps=1e-6),
    Case("vae-1024-top", B=1, Y=1024, X=1024, C=128, G=32, eps=1e-6),
)
_GELU_GATE = (
    Case("sd15-64", B=2, L=4096, N=1280),
    Case("sd15-32", B=2, L=1024, N=2560),
    Case("sd15-16", B=2, L=256, N=5120),
    Case("sdxl-64", B=2, L=4096, N=2560),
    Case("sdxl-32", B=2, L=1024, N=5120),
    Case("flux2-1024px", B=1, L=4608, N=18432),
)
_ADA_NORM = (
    Case("sd15-64", B=2, L=4096, D=320, affine=True, residual=2),
    Case("sd15-32", B=2, L=1024, D=640, affine=True, residual=2),
    Case("sdxl-64", B=2, L=4096, D=640, affine=True, residual=2),
    Case("sdxl-32", B=2, L=1024, D=1280, affine=True, residual=2),
    Case("sd3-1024-first", B=2, L=4096, D=1536, eps=1e-6, modulated=True),
    Case("sd3-1024", B=2, L=4096, D=1536, eps=1e-6, modulated=True, gated=True, residual=2),
    Case("sd3-text", B=2, L=333, D=1536, eps=1e-6, modulated=True, gated=True, residual=2),
    Case("sd35-large-1024", B=2, L=4096, D=2432, eps=1e-6, modulated=True, gated=True, residual=2),
    Case("flux-1024", B=1, L=4096, D=3072, eps=1e-6, modulated=True, gated=True, residual=1),
)
_RESIDUAL = (
    Case("sd15-32-up", B=2, Y=32, X=32, C=640, enlarge=2),
    Case("sdxl-64-up", B=2, Y=64, X=64, C=640, enlarge=2),
    Case("sd35-1024px", B=2, Y=1, X=4096, C=1536, shift=False, tokens=True, gated=True),
    Case("vae-512-up", B=1, Y=256, X=256, C=256, enlarge=2),
)
_JOINT_ATTENTION = (
    Case("sd3-1024px", B=2, L=4096, T=333, H=24, K=64),
    Case("sd3-1024px-last", B=2, L=4096, T=333, H=24, K=64, silent=True),
    Case("sd3-1024px-without-t5", B=2, L=4096, T=78, H=24, K=64, biased=True),
    Case("sd3-512px", B=2, L=1024, T=333, H=24, K=64),
    Case("sd35-large-1024px", B=2, L=4096, T=333, H=38, K=64),
    Case("flux-1024px", B=1, L=4096, T=512, H=24, K=128),
)
_QK_NORM = (
    Case("sd35-medium-1024px", B=2, L=4096, H=24, K=64, affine=True),
    Case("sd35-large-1024px", B=2, L=4096, H=38, K=64, affine=True),
    Case("sd35-large-text", B=2, L=333, H=38, K=64, affine=True),
    Case("flux-1024px", B=1, L=4096, H=24, K=128, affine=True, rotary=True),
)
SHAPES: dict[str, tuple[Case, ...]] = {
    "attention": _ATTENTION,
    "group_norm_silu": _GROUP_NORM_SILU,
    "gelu_gate": _GELU_GATE,
    "ada_norm": _ADA_NORM,
    "residual": _RESIDUAL,
    "joint_attention": _JOINT_ATTENTION,
    "qk_norm": _QK_NORM,
}
"""By op."""


def triton_kernels() -> list[Kernel]:
    """The kernels that have a Triton implementation."""
    return [kernel for kernel in all_kernels().values() if "triton" in kernel.implementations]


def full(kernel: Kernel) -> tuple[Case, ...]:
    """A kernel's sizes in full models."""
    own = [case for case in kernel.spec.cases if case.name.startswith(MODELS)]
    return SHAPES.get(kernel.spec.name) or tuple(own)


def tiny(kernel: Kernel) -> tuple[Case, ...]:
    """The smallest of its spec's cases, preferably a demo case; for a dry run."""
    demo = [case for case in kernel.spec.cases if case.name.startswith("demo")]
    return (min(demo or kernel.spec.cases, key=lambda case: kernel.spec.bytes(case, 4)),)
