"""The receipt beside the speed: is the picture the same, and how far from float64 is a step?

There are two gates. Both compare with the same network in float64 rather than with eager, since
eager rounds, too:

- one step's network, by the same rule as every kernel:
  max|y - ref| <= 2 (max|eager - ref| + eps(dtype) max|ref|), where eager's error is the larger
  one of its two memory formats. Both are PyTorch's own, and on two Zen cores the demo's step has
  three times the rounding error in NHWC as in NCHW;
- the whole picture, in which a sampler amplifies rounding errors:
  rms(y - ref) <= max(4 rms(eager - ref), 0.001), the latter a quarter of an 8-bit step.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from fastdiff.bench.contenders import sharing
from fastdiff.bench.pixels import noise_as
from fastdiff.bench.timing import Request, draw
from fastdiff.recipes import denoiser

_ssim: Any = structural_similarity  # untyped
STEP_FACTOR, PICTURE_FACTOR, PICTURE_FLOOR = 2.0, 4.0, 1e-3


@dataclass(frozen=True)
class Receipt:
    """How a backend's picture and step compare; passed only if both gates are.

    psnr_db (inf if equal), ssim, max_abs: picture in [0, 1] against eager's from the same noise;
    of an embedding only the last, the others are NaN.
    err_*: largest error of one step's network against float64, eager's in the worse of its memory
    formats; budget: the limit of err_vs_fp64. picture_rms_*: the picture against float64.
    """

    psnr_db: float
    ssim: float
    max_abs: float
    err_vs_fp64: float
    err_eager_vs_fp64: float
    budget: float
    picture_rms_vs_fp64: float
    picture_rms_eager_vs_fp64: float
    passed: bool


@dataclass(frozen=True)
class Step:
    """The arguments of one call of the denoising network, as the pipeline made it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Truth:
    """The results of eager and float64 for the request; all float64 on the CPU.

    picture*: [H, W, 3] in [0, 1]; output*: [2B, C, H/f, W/f] of the middle step, eager's both in
    NCHW and in NHWC.
    """

    step: Step
    picture: torch.Tensor
    picture_eager: torch.Tensor
    output: torch.Tensor
    outputs_eager: tuple[torch.Tensor, torch.Tensor]
    eps: float


def find_truth(pipe: Any, request: Request) -> Truth:
    """Draw with the eager `pipe`, and with a float64 copy that is freed on return."""
    calls: list[Step] = []
    net = denoiser(pipe)
    hook = net.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(Step(args, kwargs)), with_kwargs=True
    )
    try:
        picture_eager = draw(pipe, request).image
    finally:
        hook.remove()
    step = calls[len(calls) // 2]
    nhwc = copy.deepcopy(net).to(memory_format=torch.channels_last)
    outputs_eager = run_step(net, step), run_step(nhwc, step)
    del nhwc
    exact = sharing(pipe).to(torch.float64)
    with noise_as(pipe, net.dtype):
        picture = draw(exact, request).image
    return Truth(
        step=step,
        picture=picture,
        picture_eager=picture_eager,
        output=run_step(denoiser(exact), Step(_as_float64(step.args), _as_float64(step.kwargs))),
        outputs_eager=outputs_eager,
        eps=torch.finfo(net.dtype).eps,
    )


def run_step(net: Any, step: Step) -> torch.Tensor:
    """The network's output for one recorded call, float64 on the CPU."""
    with torch.no_grad():
        output: Any = net(*step.args, **step.kwargs)[0]
    if isinstance(output, list):  # Z-Image's, of one for each text
        output = torch.stack(output)
    made: torch.Tensor = output.double().cpu()
    return made


def check(picture: torch.Tensor, output: torch.Tensor, truth: Truth) -> Receipt:
    """The receipt of a backend's `picture` and `output` for truth's request and step.

    picture: [H, W, 3] in [0, 1]; output: [2B, C, H/f, W/f]; both float64. NaN never passes.
    """
    err = _max_abs(output, truth.output)
    err_eager = max(_max_abs(eager, truth.output) for eager in truth.outputs_eager)
    budget = STEP_FACTOR * (err_eager + truth.eps * float(truth.output.abs().max()))
    rms, rms_eager = _rms(picture, truth.picture), _rms(truth.picture_eager, truth.picture)
    ours, eager = picture.numpy(), truth.picture_eager.numpy()
    drawn = ours.ndim == 3
    return Receipt(
        psnr_db=psnr(ours, eager) if drawn else math.nan,
        ssim=float(_ssim(ours, eager, channel_axis=-1, data_range=1.0)) if drawn else math.nan,
        max_abs=_max_abs(picture, truth.picture_eager),
        err_vs_fp64=err,
        err_eager_vs_fp64=err_eager,
        budget=budget,
        picture_rms_vs_fp64=rms,
        picture_rms_eager_vs_fp64=rms_eager,
        passed=err <= budget and rms <= max(PICTURE_FACTOR * rms_eager, PICTURE_FLOOR),
    )


def psnr(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Peak signal-to-noise ratio in dB for pictures in [0, 1]; inf if equal, nan with any nan."""
    mse = float(np.mean((a - b) ** 2))
    return float("inf") if mse == 0 else float(-10 * np.log10(mse))


def _max_abs(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def _rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def _as_float64(value: Any) -> Any:
    """`value` with every floating-point tensor in it cast to float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _as_float64(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_as_float64(item) for item in value)
    return value
