"""The kernels of a denoising step on an NVIDIA GPU, found without one.

The networks run on tensors without memory (the meta device), for which our code chooses the same
kernels as on a GPU (`kernels.where.on_gpu`). Our Triton kernels count as the launches of their
plans, torch's ops as the launches of its CUDA backend.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fastdiff.bench.gpus import Gpu
from fastdiff.bench.roofline import floor
from fastdiff.bench.tally import FORMULAS, Tally, bytes_of, moved, only_memory
from fastdiff.errors import UserError
from fastdiff.families import named
from fastdiff.kernels.contract import Launch
from fastdiff.kernels.dispatch import KERNELS
from fastdiff.kernels.planned import Planning
from fastdiff.models.borrow import Loan
from fastdiff.runtime.planned import Run, step

_aten = torch.ops.aten
NAMES = {
    "convolution": "convolution (cuDNN)",
    "addmm": "matrix product (cuBLAS)",
    "addmm_": "matrix product (cuBLAS)",
    "_addmm_activation": "matrix product (cuBLAS)",
    "mm": "matrix product (cuBLAS)",
    "bmm": "matrix product (cuBLAS)",
}
"""torch's ops that libraries compute; all others are torch's own kernels."""
SDPA = "attention (cuDNN or FlashAttention)"


@dataclass(frozen=True)
class Launches:
    """All launches of one kernel in a step."""

    kernel: str
    launches: int
    bytes: int
    """The least traffic: data that an earlier launch of the same op has read or written counts as
    coming from the L2 cache."""
    flops: int
    floor_ms: float
    """The sum of the launches' roofline times on the GPU, without latency."""


class _Recorder(Planning):
    """Notes every launch as (kernel, work), in order; results have no values."""

    def __init__(self, arch: int) -> None:
        super().__init__(arch)
        self.launched: list[tuple[str, Tally]] = []

    def note(self, kernel: str, traffic: int, flops: int = 0) -> None:
        self.launched.append((kernel, Tally(1, traffic, flops)))

    def convolution(self, args: tuple[Any, ...]) -> Tensor:
        """torch adds the bias in a separate kernel after cuDNN's."""
        x, weight, bias, *more = args
        out = super().convolution((x, weight, None, *more))
        flops = int(FORMULAS[_aten.convolution](x, weight, None, *more, out_val=out))
        self.note(NAMES["convolution"], sum(map(bytes_of, (x, weight, out))), flops)
        if bias is not None:
            self.note("torch add (a convolution's bias)", 2 * bytes_of(out) + bytes_of(bias))
        return out

    def enlargement(self, x: Tensor, enlarged: Tensor) -> Tensor:
        """On a GPU this is one launch, channels last; on the meta device it is many ops."""
        out = super().enlargement(x, enlarged)
        self.note("torch upsample_nearest2d", bytes_of(x) + bytes_of(out))
        return out

    def other(
        self, op: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        formula = FORMULAS.get(op.overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=result)) if formula else 0
        if not only_memory(op, name):
            read, written = moved(op, name, args, kwargs, result)
            if written:
                self.note(NAMES.get(name, f"torch {name}"), read + written, flops)

    def planned(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], launches: tuple[Launch, ...]
    ) -> None:
        kernel, flops = KERNELS[name], 0
        if kernel.spec.products:
            with FlopCounterMode(display=False) as counter:
                kernel.spec.reference(*args, **kwargs)
            flops = counter.get_total_flops()
        seen: set[int] = set()
        for launch in launches:
            tensors = {id(t): t for t in launch.arguments.values() if isinstance(t, Tensor)}
            fresh = sum(bytes_of(tensors[key]) for key in tensors.keys() - seen)
            self.note(f"{name} {launch.kernel.__name__}", fresh, flops)
            seen, flops = seen | tensors.keys(), 0


class _Whole(TorchFunctionMode):
    """Notes torch's own attention and RMSNorm, which differ by device, as one launch each."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is F.rms_norm:
            x, weight = args[0], args[2] if len(args) > 2 else None
            made = torch.empty_like(x)
            traffic = sum(bytes_of(t) for t in (x, weight, made) if t is not None)
            self._recorder.note("torch rms_norm", traffic)
            return made
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        q, k, v = named["query"], named["key"], named["value"]
        B, H, L, K = q.shape
        out = torch.empty((B, L, H, K), dtype=q.dtype, device=q.device).transpose(1, 2)
        work = sum(map(bytes_of, (q, k, v, out)))
        self._recorder.note(SDPA, work, 4 * B * H * L * k.shape[2] * K)
        return out


def launched(run: Callable[[], object], arch: int) -> list[tuple[str, Tally]]:
    """The launches of `run` on an architecture, in order; its tensors are on the meta device."""
    recorder = _Recorder(arch)
    with torch.no_grad(), recorder, _Whole(recorder):
        run()
    return recorder.launched


def uses_guidance(model: nn.Module) -> bool:
    """Whether published pipelines with this network use classifier-free guidance."""
    known = named(model)
    return known is None or known[1].denoised is None or known[1].denoised.guided


def packed(model: nn.Module) -> bool:
    """Whether a network's latents are tokens, each of several of a picture's."""
    known = named(model)
    return (
        known is not None and known[1].denoised is not None and known[1].denoised.shape is not None
    )


def guided(model: nn.Module, dtype: torch.dtype, side: int, tokens: int | None = None) -> Run:
    """A plan's step of one picture, with guidance if published pipelines have it; arguments as for
    `rows`. tokens: of a text; by default as in published pipelines."""
    known = named(model)
    denoised = None if known is None else known[1].denoised
    if known is None or denoised is None:
        raise UserError(f"fastdiff has no denoising loop for a {type(model).__name__}")
    ((module, kind),) = known[1].taken("", nn.Module.to(model, dtype=dtype)).values()
    network = kind.borrow(module, Loan(module, rehearsal=True)).network
    texts = 2 if denoised.guided else 1
    return step(network, *denoised.picture(network, side, texts, tokens))


def rows(model: nn.Module, gpu: Gpu, dtype: torch.dtype, side: int) -> list[Launches]:
    """The launches of one guided step by kernel, those with the largest floor first.

    Args:
        model: diffusers' own network, on the meta device.
        side: the latents' height and width.
    """
    run = guided(model, dtype, side)
    by_kernel: defaultdict[str, list[Tally]] = defaultdict(list)
    for kernel, work in launched(run, int(gpu.arch.removeprefix("sm_"))):
        by_kernel[kernel].append(work)
    found = [
        Launches(
            kernel,
            len(works),
            sum(work.bytes for work in works),
            sum(work.flops for work in works),
            sum(floor(work, gpu, dtype)[0] for work in works),
        )
        for kernel, works in by_kernel.items()
    ]
    return sorted(found, key=lambda row: -row.floor_ms)
