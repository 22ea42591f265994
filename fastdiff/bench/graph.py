"""A denoising step kernel by kernel, as an NVIDIA GPU would be asked for it, found without one.

The networks run on tensors without memory (the meta device), which our own decisions take for ones
on a GPU (`kernels.contract.on_gpu`). Our Triton kernels are the launches of their own plans;
torch's ops are what its CUDA backend starts.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastdiff.bench.gpus import Gpu
from fastdiff.bench.roofline import floor
from fastdiff.bench.tally import FORMULAS, Tally, bytes_of, moved, only_memory
from fastdiff.kernels.dispatch import KERNELS
from fastdiff.kernels.guided_step import guided_step
from fastdiff.kernels.guided_step.spec import HISTORY
from fastdiff.models.borrow import Loan
from fastdiff.models.unet import UNet, borrow_unet

_aten = torch.ops.aten
NAMES = {
    "convolution": "convolution (cuDNN)",
    "addmm": "matrix product (cuBLAS)",
    "addmm_": "matrix product (cuBLAS)",
    "mm": "matrix product (cuBLAS)",
    "bmm": "matrix product (cuBLAS)",
}
"""torch's ops that libraries compute; others are kernels of torch's own."""
SDPA = "attention (cuDNN or FlashAttention)"


@dataclass(frozen=True)
class Row:
    """All launches of one kernel in a step."""

    kernel: str
    launches: int
    bytes: int
    """Least traffic: what a launch reads of what an earlier one of the same op has read, or
    written, is taken to come from the L2 cache."""
    flops: int
    floor_ms: float
    """Sum over the launches, each at the roofline of the GPU: memory or arithmetic, no latency."""


class _Recorder(TorchDispatchMode):
    """Notes what is launched, as (kernel, work) in order; results have no values."""

    def __init__(self, arch: int) -> None:
        super().__init__()
        self.launched: list[tuple[str, Tally]] = []
        self._arch = arch

    def note(self, kernel: str, traffic: int, flops: int = 0) -> None:
        self.launched.append((kernel, Tally(1, traffic, flops)))

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = op._schema.name.partition("::")[2]
        if op.namespace == "fastdiff":
            return self._ours(name, args, kwargs)
        if op is _aten.convolution.default:
            return self._convolution(args)
        if name == "upsample_nearest2d":
            return self._enlargement(args[0], op(*args, **kwargs))
        with self:  # within an op of ours, ops arrive that are made of others
            result = op.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = op(*args, **kwargs)
        formula = FORMULAS.get(op.overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=result)) if formula else 0
        if not only_memory(op, name):
            read, written = moved(op, name, args, kwargs, result)
            if written:
                self.note(NAMES.get(name, f"torch {name}"), read + written, flops)
        return result

    def _convolution(self, args: tuple[Any, ...]) -> Tensor:
        """Channels last; torch adds the bias in a kernel of its own after cuDNN's."""
        x, weight, bias, *more = args
        out = _channels_last(_aten.convolution.default(x, weight, None, *more))
        flops = int(FORMULAS[_aten.convolution](x, weight, None, *more, out_val=out))
        self.note(NAMES["convolution"], sum(map(bytes_of, (x, weight, out))), flops)
        if bias is not None:
            self.note("torch add (a convolution's bias)", 2 * bytes_of(out) + bytes_of(bias))
        return out

    def _enlargement(self, x: Tensor, enlarged: Tensor) -> Tensor:
        """One launch from channels last to channels last, where the meta device has many ops."""
        out = _channels_last(enlarged)
        self.note("torch upsample_nearest2d", bytes_of(x) + bytes_of(out))
        return out

    def _ours(self, name: str, args: tuple[Any, ...], kwargs: Any) -> Any:
        kernel = KERNELS[name]
        if "triton" not in kernel.implementations:
            with self:
                return kernel.implementations["reference"]()(*args, **kwargs)
        launcher: Any = kernel.implementations["triton"]()
        launches, outputs = launcher.plan(self._arch, *args, **kwargs)
        flops = 0
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
        return outputs


def _channels_last(picture: Tensor) -> Tensor:
    """A picture [B, C, Y, X] as cuDNN and torch's CUDA kernels lay it out; meta may not."""
    return picture.new_empty(picture.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


class _Attention(TorchFunctionMode):
    """One launch of a library for torch's own attention, which differs by device."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, k, v = args[:3]
        B, H, L, K = q.shape
        out = torch.empty((B, L, H, K), dtype=q.dtype, device=q.device).transpose(1, 2)
        work = sum(map(bytes_of, (q, k, v, out)))
        self._recorder.note(SDPA, work, 4 * B * H * L * k.shape[2] * K)
        return out


def launched(run: Callable[[], object], arch: int) -> list[tuple[str, Tally]]:
    """What `run` has a GPU of an architecture launch, in order; its tensors are on meta."""
    recorder = _Recorder(arch)
    with torch.no_grad(), recorder, _Attention(recorder):
        run()
    return recorder.launched


def rows(network: nn.Module, gpu: Gpu, dtype: torch.dtype, side: int, tokens: int) -> list[Row]:
    """The launches of one step of classifier-free guidance, by kernel, the dearest first.

    Args:
        network: a UNet2DConditionModel on the meta device.
        side: of the latents.
        tokens: of the text.
    """
    network = nn.Module.to(network, dtype=dtype)
    step = _step(borrow_unet(network, Loan(network, rehearsal=True)), dtype, side, tokens)
    by_kernel: defaultdict[str, list[Tally]] = defaultdict(list)
    for kernel, work in launched(step, int(gpu.arch.removeprefix("sm_"))):
        by_kernel[kernel].append(work)
    found = [
        Row(
            kernel,
            len(works),
            sum(work.bytes for work in works),
            sum(work.flops for work in works),
            sum(floor(work, gpu, dtype)[0] for work in works),
        )
        for kernel, works in by_kernel.items()
    ]
    return sorted(found, key=lambda row: -row.floor_ms)


def _step(unet: UNet, dtype: torch.dtype, side: int, tokens: int) -> Callable[[], None]:
    """What `runtime.loop` repeats: the network on hoisted rows, then the guided step."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    latents = empty(1, side, side, unet.conv_in.weight.shape[1])
    # SDXL's halves differ in what is added to the time: they part at the first resnet
    time_rows = empty(1 if unet.added is None else 2, unet.rows.weight.shape[0])
    text = empty(2, tokens, unet.text.weight.shape[0])
    sample = empty(*latents.shape, dtype=torch.float32)
    history = empty(2, 0, *latents.shape, dtype=torch.float32)
    table = empty(1, HISTORY + 1, dtype=torch.float32)
    step = empty(1, dtype=torch.int64)

    def run() -> None:
        output = unet.predict(latents, time_rows, text)
        guided_step(output, sample, history, latents, table, step)

    return run
