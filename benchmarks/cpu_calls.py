"""The calls of our ops when presets draw pictures on a CPU, found without weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.bench.graph import guided
from fastdiff.bench.preset_parts import without_memory
from fastdiff.bench.presets import blueprint, preset_named
from fastdiff.demo import DEMO_FOLDER
from fastdiff.families import Sizes, named
from fastdiff.kernels.choices import Work, work_of
from fastdiff.kernels.contract import KernelSpec
from fastdiff.kernels.dispatch import kernel_of
from fastdiff.kernels.where import planned_on_cpu
from fastdiff.models.borrow import Loan
from fastdiff.runtime.planned import Run

SCALES = {"sd15": (1.0, 0.5), "sdxl": (1.0, 0.2), "sd3": (1.0, 0.1), "sd35-medium": (1.0,)}
"""Presets, and the scales of their widths to measure; other presets' sizes are close to these."""
ASKED = {"flux": (1.0,)}
"""Presets that are measured only by name (`--models "flux 1"`): 4,096 tokens beside a text's 512,
in heads of 128; one call takes seconds."""

TAPED = 1.0
"""Models at a smaller scale may run as tapes. Activations of a full one's step take at least 111
MiB, which is too much for a tape; those of the others take 28 at most."""

CODED = 64
"""The latents' side of the largest picture through an autoencoder. A larger one's calls take
seconds each, and use the choice of the nearest size."""


@dataclass
class Call:
    """A call of an op, and the model that makes it."""

    work: Work
    arguments: Any
    """The op's arguments; their tensors have shapes, strides and dtypes, but no memory."""
    models: list[str] = field(default_factory=list)
    taped: bool = False
    """Whether a tape may hold it."""


@dataclass(frozen=True)
class Model:
    """Networks without memory."""

    name: str
    denoiser: Any
    coder: Any
    taped: bool
    side: int
    """The latents'."""
    tokens: int | None = None
    """Tokens of a text; None: as in published pipelines."""

    def runs(self, dtype: torch.dtype) -> list[Run]:
        """A step with guidance, and the autoencoder's encoder and decoder."""
        factor = 2 ** (len(self.coder.config.block_out_channels) - 1)
        sizes = Sizes(min(self.side, CODED), factor)
        known = named(self.coder)
        assert known is not None
        halves = known[1].taken("", nn.Module.to(self.coder, dtype=dtype)).values()
        coding = [
            run
            for half, kind in halves
            for run in kind.planned(kind.borrow(half, Loan(half, rehearsal=True)), sizes)
        ]
        return [guided(self.denoiser, dtype, self.side, self.tokens), *coding]


def models(only: Sequence[str] = ()) -> Iterator[Model]:
    """The demo and the presets in `SCALES`; those in `ASKED`, if they are in `only`."""
    parts: list[Any] = []
    for cls, folder in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        parts.append(without_memory(cls, cls.load_config(DEMO_FOLDER / folder)))
    yield Model("demo", *parts, taped=True, side=parts[0].config.sample_size, tokens=24)
    for name, scales in (SCALES | ASKED).items():
        preset = preset_named(name)
        for scale in scales:
            if name in ASKED and f"{name} {scale:g}" not in only:
                continue
            cls, config = preset.network(scale * preset.base_scale)
            coder = without_memory(AutoencoderKL, preset.autoencoder(scale * preset.base_scale))
            denoiser = without_memory(cls, config)
            side = config.get("sample_size") or blueprint(name)[1]
            yield Model(f"{name} {scale:g}", denoiser, coder, scale < TAPED, side)


def calls(dtype: torch.dtype, only: Sequence[str] = ()) -> list[Call]:
    """One call for each distinct work in the models' pictures: in the denoising network with
    guidance, and in the autoencoder. `only`: names of models; all if empty."""
    found: dict[Work, Call] = {}
    for model in models(only):
        if only and model.name not in only:
            continue
        with planned_on_cpu(), torch.no_grad(), _Calls() as made:
            for run in model.runs(dtype):  # which computes what is hoisted
                run()
        for spec, arguments in made.found:
            work = work_of(spec, arguments)
            call = found.setdefault(work, Call(work, arguments))
            call.taped |= model.taped
            if model.name not in call.models:
                call.models.append(model.name)
    return list(found.values())


class _Calls(TorchDispatchMode):
    """Notes the contracts and arguments of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[KernelSpec, Any]] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kernel := kernel_of(op):
            arguments = kernel.spec.arguments(*args, **kwargs)
            self.found.append((kernel.spec, arguments))
        return op(*args, **kwargs)
